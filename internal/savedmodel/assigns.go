// Finds signatures that write to variables, by their operations: the answers of such a signature change from call to
// call.

package savedmodel

import (
	"bytes"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of GraphDef, FunctionDefLibrary, FunctionDef, OpDef, NodeDef, AttrValue and
// NameAttrList, from TensorFlow's graph.proto, function.proto, op_def.proto, node_def.proto and attr_value.proto.
const (
	fieldGraphNode    = 1
	fieldGraphLibrary = 2
	fieldFunction     = 1
	fieldFunctionSig  = 1
	fieldFunctionNode = 3
	fieldOpName       = 1
	fieldNodeName     = 1
	fieldNodeOp       = 2
	fieldNodeInput    = 3
	fieldNodeAttr     = 5
	fieldAttrList     = 1
	fieldAttrFunc     = 10
	fieldListFunc     = 9
	fieldFuncName     = 1
)

// graph has the nodes and functions of a GraphDef, which of them depend on which, and which write to variables. A
// function is one vertex, whatever its body, since TensorFlow runs all operations of a function that have effects.
type graph struct {
	nodes, functions map[string]int32 // vertices, by name
	vertices         []vertex
	used             []int32 // vertices that the node being read depends on
	meter            meter
}

type vertex struct {
	writes string  // an operation that writes to a variable, in it or in what it depends on; "" if none
	users  []int32 // vertices that depend on it
}

// Estimates of the memory of a vertex without its name, and of an edge, with what maps and slices keep free.
const (
	vertexBytes = 192
	edgeBytes   = 8
)

// none stands for no vertex.
const none = -1

func newGraph(reserve func(bytes int64) error) *graph {
	return &graph{nodes: map[string]int32{}, functions: map[string]int32{},
		meter: meter{reserve: reserve, left: meterStep}}
}

// add returns a new vertex.
func (g *graph) add() (int32, error) {
	if err := g.meter.take(vertexBytes); err != nil {
		return none, err
	}
	g.vertices = append(g.vertices, vertex{})
	return int32(len(g.vertices) - 1), nil //nolint:gosec // a file of fewer than 2 GiB has fewer than 2^31 nodes
}

// named returns the vertex of a name, and makes it if necessary: a name may be used before it is defined.
func (g *graph) named(names map[string]int32, name []byte) (int32, error) {
	if known, ok := names[string(name)]; ok {
		return known, nil
	}
	if err := g.meter.take(int64(len(name))); err != nil {
		return none, err
	}
	made, err := g.add()
	if err == nil {
		names[string(name)] = made
	}
	return made, err
}

func (g *graph) depend(user, used int32) error {
	g.vertices[used].users = append(g.vertices[used].users, user)
	return g.meter.take(edgeBytes)
}

// spread passes each operation that writes to all vertices that depend on it. It visits each vertex once, for all
// signatures together, and without recursion, because a file may hold a chain of millions.
func (g *graph) spread() {
	var found []int32
	for v := range g.vertices {
		if g.vertices[v].writes != "" {
			found = append(found, int32(v)) //nolint:gosec // see add
		}
	}
	for len(found) > 0 {
		from := g.vertices[found[len(found)-1]]
		found = found[:len(found)-1]
		for _, user := range from.users {
			if to := &g.vertices[user]; to.writes == "" {
				to.writes = from.writes
				found = append(found, user)
			}
		}
	}
}

// assigned returns an operation that a signature depends on and that writes to a variable, or "".
func (g *graph) assigned(signature Signature) string {
	for _, out := range signature.Outputs {
		name, _, _ := strings.Cut(out.Tensor, ":")
		if v, ok := g.nodes[name]; ok && g.vertices[v].writes != "" {
			return g.vertices[v].writes
		}
	}
	return ""
}

// assigns reports whether an operation writes to a variable: the Assign family of ops/state_ops.cc
// and ops/resource_variable_ops.cc, and the optimisers of ops/training_ops.cc.
func assigns(op string) bool {
	switch {
	case op == "Assign", op == "AssignAdd", op == "AssignSub", op == "CountUpTo", op == "ResourceCountUpTo":
		return true
	case strings.HasPrefix(op, "Assign") && strings.HasSuffix(op, "VariableOp"):
		return true
	}
	for _, prefix := range writingPrefixes {
		if rest, ok := strings.CutPrefix(op, prefix); ok && (prefix != "Scatter" || scatterWrites[rest]) {
			return true
		}
	}
	return false
}

var writingPrefixes = []string{
	"ResourceApply", "ResourceSparseApply", "ResourceScatter", "Scatter", "ResourceStridedSliceAssign",
}

// scatterWrites holds the Scatter operations on reference variables; ScatterNd makes a new tensor.
var scatterWrites = map[string]bool{
	"Update": true, "Add": true, "Sub": true, "Mul": true, "Div": true, "Min": true, "Max": true,
	"NdUpdate": true, "NdAdd": true, "NdSub": true, "NdMin": true, "NdMax": true,
}

// read reads a GraphDef.
func (g *graph) read(m *message) error {
	err := m.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldGraphNode:
			return g.readNode(field, none)
		case fieldGraphLibrary:
			return field.fields(func(num protowire.Number, field *message) error {
				if num != fieldFunction {
					return nil
				}
				return g.readFunction(field)
			})
		}
		return nil
	})
	g.spread()
	return err
}

