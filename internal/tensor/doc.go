// Package tensor maps the columns of Arrow record batches to tensors for a
// signature's inputs, and output tensors back to columns. It knows types, shapes,
// nulls and rows; it does not know TensorFlow, so the front can compute schemas with it.
//
// The way of a batch: a Plan is made once from signature and descriptor; Bind fits it
// to the schema of a stream; Check sees that a record batch lies within its buffers; Rows says
// which rows take part; Binding.Values refuses the rows that cannot be part of a tensor and makes
// the input tensors of the others; Plan.Settle refuses the rows whose outputs cannot be written;
// Plan.Records turns the outputs into record batches with one row for each row that came in.
//
// What is wrong with one row refuses that row, with a reason. What concerns the whole batch is a
// fault: lists that disagree at an open dimension without padding, buffers that lie, and a tensor
// of more than MaxTensorBytes.
//
// Copies in: a null-free fixed-width column, or lists, fixed-shape tensors or raw cells of such,
// becomes a tensor without a copy when its rows lie one after the other; TensorFlow copies once if
// they do not begin at 64 bytes. A selection of rows, a cast, padding, booleans, vectors and the
// element table of strings copy once; a dictionary that is also cast copies twice. The bytes of
// strings are viewed, and held.
//
// Copies out: values are viewed. Strings, booleans and types that widen copy once; null rows copy
// once more in a scalar column or in the layout "tensor", where they take room.
//
// What may enter: mapping between Arrow memory and dense tensors. Decoding of pictures
// lives in internal/preprocess, running a graph in internal/tensorflow.
package tensor
