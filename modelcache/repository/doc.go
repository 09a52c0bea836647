// Package repository finds models: in folders and in stores, below the model-root, and in the cache-dir, where it keeps
// those that were fetched or pushed.
//
// Goroutines: listings, fetches, readings of graphs, digests and collections run on goroutines of the Repository.
// Repository.Close ends and awaits them.
//
// What may enter: references, versions, files, digests and settings of models. Nothing here knows which models are in
// memory.
package repository
