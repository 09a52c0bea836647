// Picture graphs: each decodes pictures as streams ask for it, in parallel and within a memory budget.

package main

import (
	"context"
	"sync"

	"github.com/apache/arrow/go/v15/arrow/memory"
	"golang.org/x/sync/errgroup"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/preprocess"
	"flightsvc/internal/protocol"
	"flightsvc/internal/tensor"
)

// maxGraphs is how many picture graphs a runner keeps. Each has a session with a thread of its own.
const maxGraphs = 64

// workingBytes bounds the memory of all pictures that are being decoded; a single one may take more.
const workingBytes = 512 << 20

// graphs are the picture graphs of a runner, each built when the first stream asks for it.
type graphs[G any] struct {
	cores  int
	budget *preprocess.Budget
	build  func(preprocess.Spec, *preprocess.Budget) (G, error)

	mu    sync.Mutex // guards built
	built map[preprocess.Spec]G
}

func newGraphs[G any](setup control.Setup, build func(preprocess.Spec, *preprocess.Budget) (G, error)) *graphs[G] {
	limits := preprocess.Limits{Pixels: setup.MaxImagePixels, Bytes: setup.MaxImageBytes, Working: workingBytes}
	return &graphs[G]{cores: max(setup.Cores, 1), budget: preprocess.NewBudget(limits), build: build,
		built: map[preprocess.Spec]G{}}
}

// of returns the graph of each input.
func (g *graphs[G]) of(wanted map[string]protocol.Preprocess) (map[string]G, error) {
	all := make(map[string]G, len(wanted))
	for input, p := range wanted {
		graph, err := g.one(specOf(p))
		if err != nil {
			return nil, fault.New(kindOf(err), "preprocess of input %q: %w", input, err)
		}
		all[input] = graph
	}
	return all, nil
}

func (g *graphs[G]) one(spec preprocess.Spec) (G, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if graph, ok := g.built[spec]; ok {
		return graph, nil
	}
	if len(g.built) == maxGraphs {
		var none G
		return none, fault.New(fault.Exhausted, "this runner has decoded pictures in %d different ways, its "+
			"limit; use one of these preprocess options, or unload the model", maxGraphs)
	}
	graph, err := g.build(spec, g.budget)
	if err == nil {
		g.built[spec] = graph
	}
	return graph, err
}

func specOf(p protocol.Preprocess) preprocess.Spec {
	spec := preprocess.Spec{
		Resize: p.Resize, Antialias: p.Antialias, Fit: p.Fit, Channels: p.Channels,
		Scale: p.Scales(), Offset: p.Offsets(), DType: p.Type(),
	}
	if p.Size != nil {
		spec.Height, spec.Width = p.Size[0], p.Size[1]
	}
	return spec
}

// each calls decode for each picture, for as many at once as there are cores, and returns the reasons of refused
// pictures by position. Its error names the input.
func (g *graphs[G]) each(
	ctx context.Context, input string, pictures []tensor.Picture, decode func(ctx context.Context, i int) error,
) (map[int]string, error) {
	var mu sync.Mutex // guards refused
	refused := map[int]string{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(g.cores)
	for i := range pictures {
		group.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			err := decode(ctx, i)
			if err != nil && kindOf(err) == fault.BadRequest {
				mu.Lock()
				defer mu.Unlock()
				refused[i] = firstLine(err)
				return nil
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, fault.New(kindOf(err), "decode pictures for input %q: %w", input, err)
	}
	return refused, nil
}

// Pictures returns the decoder of all inputs. It builds the graphs that the runner does not have yet.
func (e *loaded) Pictures(wanted map[string]protocol.Preprocess) (tensor.Pictures, error) {
	byInput, err := e.graphs.of(wanted)
	if err != nil {
		return nil, err
	}
	return &tensors{graphs: e.graphs, byInput: byInput, wanted: wanted}, nil
}

// tensors decodes pictures to tensors.
type tensors struct {
	graphs  *graphs[*preprocess.Graph]
	byInput map[string]*preprocess.Graph
	wanted  map[string]protocol.Preprocess
}

// Bytes is part of tensor.Pictures.
func (t *tensors) Bytes(input string, _ tensor.Picture) int64 { return specOf(t.wanted[input]).Bytes() }

// Decode is part of tensor.Pictures.
func (t *tensors) Decode(
	ctx context.Context, input string, pictures []tensor.Picture, mem memory.Allocator,
) (tensor.Value, map[int]string, error) {
	spec, graph := specOf(t.wanted[input]), t.byInput[input]
	size := spec.Bytes()
	if int64(len(pictures))*size > tensor.MaxTensorBytes {
		return tensor.Value{}, nil, fault.New(fault.Exhausted,
			"input %q: %d pictures of %dx%d are more than %d MiB; send fewer rows in a record batch", input,
			len(pictures), spec.Width, spec.Height, tensor.MaxTensorBytes>>20)
	}
	height, width := int64(spec.Height), int64(spec.Width)
	channels := size / (height * width * int64(spec.DType.Size()))
	value := tensor.Allocate(spec.DType, []int64{int64(len(pictures)), height, width, channels}, mem)
	refused, err := t.graphs.each(ctx, input, pictures, func(ctx context.Context, i int) error {
		return graph.Run(ctx, pictures[i], value.Data[int64(i)*size:int64(i+1)*size])
	})
	if err != nil {
		value.Release()
		return tensor.Value{}, nil, err
	}
	return value, refused, nil
}

// Interface guards.
var _ tensor.Pictures = (*tensors)(nil)
