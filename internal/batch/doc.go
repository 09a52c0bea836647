// Package batch decides which rows TensorFlow runs together. Its words are TF Serving's: a
// task is one piece of a stream's record batch, a batch is what one run takes, and
// max_batch_size, batch_timeout_micros, max_enqueued_batches and num_batch_threads bound them.
//
// The way of a record batch: [Stream.Run] cuts it into tasks of at most max_batch_size rows;
// the [Scheduler] joins tasks of several streams that wait at the same time and may run
// together, runs them, and gives each stream its own rows back; Stream.Run puts the rows of
// its tasks together again. A record batch that is neither cut nor joined is passed on
// untouched. Streams take turns, so a stream of large record batches does not keep a
// small one waiting for longer than one run.
//
// Rows that TensorFlow refuses are found by halving, in runs of that stream alone, so that one
// row fails and the others of its record batch do not.
//
// Where allowed_batch_sizes are set, a run has one of these numbers of rows and no other, halves included: pieces are
// cut as large as one of them can be, and what remains is padded with copies of its first row, whose outputs are
// dropped. On a device, a run that its memory cannot hold is cut again, and the size that fits is the limit from then
// on.
//
// Goroutines: one for each of num_batch_threads, owned by the Scheduler and awaited by its
// Close, and one for each run under way.
//
// Memory: a task owns its feeds until it has run, whether or not its stream is still there. The
// outputs of a run are shared by the streams that it served and closed with the last of their
// answers.
//
// What may enter: queues, turns, cutting and joining. It knows neither Arrow columns nor
// TensorFlow.
package batch
