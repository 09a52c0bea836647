// What cgo needs C for: deallocators, which TensorFlow calls, and reads of a string
// element in one call.

#ifndef FLIGHTSVC_DOOR_H_
#define FLIGHTSVC_DOOR_H_

#include <stdint.h>
#include <stdlib.h>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tstring.h"

// Makes a tensor over memory of the caller; doorReturned(handle) is called once,
// when TensorFlow has released the memory, or in this call if it fails.
TF_Tensor* door_lend(TF_DataType dtype, const int64_t* dims, int num_dims,
                     void* data, size_t len, uintptr_t handle);

// Makes a string tensor of n elements and takes over the array, which is from
// calloc. When TensorFlow has released it, each element and then the array are
// freed, and doorReturned(0) is called.
TF_Tensor* door_strings(const int64_t* dims, int num_dims, TF_TString* elements,
                        size_t n);

// The bytes of one string element.
typedef struct {
  const char* data;
  size_t len;
} door_bytes;
door_bytes door_string(const TF_Tensor* tensor, size_t i);

#endif
