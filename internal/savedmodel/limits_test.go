// Tests of files that are too long, too deep, never end, or are no files.

package savedmodel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/galeone/tensorflow/tensorflow/go/core/framework/types_go_proto"
	corepb "github.com/galeone/tensorflow/tensorflow/go/core/protobuf/for_core_protos_go_proto"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"flightsvc/internal/fault"
)

// nodeOf writes a NodeDef; input and function may be "".
func nodeOf(name, op, input, function string) []byte {
	data := append(nest([]byte(name), fieldNodeName), nest([]byte(op), fieldNodeOp)...)
	if input != "" {
		data = append(data, nest([]byte(input), fieldNodeInput)...)
	}
	if function != "" {
		data = append(data, nest([]byte(function), fieldNodeAttr, fieldMapValue, fieldAttrFunc, fieldFuncName)...)
	}
	return data
}

// modelOf writes a SavedModel of a GraphDef whose signature returns the node "out".
func modelOf(t *testing.T, graph []byte) []byte {
	t.Helper()
	signature, err := proto.Marshal(&corepb.SignatureDef{
		Outputs: map[string]*corepb.TensorInfo{"y": info("out:0", types_go_proto.DataType_DT_FLOAT)},
	})
	if err != nil {
		t.Fatal(err)
	}
	entry := append(nest([]byte(DefaultSignature), fieldMapKey), nest(signature, fieldMapValue)...)
	meta := append(nest([]byte(ServeTag), fieldMetaInfo, fieldTags), nest(graph, fieldGraph)...)
	return nest(append(meta, nest(entry, fieldSignatureMap)...), fieldMetaGraphs)
}

func writeFile(t *testing.T, data []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, File), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestReadDoesNotRecurse reads long chains of nodes and of functions with a small stack: one that is exceeded ends the
// process.
func TestReadDoesNotRecurse(t *testing.T) {
	defer debug.SetMaxStack(debug.SetMaxStack(1 << 20))
	const length = 100_000
	var nodes, functions []byte
	for i := range length {
		op, input, function := "Identity", fmt.Sprintf("^n%d", i-1), ""
		inner, called := "PartitionedCall", fmt.Sprintf("f%d", i-1)
		if i == 0 {
			input, called = "", ""
			op, function = "PartitionedCall", fmt.Sprintf("f%d", length-1)
			inner = "AssignVariableOp"
		}
		nodes = append(nodes, nest(nodeOf(fmt.Sprintf("n%d", i), op, input, function), fieldGraphNode)...)
		body := nest(nodeOf("call", inner, "", called), fieldFunctionNode)
		body = append(body, nest(fmt.Appendf(nil, "f%d", i), fieldFunctionSig, fieldOpName)...)
		functions = append(functions, nest(body, fieldGraphLibrary, fieldFunction)...)
	}
	out := nest(nodeOf("out", "Identity", fmt.Sprintf("n%d:0", length-1), ""), fieldGraphNode)
	dir := writeFile(t, modelOf(t, append(append(out, nodes...), functions...)))
	model, err := Read(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := model.Signatures[DefaultSignature].Assigns; got != "AssignVariableOp" {
		t.Errorf("the end of the chains assigns by %q", got)
	}
}

// TestReadReserves holds that memory which grows with the file is asked for, and that no more than that is taken.
func TestReadReserves(t *testing.T) {
	var nodes []byte
	for i := range 200_000 {
		nodes = append(nodes, nest(nodeOf(fmt.Sprintf("n%d", i), "Identity", fmt.Sprintf("n%d", i-1), ""),
			fieldGraphNode)...)
	}
	dir := writeFile(t, modelOf(t, nodes))
	var reserved uint64
	taken := allocated(func() {
		if _, err := Read(t.Context(), dir,
			func(bytes int64) error { reserved += uint64(bytes); return nil }); err != nil {
			t.Fatal(err)
		}
	})
	// What was allocated in all counts each map and slice that a larger one replaced, too: twice the last one.
	if reserved < 20<<20 || taken > 3*reserved {
		t.Errorf("%d bytes were reserved, and %d allocated", reserved, taken)
	}
	full := fault.New(fault.Exhausted, "no memory")
	if _, err := Read(t.Context(), dir, func(int64) error { return full }); !errors.Is(err, full) {
		t.Errorf("without memory: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Read(ended, dir, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("after its caller has left: %v", err)
	}
}

func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestReadSkipsConstants reads a graph with 1.5 GiB of weights, whose file is sparse.
func TestReadSkipsConstants(t *testing.T) {
	const weights = 3 << 29
	around := func(length uint64, field protowire.Number) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.BytesType), length)
	}
	constant := nodeOf("weights", "Const", "", "")
	value := around(weights, 8) // AttrValue.tensor
	attribute := append(around(uint64(len(value))+weights, fieldMapValue), value...)
	constant = append(append(constant, around(uint64(len(attribute))+weights, fieldNodeAttr)...), attribute...)
	node := append(around(uint64(len(constant))+weights, fieldGraphNode), constant...)
	rest := nest(nodeOf("out", "AssignAdd", "weights", ""), fieldGraphNode)
	graph := append(around(uint64(len(node)+len(rest))+weights, fieldGraph), node...)
	whole := modelOf(t, rest) // for its signature
	_, _, head := protowire.ConsumeTag(whole)
	_, n := protowire.ConsumeVarint(whole[head:])
	meta := whole[head+n:]
	before := append(around(uint64(len(meta)+len(graph)+len(rest))+weights, fieldMetaGraphs), graph...)

	dir := writeFile(t, before)
	path := filepath.Join(dir, File)
	if err := os.Truncate(path, int64(len(before))+weights); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Write(append(rest, meta...)); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	var model *Model
	taken := allocated(func() { model, err = Read(t.Context(), dir, nil) })
	if err != nil || model.Signatures[DefaultSignature].Assigns != "AssignAdd" || taken > 8<<20 {
		t.Errorf("%+v, %v, %d bytes allocated", model, err, taken)
	}
}

