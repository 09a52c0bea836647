// An operation that TensorFlow does not have, for the test of op_libraries: y is three times x.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"

REGISTER_OP("FlightsvcTriple").Input("x: float").Output("y: float").SetShapeFn(tensorflow::shape_inference::UnchangedShape);

class Triple : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(tensorflow::OpKernelContext* context) override {
    const tensorflow::Tensor& x = context->input(0);
    tensorflow::Tensor* y = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, x.shape(), &y));
    const float* from = x.flat<float>().data();
    float* to = y->flat<float>().data();
    for (int64_t i = 0; i < x.NumElements(); i++) to[i] = 3 * from[i];
  }
};

REGISTER_KERNEL_BUILDER(Name("FlightsvcTriple").Device(tensorflow::DEVICE_CPU), Triple);
