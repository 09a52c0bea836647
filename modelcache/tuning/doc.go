// Package tuning keeps what was measured of a model, and measures it in several configurations to find the fastest.
//
// Goroutines: WhileIdle has one for its search.
//
// What may enter: profiles, and how a configuration is found. Runners are the Pool's.
package tuning
