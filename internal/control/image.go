package control

import "flightsvc/internal/savedmodel"

// Image is the name of the model that is built in: it has no files and makes Spark's image structs of
// pictures. It goes over a model of that name in the model-root.
const Image = "image"

// ImageInput is the one input of the model Image.
const ImageInput = "image"

// ImageModel is what the model Image says of itself. Its outputs are the fields of Spark's image struct
// but for the origin.
var ImageModel = &savedmodel.Model{Signatures: map[string]savedmodel.Signature{
	savedmodel.DefaultSignature: {
		Inputs: []savedmodel.Spec{column(ImageInput, savedmodel.String)},
		Outputs: []savedmodel.Spec{
			column("data", savedmodel.String), column("height", savedmodel.Int32), column("mode", savedmodel.Int32),
			column("nChannels", savedmodel.Int32), column("width", savedmodel.Int32),
		},
	},
}}

// column is a tensor with one element a row.
func column(name string, dtype savedmodel.DType) savedmodel.Spec {
	return savedmodel.Spec{Name: name, Tensor: name, DType: dtype, Shape: []int64{-1}}
}
