// Package gpu is the place of devices: what there is, how much memory it has, which load goes where, and what
// happens to a device that breaks. It asks NVIDIA's library (NVML) through go-nvml, which opens it at run time, so
// that a host without a driver is an Inventory with nothing in it.
//
// Memory is planned so that no device is promised twice. A Placement stands for one process on one device; what it
// may still take, its cost less what it has, is kept in a file that the fronts of a host share, and a load
// holds the lock of the device until it has settled. Whoever places a load reads the free memory and those
// promises under that lock.
//
// What may enter: discovery, placement and health. Running a graph lives in internal/tensorflow, processes in
// modelcache.
package gpu
