// Command session runs the session of a SavedModel in a loop, with nothing around it; benchmarks compare a runner with
// it. Each of -callers goroutines runs the same batch of random rows again and again. It prints the rows/s of each
// window as JSON.
//
//	session -model DIR -tensor serving_default_x:0 -shape 224,224,3 -fetch StatefulPartitionedCall:0 \
//	    -batch 16 -cores 2 -callers 2 -window 400ms -windows 3
//
// The one input is float32. TF_ENABLE_ONEDNN_OPTS is the caller's.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"

	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensorflow"
)

// leastRuns is how many runs of each caller a window has at least, as in a runner that measures itself.
const leastRuns = 2

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "session: "+err.Error())
		os.Exit(1)
	}
}

func run() error {
	model := flag.String("model", "", "folder of the SavedModel")
	input := flag.String("tensor", "", "tensor that is fed")
	dims := flag.String("shape", "", "dimensions of a row, with commas")
	fetch := flag.String("fetch", "", "tensors that are fetched, with commas")
	rows := flag.Int("batch", 1, "rows of a run")
	cores := flag.Int("cores", 1, "threads of each of TensorFlow's pools")
	callers := flag.Int("callers", 1, "runs at once")
	length := flag.Duration("window", 400*time.Millisecond, "length of a window")
	windows := flag.Int("windows", 3, "windows")
	flag.Parse()

	session, err := tensorflow.Load(*model, []string{savedmodel.ServeTag},
		tensorflow.Options{IntraOpThreads: *cores, InterOpThreads: max(*cores, *callers)})
	if err != nil {
		return err
	}
	defer func() { _ = session.Close() }()
	shape, elements := []int64{int64(*rows)}, *rows
	for dim := range strings.SplitSeq(*dims, ",") {
		n, err := strconv.Atoi(dim)
		if err != nil {
			return err
		}
		shape, elements = append(shape, int64(n)), elements*n
	}
	memory := &offheap.Allocator{}
	data := memory.Allocate(4 * elements)
	defer memory.Free(data)
	random := rand.New(rand.NewPCG(1, 0)) //nolint:gosec // not for secrets
	for i, numbers := 0, unsafe.Slice((*uint32)(unsafe.Pointer(&data[0])), elements); i < elements; i++ {
		numbers[i] = math.Float32bits(random.Float32())
	}
	fetches := strings.Split(*fetch, ",")
	once := func() error {
		fed, err := tensorflow.NewTensor(savedmodel.Float32, shape, data, nil)
		if err != nil {
			return err
		}
		defer fed.Close()
		results, err := session.Run(0, []tensorflow.Feed{{Name: *input, Tensor: fed}}, fetches)
		for _, result := range results {
			result.Close()
		}
		return err
	}
	window := func(length time.Duration) (float64, error) {
		rates := make([]float64, *callers)
		var working errgroup.Group
		for i := range rates {
			working.Go(func() error {
				began := time.Now()
				for runs := 1; ; runs++ {
					if err := once(); err != nil {
						return err
					}
					if passed := time.Since(began); passed >= length && runs >= leastRuns {
						rates[i] = float64(runs**rows) / passed.Seconds()
						return nil
					}
				}
			})
		}
		err := working.Wait()
		sum := 0.0
		for _, rate := range rates {
			sum += rate
		}
		return sum, err
	}
	if _, err := window(0); err != nil { // the first runs optimise the graph and build primitives
		return err
	}
	speeds := make([]float64, *windows)
	for i := range speeds {
		if speeds[i], err = window(*length); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(speeds)
}
