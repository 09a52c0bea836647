package handlers

import (
	"testing"

	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

func command(text string) *flight.FlightDescriptor {
	return &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: []byte(text)}
}

func TestOnlyCommandsAreDescriptors(t *testing.T) {
	for _, fd := range []*flight.FlightDescriptor{nil, {Type: flight.DescriptorPATH, Path: []string{"m"}}} {
		_, err := ParseDescriptor(fd)
		expect.Fault(t, err, fault.BadRequest, "CMD descriptor")
	}
}

func TestPlanNamesModelAndSignature(t *testing.T) {
	d, err := protocol.ParseDescriptor([]byte(`{"v":1,"model":"m","signature":"nope"}`))
	if err != nil {
		t.Fatal(err)
	}
	_, err = Plan(d, doubler)
	expect.Fault(t, err, fault.NotFound, "model m", `no signature "nope"`, "serving_default")
	d.Signature, d.Outputs = savedmodel.DefaultSignature, protocol.Outputs{{Tensor: "nope", Column: "c"}}
	_, err = Plan(d, doubler)
	expect.Fault(t, err, fault.BadRequest, "model m, signature serving_default", `no output "nope"`)
}
