// Package tensor maps the columns of Arrow record batches to tensors for a signature's inputs, and output tensors back
// to columns. It knows types, shapes, nulls and rows, but not TensorFlow, so the front can compute schemas with it.
//
// The way of a record batch: a Plan is made once from signature and descriptor; Bind fits it to the schema of a stream;
// Check ensures that a record batch lies within its buffers; Rows holds which rows take part; Binding.Values refuses
// the rows that cannot be part of a tensor and makes the input tensors of the others; Plan.Settle refuses the rows
// whose outputs cannot be written; Plan.Records turns the outputs into record batches with one row for each row of the
// input.
//
// An error in one row refuses that row, with a reason. What concerns the whole record batch is a fault: lists of
// different lengths at an open dimension without padding, offsets outside their buffers, and a tensor of more than
// MaxTensorBytes.
//
// Copies in: a null-free fixed-width column, or lists, fixed-shape tensors or raw cells of such, becomes a tensor
// without a copy if its rows are contiguous; TensorFlow copies once if they are not 64-byte aligned. A selection of
// rows, a cast, padding, booleans, vectors and the element table of strings copy once; a dictionary that is also cast
// copies twice. A tensor of strings views their bytes and holds a reference to them.
//
// Copies out: columns view the outputs. Strings, booleans and widened types are copied once; null rows once more in a
// scalar column or in the layout "tensor", because there a null row has elements, too.
//
// What may enter: mapping between Arrow memory and dense tensors. Decoding of pictures is in internal/preprocess,
// running a graph in internal/tensorflow.
package tensor
