// Package tuning keeps a profile of each model, and measures a model in several configurations to find the fastest.
//
// Goroutines: WhileIdle has one for its search.
//
// What may enter: profiles, and how a configuration is found. The Pool starts and ends runners.
package tuning
