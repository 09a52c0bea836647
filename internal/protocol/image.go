package protocol

import "flightsvc/internal/savedmodel"

// Image is the name of the built-in model, which has no files and makes Spark's image structs of pictures. A model of
// that name in the model-root cannot be used.
const Image = "image"

// ImageInput is the one input of the model Image.
const ImageInput = "image"

// ImageModel is the signature of the model Image. Its outputs are the fields of Spark's image struct, without origin.
var ImageModel = &savedmodel.Model{Signatures: map[string]savedmodel.Signature{
	savedmodel.DefaultSignature: {
		Inputs: []savedmodel.Spec{imageTensor(ImageInput, savedmodel.String)},
		Outputs: []savedmodel.Spec{
			imageTensor("data", savedmodel.String), imageTensor("height", savedmodel.Int32),
			imageTensor("mode", savedmodel.Int32), imageTensor("nChannels", savedmodel.Int32),
			imageTensor("width", savedmodel.Int32),
		},
	},
}}

// imageTensor is a tensor with one element a row.
func imageTensor(name string, dtype savedmodel.DType) savedmodel.Spec {
	return savedmodel.Spec{Name: name, Tensor: name, DType: dtype, Shape: []int64{-1}}
}
