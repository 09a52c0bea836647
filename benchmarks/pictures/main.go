// Command pictures makes tensors from JPEG files as the runner does: batch by batch, in two goroutines. It
// reads the files first. For each line on its standard input it processes all of them once and prints the
// seconds and CPU seconds that it took. It writes the tensor of the first batch to the file named first.
//
//	pictures TENSOR FILE...
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"flightsvc/internal/offheap"
	"flightsvc/internal/preprocess"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

const (
	goroutines = 2
	batch      = 32
	working    = 512 << 20 // bytes of pictures processed at once, as in the runner
)

// spec is what EfficientNet-Lite0 takes.
var spec = preprocess.Spec{
	Height: 224, Width: 224, Resize: "bilinear", Fit: "crop", Channels: "RGB",
	Scale:  [3]float32{1. / 128, 1. / 128, 1. / 128},
	Offset: [3]float32{-127. / 128, -127. / 128, -127. / 128},
	DType:  savedmodel.Float32,
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: pictures TENSOR FILE...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "pictures: "+err.Error())
		os.Exit(1)
	}
}

// run processes all pictures once for each line on standard input.
func run(target string, names []string) error {
	pictures := make([]tensor.Picture, len(names))
	for i, name := range names {
		file, err := os.ReadFile(name) //nolint:gosec // the caller's own files
		if err != nil {
			return err
		}
		pictures[i] = tensor.Picture{Data: file}
	}
	limits := preprocess.Limits{Pixels: 1 << 24, Bytes: 1 << 24, Working: working}
	graph, err := preprocess.New(spec, preprocess.NewBudget(limits))
	if err != nil {
		return err
	}
	defer func() { _ = graph.Close() }()
	memory := &offheap.Allocator{}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		began, used := time.Now(), processorTime()
		for from := 0; from < len(pictures); from += batch {
			value, err := decode(graph, pictures[from:min(from+batch, len(pictures))], memory)
			if err != nil {
				return err
			}
			if from == 0 {
				if err := os.WriteFile(target, value.Data, 0o600); err != nil {
					return err
				}
			}
			value.Release()
		}
		fmt.Println(time.Since(began).Seconds(), (processorTime() - used).Seconds())
	}
	return lines.Err()
}

// processorTime returns the CPU time of this process.
func processorTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		panic(err) // it has no reason to fail
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// decode makes one tensor of some pictures, which the caller releases.
func decode(graph *preprocess.Graph, pictures []tensor.Picture, memory *offheap.Allocator) (tensor.Value, error) {
	shape := []int64{int64(len(pictures)), int64(spec.Height), int64(spec.Width), 3}
	value, size := tensor.Allocate(spec.DType, shape, memory), spec.Bytes()
	group, ctx := errgroup.WithContext(context.Background())
	group.SetLimit(goroutines)
	for i, picture := range pictures {
		group.Go(func() error {
			return graph.Run(ctx, picture, value.Data[int64(i)*size:int64(i+1)*size])
		})
	}
	if err := group.Wait(); err != nil {
		value.Release()
		return tensor.Value{}, err
	}
	return value, nil
}
