// Package tensor maps the columns of Arrow record batches to tensors for a
// signature's inputs, and output tensors back to columns. It knows types, shapes,
// nulls and rows; it does not know TensorFlow, so the front can compute schemas with it.
//
// The way of a batch: a Plan is made once from signature and descriptor; Bind fits it
// to the schema of a stream; Rows says which rows take part; Binding.Values makes the
// input tensors; Plan.Record turns the outputs into a record batch with one row for
// each row that came in.
//
// Copies: a whole, null-free fixed-width column becomes a tensor without a copy when its
// buffer is 64-byte aligned; a slice, a selection of rows, a cast and a string column's
// element table copy once. Output values are viewed, never copied, unless a scalar column has
// refused rows, a type widens, or the elements are strings.
//
// What may enter: mapping between Arrow memory and dense tensors. Decoding of pictures
// lives in internal/preprocess, running a graph in internal/tensorflow.
package tensor
