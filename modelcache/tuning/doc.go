// Package tuning makes models fast: in the background it has Python freeze and fold them, and on request it measures a
// model in several configurations to find the fastest. It keeps a profile of each model.
//
// Goroutines: InBackground has one for what it has begun, and that one for the memory of a Python that freezes.
//
// What may enter: profiles, and how a form and a configuration are found. The Pool starts and ends runners.
package tuning