// readFunction reads a FunctionDef.
func (g *graph) readFunction(m *message) error {
	body, err := g.add() // its name may come after its nodes
	if err != nil {
		return err
	}
	return m.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldFunctionSig:
			return field.fields(func(num protowire.Number, field *message) error {
				if num != fieldOpName {
					return nil
				}
				function, err := g.mention(g.functions, field)
				if err != nil {
					return err
				}
				return g.depend(function, body)
			})
		case fieldFunctionNode:
			return g.readNode(field, body)
		}
		return nil
	})
}

// mention reads a name and returns its vertex.
func (g *graph) mention(names map[string]int32, m *message) (int32, error) {
	name, err := m.text()
	if err != nil {
		return none, err
	}
	return g.named(names, name)
}

// readNode reads a NodeDef. body is the vertex of the function that the node is in, or none for the main graph.
func (g *graph) readNode(m *message, body int32) error {
	self, writes := body, ""
	g.used = g.used[:0]
	err := m.fields(func(num protowire.Number, field *message) (err error) {
		switch num {
		case fieldNodeName:
			if body == none {
				self, err = g.mention(g.nodes, field)
			}
			return err
		case fieldNodeOp:
			op, err := field.text()
			if assigns(string(op)) {
				writes = string(op)
			}
			return err
		case fieldNodeInput:
			if body != none {
				return nil
			}
			name, err := field.text()
			if err != nil {
				return err
			}
			name, _, _ = bytes.Cut(bytes.TrimPrefix(name, []byte("^")), []byte(":"))
			return g.use(g.named(g.nodes, name))
		case fieldNodeAttr:
			return field.fields(func(num protowire.Number, field *message) error {
				if num != fieldMapValue {
					return nil
				}
				return g.readAttribute(field)
			})
		}
		return nil
	})
	if err != nil || self == none {
		return err
	}
	if writes != "" {
		g.vertices[self].writes = writes
	}
	for _, used := range g.used {
		if err := g.depend(self, used); err != nil {
			return err
		}
	}
	return nil
}

// use notes that the node being read depends on a vertex.
func (g *graph) use(vertex int32, err error) error {
	if err != nil {
		return err
	}
	g.used = append(g.used, vertex)
	return g.meter.take(edgeBytes)
}

// readAttribute notes the functions that an attribute of the node being read names.
func (g *graph) readAttribute(m *message) error {
	function := func(num protowire.Number, field *message) error {
		if num != fieldFuncName {
			return nil
		}
		return g.use(g.mention(g.functions, field))
	}
	return m.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldAttrFunc:
			return field.fields(function)
		case fieldAttrList:
			return field.fields(func(num protowire.Number, field *message) error {
				if num != fieldListFunc {
					return nil
				}
				return field.fields(function)
			})
		}
		return nil
	})
}
