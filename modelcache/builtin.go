package modelcache

import "flightsvc/internal/protocol"

// Image is the name of the built-in model.
const Image = protocol.Image

// resolveImage is Resolve for the built-in model.
func resolveImage(version string) (Model, bool) {
	return Model{Ref: protocol.Image, Version: "1", Saved: protocol.ImageModel}, version == latest || version == "1"
}
