// Package gpu finds the GPUs of this host, decides on which one a model is loaded, plans their memory, and takes
// devices that fail out of service. It asks NVIDIA's library (NVML) through go-nvml, which opens it at run time, so
// that on a host without a driver an Inventory is just empty.
//
// No memory is promised twice. A Placement stands for one process on one device, and promises it what it may still
// take: its cost less what it has. Each front writes the sum of its promises into a file that the other fronts of the
// host read. A load locks the device, reads its free memory and all promises, and keeps the lock until it has settled.
//
// What may enter: discovery, placement and health. Running a graph lives in internal/tensorflow, processes in
// modelcache.
package gpu
