package front

import (
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/handlers"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache"
)

// ListFlights lists what GetFlightInfo would serve for a descriptor without options: one flight for each model, version
// and signature that this host knows, with the answer's schema and without an endpoint. It loads nothing. Criteria are
// empty, or {"model":"name"} for the flights of one reference.
func (f *Front) ListFlights(criteria *flight.Criteria, stream flight.FlightService_ListFlightsServer) error {
	var only protocol.Criteria
	if err := protocol.DecodeBody(criteria.GetExpression(), &only); err != nil {
		return fault.New(fault.BadRequest, "criteria are empty or JSON like {\"model\":\"name\"}: %w", err)
	}
	entries, err := f.options.Cache.Index(stream.Context())
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if only.Model != "" && only.Model != entry.Ref {
			continue
		}
		flights, _ := flightsOf(entry)
		for _, info := range flights {
			if err := stream.Send(info); err != nil {
				return err
			}
		}
	}
	return nil
}

// flightsOf returns the flights of a model's signatures, by name, and for each signature that cannot be served without
// options the reason.
func flightsOf(entry modelcache.Entry) (flights []*flight.FlightInfo, reasons []string) {
	if entry.Err != nil {
		return nil, []string{entry.Err.Error()}
	}
	if entry.Saved == nil {
		return nil, nil // it lies in a store and was not fetched yet
	}
	for _, name := range entry.Saved.Names() {
		info, err := flightOf(entry, name)
		if err != nil {
			reasons = append(reasons, err.Error())
			continue
		}
		flights = append(flights, info)
	}
	return flights, reasons
}

func flightOf(entry modelcache.Entry, signature string) (*flight.FlightInfo, error) {
	asked := protocol.Descriptor{V: protocol.Version, Model: entry.Ref, Version: entry.Version, Signature: signature}
	command, err := asked.Command()
	if err != nil {
		return nil, err
	}
	fd := &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: command}
	d, err := handlers.ParseDescriptor(fd)
	if err != nil {
		return nil, err
	}
	plan, err := handlers.Plan(d, entry.Saved)
	if err != nil {
		return nil, err
	}
	return &flight.FlightInfo{
		Schema:           flight.SerializeSchema(plan.Schema(), memory.DefaultAllocator),
		FlightDescriptor: fd,
		TotalRecords:     -1,
		TotalBytes:       -1,
	}, nil
}