// TestReadTakesOnlyWholeFiles gives Read files that never end, or that are too large.
func TestReadTakesOnlyWholeFiles(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		kind fault.Kind
		part string
	}{
		"a pipe": {func(path string) error { return unix.Mkfifo(path, 0o600) }, fault.Precondition,
			"not a regular file"},
		"a device": {func(path string) error { return os.Symlink("/dev/zero", path) }, fault.Precondition,
			"not a regular file"},
		"3 GiB": {func(path string) error { return sparse(path, 3<<30) }, fault.BadRequest, "3221225472 bytes"},
		"zeros": {func(path string) error { return sparse(path, 1<<30) }, fault.BadRequest, "damaged"},
		"a long name": {func(path string) error { return os.WriteFile(path, longName(), 0o600) }, fault.BadRequest,
			"a name of 65537 bytes"},
		"groups": {func(path string) error {
			return os.WriteFile(path, protowire.AppendTag(nil, 1, protowire.StartGroupType), 0o600)
		}, fault.BadRequest, "damaged"},
		"an endless number": {func(path string) error {
			return os.WriteFile(path, binary.LittleEndian.AppendUint64([]byte{8, 255, 255}, 1<<64-1), 0o600)
		}, fault.BadRequest, "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := c.make(filepath.Join(dir, File)); err != nil {
				t.Fatal(err)
			}
			_, err := Read(t.Context(), dir, nil)
			if kind, _ := fault.KindOf(err); kind != c.kind || !strings.Contains(err.Error(), c.part) {
				t.Errorf("kind %d, %v", kind, err)
			}
		})
	}
}

func sparse(path string, size int64) error {
	return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
}

func longName() []byte {
	return nest(nodeOf(strings.Repeat("x", maxText+1), "Identity", "", ""), fieldMetaGraphs, fieldGraph, fieldGraphNode)
}
