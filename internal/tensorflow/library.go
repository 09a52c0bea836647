package tensorflow

// #include "door.h"
import "C"

import "unsafe"

// LoadLibrary loads a shared library, and with it the operations and kernels that it registers, for all graphs that are
// loaded afterwards. The library stays until the process ends, since TensorFlow cannot unload one; loading it again
// does nothing. Its code runs in this process, with all rights of the process. A file that is missing, is no library
// for this machine, or was built for another version of TensorFlow is an *Error with the loader's message.
func LoadLibrary(path string) error {
	c := C.CString(path)
	defer C.free(unsafe.Pointer(c))
	return withStatus(func(status *C.TF_Status) {
		if library := C.TF_LoadLibrary(c, status); library != nil {
			C.TF_DeleteLibraryHandle(library) // frees only the description; the code stays loaded
		}
	})
}
