package io.flightsvc.spark;

import java.util.Collections;
import java.util.HashMap;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import org.apache.spark.SparkConf;
import org.apache.spark.SparkContext;
import org.apache.spark.api.plugin.DriverPlugin;
import org.apache.spark.api.plugin.PluginContext;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/** The plugin on the driver: checks the settings before any executor starts, and collects all executors' reports. */
final class DriverSide implements DriverPlugin {
  private static final Logger log = LoggerFactory.getLogger(FlightsvcPlugin.class);

  /** The key of what executors are sent: the Python with which pyspark runs workers. */
  static final String PYTHON = "python";

  /** An executor that has not reported for this long counts as ended. */
  private static final long GONE_NANOS = TimeUnit.SECONDS.toNanos(30);

  private final Map<String, Executor> executors = new HashMap<>(); // by Spark's id; guarded by this

  /** The last report of an executor. */
  private static final class Executor {
    final Figures figures;
    final String reason; // null while its sidecar serves
    final long time = System.nanoTime();

    Executor(Figures figures, String reason) {
      this.figures = figures;
      this.reason = reason;
    }
  }

  /**
   * Checks the settings {@code spark.flightsvc.*}.
   *
   * @throws IllegalArgumentException a setting is unknown; the application does not start
   */
  @Override
  public Map<String, String> init(SparkContext spark, PluginContext context) {
    SparkConf conf = context.conf();
    Settings settings = new Settings(conf);
    settings.check();
    if (settings.endpoint() != null) {
      log.info("the sidecars are at {}; the plugin starts none", settings.endpoint());
    } else if (!settings.isSet("memory") && Shares.warning(conf) != null) {
      log.warn(Shares.warning(conf));
    }
    String python = System.getenv("PYSPARK_PYTHON");
    return python == null ? Collections.emptyMap() : Collections.singletonMap(PYTHON, python);
  }

  @Override
  public void registerMetrics(String applicationId, PluginContext context) {
    Figures.register(context.metricRegistry(), this::sum);
  }

  /** Takes an executor's report. */
  @Override
  public Object receive(Object message) {
    @SuppressWarnings("unchecked") // as ExecutorSide sends it
    Map<String, String> report = (Map<String, String>) message;
    String id = report.get("executor");
    String reason = report.get("reason");
    Executor last;
    synchronized (this) {
      last = executors.put(id, new Executor(Figures.of(report), reason));
    }
    if (reason != null && (last == null || !reason.equals(last.reason))) {
      log.warn("executor {} on {} has no sidecar: {}", id, report.get("host"), reason);
    } else if (reason == null && last != null && last.reason != null) {
      log.warn("executor {} on {} has a sidecar again", id, report.get("host"));
    }
    return null;
  }

  /** Returns the sum over all executors, with the counts of those that have ended, since a counter must not fall. */
  private synchronized Figures sum() {
    long now = System.nanoTime();
    Figures sum = Figures.NONE;
    for (Executor executor : executors.values()) {
      boolean gone = now - executor.time > GONE_NANOS;
      sum = sum.plus(gone ? executor.figures.totals() : executor.figures);
    }
    return sum;
  }
}
