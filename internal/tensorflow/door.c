#include "door.h"

#include "_cgo_export.h"

static void returned(void* data, size_t len, void* handle) {
  doorReturned((uintptr_t)handle);
}

TF_Tensor* door_lend(TF_DataType dtype, const int64_t* dims, int num_dims,
                     void* data, size_t len, uintptr_t handle) {
  return TF_NewTensor(dtype, dims, num_dims, data, len, returned,
                      (void*)handle);
}

static void free_strings(void* data, size_t len, void* unused) {
  TF_TString* elements = data;
  for (size_t i = 0; i < len / sizeof(TF_TString); i++) {
    TF_StringDealloc(&elements[i]);
  }
  free(elements);
  doorReturned(0);
}

TF_Tensor* door_strings(const int64_t* dims, int num_dims, TF_TString* elements,
                        size_t n) {
  return TF_NewTensor(TF_STRING, dims, num_dims, elements,
                      n * sizeof(TF_TString), free_strings, NULL);
}

door_bytes door_string(const TF_Tensor* tensor, size_t i) {
  const TF_TString* s = (const TF_TString*)TF_TensorData(tensor) + i;
  return (door_bytes){TF_StringGetDataPointer(s), TF_StringGetSize(s)};
}
