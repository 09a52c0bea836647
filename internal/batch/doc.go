// Package batch decides which rows TensorFlow runs together. Its terms are TF Serving's: a task is a slice of a
// stream's record batch that waits for a run, a batch is what one run takes, and max_batch_size,
// batch_timeout_micros, max_enqueued_batches and num_batch_threads bound them.
//
// The way of a record batch: [Stream.Run] cuts it into tasks of at most max_batch_size rows; the [Scheduler] joins
// waiting tasks of several streams that may run together, runs them, and returns to each stream its own rows;
// Stream.Run concatenates the rows of its tasks. A record batch that is neither cut nor joined is not copied. Streams
// take turns, so a small record batch waits behind a large one for one run at most.
//
// Rows that TensorFlow refuses are found by halving, in runs of that stream alone, so that one
// row fails and the others of its record batch do not.
//
// With allowed_batch_sizes, every run has one of these numbers of rows, halves included: record batches are cut at the
// largest of these sizes that is allowed, and the rest is padded with copies of its first row, whose outputs are
// dropped. On a device, a run that does not fit into its memory is cut again, and the size that fits limits all later
// runs.
//
// Goroutines: one for each of num_batch_threads, owned by the Scheduler and awaited by its Close, and one for each run
// under way.
//
// Memory: a task owns its feeds until it has run, even if its caller has returned before. The streams that a run
// served share its outputs, which are closed with the last of their answers.
//
// It is not a library because none cuts, joins and pads by rows and finds the refused ones.
//
// What may enter: queues, turns, cutting and joining. It knows neither Arrow columns nor TensorFlow.
package batch
