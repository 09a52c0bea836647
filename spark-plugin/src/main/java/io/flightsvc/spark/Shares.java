package io.flightsvc.spark;

import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.apache.spark.SparkConf;

/** The executor's share of its host's cores and memory, which its sidecar may use. */
final class Shares {
  private static final Pattern LOCAL = Pattern.compile("local\\[([0-9]+|\\*)(?:, *[0-9]+)?]");
  private static final Pattern CORES = Pattern.compile(" --cores ([0-9]+)");
  private static final long MIB = 1L << 20;
  private static final long SMALL = 512 * MIB;

  private Shares() {}

  /**
   * Returns the executor's cores, or 0 if unknown.
   *
   * @param command the command line of this JVM, {@code sun.java.command}: Spark starts an executor with its number of
   *     cores there, also when a resource profile or the size of the worker decides it
   */
  static int cores(SparkConf conf, String command) {
    Matcher given = CORES.matcher(command);
    if (command.contains("ExecutorBackend") && given.find()) {
      return Integer.parseInt(given.group(1));
    }
    String master = conf.get("spark.master", "");
    Matcher local = LOCAL.matcher(master);
    if (local.matches()) {
      String number = local.group(1);
      return number.equals("*") ? Runtime.getRuntime().availableProcessors() : Integer.parseInt(number);
    }
    return master.equals("local") ? 1 : conf.getInt("spark.executor.cores", 0);
  }

  /**
   * Returns the bytes that models may take in the executor's container, or 0 if the executor is in none: half of the
   * memory that Spark requests besides the heap. The other half is for the JVM and the Python workers.
   */
  static long memory(SparkConf conf) {
    return overhead(conf) / 2;
  }

  /** Returns a warning if {@link #memory} is small, else null. */
  static String warning(SparkConf conf) {
    long overhead = overhead(conf);
    if (overhead == 0 || overhead / 2 >= SMALL) {
      return null;
    }
    return "models have " + overhead / 2 / MIB + " MiB beside each executor, half of its memory overhead of "
        + overhead / MIB + " MiB; that is little. To give them 1 GiB: spark.executor.memoryOverhead=2g";
  }

  /** Returns the memory overhead in bytes as YARN and Kubernetes compute it, or 0 on another cluster. */
  private static long overhead(SparkConf conf) {
    String master = conf.get("spark.master", "");
    boolean kubernetes = master.startsWith("k8s");
    if (!kubernetes && !master.startsWith("yarn")) {
      return 0;
    }
    if (conf.contains("spark.executor.memoryOverhead")) {
      return conf.getSizeAsMb("spark.executor.memoryOverhead") * MIB;
    }
    double part = conf.getDouble("spark.executor.memoryOverheadFactor", 0.1);
    if (kubernetes && !conf.contains("spark.executor.memoryOverheadFactor")) {
      part = conf.getDouble("spark.kubernetes.memoryOverheadFactor", 0.1);
    }
    long least = conf.getSizeAsMb("spark.executor.minMemoryOverhead", "384m");
    return Math.max(least, (long) (part * conf.getSizeAsMb("spark.executor.memory", "1g"))) * MIB;
  }
}
