// Package modelcache keeps models ready: it finds a SavedModel for a reference, starts one
// runner process for it, hands the same runner to all who ask, and ends it.
//
// Goroutines: each load runs on a goroutine of the Cache, so it survives the caller that
// asked first; each Runner has one that follows its process. Cache.Close ends and awaits all.
//
// What may enter: references, versions, runner processes, and what is known of their state.
package modelcache
