package io.flightsvc.spark;

import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Executors;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import org.apache.spark.SparkConf;
import org.apache.spark.SparkEnv;
import org.apache.spark.api.plugin.ExecutorPlugin;
import org.apache.spark.api.plugin.PluginContext;
import org.apache.spark.resource.ResourceInformation;
import org.apache.spark.storage.BlockManagerId;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * The plugin in an executor: runs the executor's sidecar, and reports to the driver.
 *
 * <p>If no sidecar starts, the executor continues without one, and its workers start one as they do without this
 * plugin. An exception in {@link #init} would end the executor, and Spark would start executors again and again; it is
 * thrown only if failOnStart is set.
 */
final class ExecutorSide implements ExecutorPlugin {
  private static final Logger log = LoggerFactory.getLogger(FlightsvcPlugin.class);

  /** The file with the sidecar's address, for the workers, in the executor's first local folder. */
  static final String ENDPOINT_FILE = "flightsvc.endpoint";

  /** The seconds between reports to the driver, besides those at each start and end of a front. */
  static final long REPORT_SECONDS = 5;

  private PluginContext context;
  private Sidecar sidecar;
  private ScheduledExecutorService clock;

  @Override
  public void init(PluginContext context, Map<String, String> fromDriver) {
    long began = System.nanoTime();
    this.context = context;
    Settings settings = new Settings(context.conf());
    String endpoint = settings.endpoint();
    if (endpoint != null) {
      log.info("this executor uses the sidecar at {}; the plugin starts none", endpoint);
      return;
    }
    String reason;
    try {
      clock =
          Executors.newSingleThreadScheduledExecutor(
              task -> {
                Thread thread = new Thread(task, "flightsvc-reports");
                thread.setDaemon(true);
                return thread;
              });
      Path local = SparkEnv.get().blockManager().diskBlockManager().localDirs()[0].toPath();
      sidecar =
          new Sidecar(
              () -> command(settings, fromDriver), local.resolve(ENDPOINT_FILE), clock, this::reportSoon);
      sidecar.start();
      if (!context.executorID().equals("driver")) { // in local mode DriverSide registers the metrics
        Figures.register(context.metricRegistry(), sidecar::figures);
      }
      clock.scheduleWithFixedDelay(this::report, REPORT_SECONDS, REPORT_SECONDS, TimeUnit.SECONDS);
      reason = sidecar.reason();
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
      reason = "interrupted";
    } catch (Exception e) {
      reason = e.toString();
      log.warn("no sidecar", e);
    }
    long millis = TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - began);
    if (reason == null) {
      log.info("sidecar of executor {} at {}: init took {} ms", context.executorID(), sidecar.endpoint(), millis);
    } else if (settings.failOnStart()) {
      tell(context::ask); // ask waits, so that the report arrives before this executor ends
      shutdown();
      throw new IllegalStateException("no sidecar, and spark.flightsvc.failOnStart is set: " + reason);
    }
  }

  @Override
  public void shutdown() {
    if (sidecar != null) {
      try {
        sidecar.close();
      } catch (InterruptedException e) {
        Thread.currentThread().interrupt();
      }
    }
    if (clock != null) {
      clock.shutdownNow();
    }
  }

  private List<String> command(Settings settings, Map<String, String> fromDriver) throws Exception {
    SparkConf conf = context.conf();
    String python = settings.get("python", System.getenv("FLIGHTSVC_PYTHON"));
    if (python == null) {
      python = conf.get("spark.pyspark.python", fromDriver.get(DriverSide.PYTHON));
    }
    if (python == null) {
      python = System.getenv("PYSPARK_PYTHON");
    }
    List<String> command = new ArrayList<>();
    command.add(Program.find(settings, python == null ? "python3" : python).getPath());
    command.add("serve");
    command.add("--child");
    command.add("--executor=" + context.executorID());
    command.addAll(settings.flags());
    if (!settings.isSet("python") && python != null) {
      command.add("--python=" + python);
    }
    int cores = Shares.cores(conf, System.getProperty("sun.java.command", ""));
    if (!settings.isSet("cores") && cores > 0) {
      command.add("--cores=" + cores);
    }
    long memory = Shares.memory(conf);
    if (!settings.isSet("memory") && memory > 0) {
      command.add("--memory=" + memory);
    }
    ResourceInformation gpus = context.resources().get("gpu");
    if (gpus != null) {
      command.add("--gpus=" + String.join(",", gpus.addresses()));
    }
    return command;
  }

  /** Sends a report from the clock's thread. */
  private void reportSoon() {
    try {
      clock.execute(this::report);
    } catch (RejectedExecutionException e) {
      log.debug("this executor ends", e);
    }
  }

  private void report() {
    tell(context::send);
  }

  /** How a report is sent: with an answer ({@code ask}) or without ({@code send}). */
  private interface Channel {
    void send(Object message) throws Exception;
  }

  /** Sends a report to the driver as a map of strings, since the driver's class loader may not have our classes. */
  private void tell(Channel channel) {
    try {
      HashMap<String, String> message = new HashMap<>();
      message.put("executor", context.executorID());
      BlockManagerId id = SparkEnv.get().blockManager().blockManagerId(); // null while a driver starts
      message.put("host", id == null ? context.hostname() : id.host()); // hostname() fails in an executor
      message.put("reason", sidecar == null ? "it cannot be started; see the executor's log" : sidecar.reason());
      (sidecar == null ? Figures.NONE : sidecar.figures()).put(message);
      channel.send(message);
    } catch (Exception e) {
      log.debug("the driver was not told", e); // the next report will tell it
    }
  }
}
