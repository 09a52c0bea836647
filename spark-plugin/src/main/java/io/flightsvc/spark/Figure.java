package io.flightsvc.spark;

/** The metrics of sidecars. Each is a field of a front's report and, in camel case, a Spark metric. */
enum Figure {
  /** Rows that were answered, refused ones included. */
  ROWS("rows", "rows", Kind.COUNT),
  /** Batches that TensorFlow has run. */
  BATCHES("batches", "batches", Kind.COUNT),
  /** Rows that were refused, and streams that failed. */
  ERRORS("errors", "errors", Kind.COUNT),
  /** Rows that wait for a run now. */
  QUEUED("queued", "queued", Kind.NOW),
  /** Sum of the waits of all tasks, in seconds. */
  QUEUE_SECONDS("queue_seconds", "queueSeconds", Kind.SECONDS),
  /** Sum of the durations of all runs of TensorFlow, in seconds. */
  RUN_SECONDS("run_seconds", "runSeconds", Kind.SECONDS),
  /** Streams that are open now. */
  STREAMS("streams", "streams", Kind.NOW),
  /** Models that are ready now. */
  MODELS("models", "models", Kind.NOW),
  /** Memory that the front and its runners have now, in bytes. */
  MEMORY("memory", "memory", Kind.NOW),
  /** Memory that the runners have on GPUs now, in bytes. */
  DEVICE_MEMORY("device_memory", "deviceMemory", Kind.NOW),
  /** 1 while the sidecar serves; set by the plugin, not by the front. */
  SIDECARS("sidecars", "sidecars", Kind.NOW);

  /** How a figure changes. */
  enum Kind {
    /** Never falls; a counter. */
    COUNT,
    /** Never falls, and has fractions; a gauge, since Spark's counters are integers. */
    SECONDS,
    /** A current value; a gauge. */
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
