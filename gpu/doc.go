// Package gpu is the place of devices: what there is, how much memory it has, which model goes
// where. It is empty, since runners use the CPU so far.
//
// What may enter: discovery and placement, on NVML through go-nvml. Running a graph lives in
// internal/tensorflow, processes in modelcache.
package gpu
