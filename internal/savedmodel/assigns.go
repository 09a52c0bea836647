package savedmodel

import (
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

// node is what matters of a NodeDef here.
type node struct {
	name, op  string
	inputs    []string // names of nodes
	functions []string // names of functions that it calls
}

// graph is a GraphDef with its functions.
type graph struct {
	nodes     map[string]*node
	functions map[string][]*node
}

// assigned returns the first operation reachable from a signature's outputs that writes to
// a variable, or "". Inside a function every node counts, since TensorFlow runs all with side
// effects; in the main graph only what the outputs depend on.
func (g *graph) assigned(signature Signature) string {
	called := map[string]bool{}
	var inFunctions func(n *node) string
	inFunctions = func(n *node) string {
		if assigns(n.op) {
			return n.op
		}
		for _, name := range n.functions {
			if called[name] {
				continue
			}
			called[name] = true
			for _, inner := range g.functions[name] {
				if op := inFunctions(inner); op != "" {
					return op
				}
			}
		}
		return ""
	}
	seen := map[string]bool{}
	var upstream func(name string) string
	upstream = func(name string) string {
		n, ok := g.nodes[name]
		if !ok || seen[name] {
			return ""
		}
		seen[name] = true
		if op := inFunctions(n); op != "" {
			return op
		}
		for _, input := range n.inputs {
			if op := upstream(input); op != "" {
				return op
			}
		}
		return ""
	}
	for _, out := range signature.Outputs {
		name, _, _ := strings.Cut(out.Tensor, ":")
		if op := upstream(name); op != "" {
			return op
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
	for _, prefix := range []string{"ResourceApply", "ResourceSparseApply", "ResourceScatter", "Scatter", "ResourceStridedSliceAssign"} {
		if rest, ok := strings.CutPrefix(op, prefix); ok && (prefix != "Scatter" || scatterWrites[rest]) {
			return true
		}
	}
	return false
}

// scatterWrites holds the Scatter operations on reference variables; ScatterNd makes a new tensor.
var scatterWrites = map[string]bool{
	"Update": true, "Add": true, "Sub": true, "Mul": true, "Div": true, "Min": true, "Max": true,
	"NdUpdate": true, "NdAdd": true, "NdSub": true, "NdMin": true, "NdMax": true,
}

func parseGraph(data []byte) (*graph, error) {
	g := &graph{nodes: map[string]*node{}, functions: map[string][]*node{}}
	err := fields(data, func(num protowire.Number, value []byte) error {
		switch num {
		case fieldGraphNode:
			n, err := parseNode(value)
			g.nodes[n.name] = n
			return err
		case fieldGraphLibrary:
			return fields(value, func(num protowire.Number, value []byte) error {
				if num != fieldFunction {
					return nil
				}
				return g.addFunction(value)
			})
		}
		return nil
	})
	return g, err
}

func (g *graph) addFunction(data []byte) error {
	var name string
	var nodes []*node
	err := fields(data, func(num protowire.Number, value []byte) error {
		switch num {
		case fieldFunctionSig:
			return fields(value, func(num protowire.Number, value []byte) error {
				if num == fieldOpName {
					name = string(value)
				}
				return nil
			})
		case fieldFunctionNode:
			n, err := parseNode(value)
			nodes = append(nodes, n)
			return err
		}
		return nil
	})
	g.functions[name] = nodes
	return err
}

func parseNode(data []byte) (*node, error) {
	n := &node{}
	err := fields(data, func(num protowire.Number, value []byte) error {
		switch num {
		case fieldNodeName:
			n.name = string(value)
		case fieldNodeOp:
			n.op = string(value)
		case fieldNodeInput:
			name, _, _ := strings.Cut(strings.TrimPrefix(string(value), "^"), ":")
			n.inputs = append(n.inputs, name)
		case fieldNodeAttr:
			return fields(value, func(num protowire.Number, value []byte) error {
				if num != fieldMapValue {
					return nil
				}
				return n.addAttribute(value)
			})
		}
		return nil
	})
	return n, err
}

// addAttribute keeps the functions that an attribute names.
func (n *node) addAttribute(data []byte) error {
	name := func(num protowire.Number, value []byte) error {
		if num == fieldFuncName {
			n.functions = append(n.functions, string(value))
		}
		return nil
	}
	return fields(data, func(num protowire.Number, value []byte) error {
		switch num {
		case fieldAttrFunc:
			return fields(value, name)
		case fieldAttrList:
			return fields(value, func(num protowire.Number, value []byte) error {
				if num != fieldListFunc {
					return nil
				}
				return fields(value, name)
			})
		}
		return nil
	})
}
