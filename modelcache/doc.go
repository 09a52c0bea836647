// Package modelcache keeps models ready in memory: it starts one runner process for a model on a device, returns the
// same runner to all callers, divides the memory of the host and of devices among runners, and ends them.
//
// Goroutines: each load runs on a goroutine of the Cache, so it survives the caller that asked first; each Runner has
// one that follows its process. Cache.Close ends and awaits all.
//
// What may enter: runner processes, their state, and which of them may have memory. Finding models belongs to
// modelcache/repository, finding how they run fastest to modelcache/tuning.
package modelcache
