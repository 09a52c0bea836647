package io.flightsvc.spark;

/** What is counted of sidecars. Each is a field of a front's report and, in camel case, a metric of Spark. */
enum Figure {
  /** Rows that were asked about. */
  ROWS("rows", "rows", Kind.COUNT),
  /** Batches that TensorFlow has run. */
  BATCHES("batches", "batches", Kind.COUNT),
  /** Rows that were refused, and streams that failed. */
  ERRORS("errors", "errors", Kind.COUNT),
  /** Rows that wait now. */
  QUEUED("queued", "queued", Kind.NOW),
  /** Time that tasks have waited, in seconds. */
  QUEUE_SECONDS("queue_seconds", "queueSeconds", Kind.SECONDS),
  /** Time that TensorFlow has run, in seconds. */
  RUN_SECONDS("run_seconds", "runSeconds", Kind.SECONDS),
  /** Streams that are open now. */
  STREAMS("streams", "streams", Kind.NOW),
  /** Models that are ready now. */
  MODELS("models", "models", Kind.NOW),
  /** Memory of the sidecar, front and runners, now, in bytes. */
  MEMORY("memory", "memory", Kind.NOW),
  /** Memory that its runners have on GPUs now, in bytes. */
  DEVICE_MEMORY("device_memory", "deviceMemory", Kind.NOW),
  /** 1 while the sidecar serves; in no front's report. */
  SIDECARS("sidecars", "sidecars", Kind.NOW);

  /** How a figure behaves. */
  enum Kind {
    /** Grows for ever; a counter. */
    COUNT,
    /** Grows for ever, and has fractions; a gauge, since Spark's counters are whole. */
    SECONDS,
    /** What there is now; a gauge. */
    NOW
  }

  final String field;
  final String metric;
  final Kind kind;

  Figure(String field, String metric, Kind kind) {
    this.field = field;
    this.metric = metric;
    this.kind = kind;
  }
}
