// Rows: which rows of a record batch take part in a run, and why the others do not.

package tensor

// Rows holds the state of each row of one record batch: it takes part in the run, it has a null input, or it was
// refused for a reason. Rows that do not take part never reach TensorFlow and have null outputs.
type Rows struct {
	state []rowState
	texts []string // reasons of refused rows, by row; nil without any
	kept  int
}

type rowState uint8

const (
	rowKept rowState = iota
	rowNull
	rowRefused
)

// NewRows returns the state of n rows that all take part.
func NewRows(n int) *Rows { return &Rows{state: make([]rowState, n), kept: n} }

// Len returns the number of rows.
func (r *Rows) Len() int { return len(r.state) }

// Kept returns how many rows take part.
func (r *Rows) Kept() int { return r.kept }

// Null takes a row out of the run because an input is null, as in SQL.
func (r *Rows) Null(row int) {
	if r.state[row] == rowKept {
		r.state[row] = rowNull
		r.kept--
	}
}

// Refuse takes a row out of the run for a reason, which becomes its error text.
func (r *Rows) Refuse(row int, reason string) {
	if r.state[row] == rowKept {
		r.kept--
	}
	r.state[row] = rowRefused
	if r.texts == nil {
		r.texts = make([]string, len(r.state))
	}
	r.texts[row] = reason
}

// reason returns why a row was refused, or false if it was not.
func (r *Rows) reason(row int) (string, bool) {
	if r.state[row] != rowRefused {
		return "", false
	}
	return r.texts[row], true
}

// FirstRefused returns the first refused row and its reason, or false if there is none.
func (r *Rows) FirstRefused() (row int, reason string, ok bool) {
	if r.texts == nil {
		return 0, "", false
	}
	for row, state := range r.state {
		if state == rowRefused {
			return row, r.texts[row], true
		}
	}
	return 0, "", false
}

// Refused returns how many rows were refused.
func (r *Rows) Refused() int64 {
	if r.texts == nil {
		return 0
	}
	n := int64(0)
	for _, state := range r.state {
		if state == rowRefused {
			n++
		}
	}
	return n
}

// Positions returns the rows that take part, ascending.
func (r *Rows) Positions() []int {
	positions := make([]int, 0, r.kept)
	for row, state := range r.state {
		if state == rowKept {
			positions = append(positions, row)
		}
	}
	return positions
}

// span is the half-open range of positions [lo, hi).
type span struct{ lo, hi int }

// spans returns the rows that take part as the longest possible ranges.
func (r *Rows) spans() []span {
	if r.kept == len(r.state) {
		return []span{{0, len(r.state)}}
	}
	var list []span
	for row, state := range r.state {
		switch {
		case state != rowKept:
		case len(list) > 0 && list[len(list)-1].hi == row:
			list[len(list)-1].hi++
		default:
			list = append(list, span{row, row + 1})
		}
	}
	return list
}
