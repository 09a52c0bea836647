package repository

import (
	"context"
	"errors"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// ReserveWith sets the function by which the Repository reserves host memory while it reads a saved_model.pb; a
// negative number of bytes gives memory back. It must be called before a model is looked up.
func (r *Repository) ReserveWith(reserve func(ctx context.Context, bytes int64) error) {
	r.reserve = reserve
}

// readGraph reads saved_model.pb in a folder, once for all concurrent callers. stamp is the fingerprint of the files.
func (r *Repository) readGraph(ctx context.Context, dir, stamp string) (*savedmodel.Model, error) {
	return r.reading.do(ctx, r, dir+"\n"+stamp, func(ctx context.Context) (*savedmodel.Model, error) {
		if r.reserve == nil {
			return savedmodel.Read(ctx, dir, nil)
		}
		var taken int64
		defer func() { _ = r.reserve(ctx, -taken) }() // giving back never fails
		return savedmodel.Read(ctx, dir, func(bytes int64) error {
			err := r.reserve(ctx, bytes)
			if err == nil {
				taken += bytes
			}
			return err
		})
	})
}

// checkGraph reads saved_model.pb in a folder that was just written. What is wrong with the file becomes a BadRequest
// with the sentence of format and args, which does not name the temporary folder.
func (r *Repository) checkGraph(ctx context.Context, dir, format string, args ...any) error {
	_, err := r.readGraph(ctx, dir, "")
	if kind, _ := fault.KindOf(err); err == nil || kind != fault.BadRequest && kind != fault.Precondition {
		return err
	}
	return fault.New(fault.BadRequest, format+": %w", append(args, errors.Unwrap(err))...)
}
