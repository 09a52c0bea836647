// Package modelcache keeps models ready in memory: it starts one runner process for a model, hands the same runner to
// all who ask, shares memory of the host and of devices among them, and ends them.
//
// Goroutines: each load runs on a goroutine of the Cache, so it survives the caller that
// asked first; each Runner has one that follows its process. Cache.Close ends and awaits all.
//
// What may enter: runner processes, their state, and who may have memory. Where models come from is
// modelcache/repository's, how they run fastest modelcache/tuning's.
package modelcache
