package io.flightsvc.spark;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import org.apache.spark.SparkConf;
import scala.Tuple2;

/** The settings {@code spark.flightsvc.*} of an application; docs/settings.md describes them. */
final class Settings {
  private static final String PREFIX = "spark.flightsvc.";

  /** Settings that are passed to a front as flags: {@code modelRoot} as {@code --model-root}. */
  private static final List<String> FRONT =
      Arrays.asList(
          "modelRoot", "pollInterval", "cacheDir", "cacheSize", "opLibraries", "libtensorflow", "python", "runDir",
          "idleTimeout", "cores", "memory", "keepAlive", "allowCpuFallback", "tune", "maxImagePixels",
          "maxImageBytes", "logLevel", "loadTimeout", "drainTimeout");

  /** Settings that only the plugin or the Python package uses. */
  private static final List<String> OTHERS = Arrays.asList("endpoint", "binary", "retryTimeout", "failOnStart");

  private final SparkConf conf;

  Settings(SparkConf conf) {
    this.conf = conf;
  }

  /**
   * Checks the names of all settings; the front checks their values.
   *
   * @throws IllegalArgumentException there is no such setting, or failOnStart is neither true nor false
   */
  void check() {
    List<String> known = new ArrayList<>(FRONT);
    known.addAll(OTHERS);
    for (Tuple2<String, String> entry : conf.getAll()) {
      String key = entry._1();
      if (key.startsWith(PREFIX) && !known.contains(key.substring(PREFIX.length()))) {
        throw new IllegalArgumentException(
            "there is no setting " + key + "; did you mean " + PREFIX + nearest(key.substring(PREFIX.length()), known)
                + "? Correct it, or take it out of the configuration");
      }
    }
    String fail = get("failOnStart", "false");
    if (!fail.equals("true") && !fail.equals("false")) {
      throw new IllegalArgumentException(PREFIX + "failOnStart is \"" + fail + "\"; want true or false");
    }
  }

  /** Returns a setting, or {@code otherwise} if it is absent or empty. */
  String get(String name, String otherwise) {
    String value = conf.get(PREFIX + name, "");
    return value.isEmpty() ? otherwise : value;
  }

  boolean failOnStart() {
    return get("failOnStart", "false").equals("true");
  }

  /** Returns the address of a sidecar that the plugin does not run, from the conf or the environment, or null. */
  String endpoint() {
    String variable = System.getenv("FLIGHTSVC_ENDPOINT");
    return get("endpoint", variable == null || variable.isEmpty() ? null : variable);
  }

  /** Returns the settings as flags of the front. */
  List<String> flags() {
    List<String> flags = new ArrayList<>();
    for (String name : FRONT) {
      String value = get(name, null);
      if (value != null) {
        flags.add("--" + name.replaceAll("([A-Z])", "-$1").toLowerCase(Locale.ROOT) + "=" + value);
      }
    }
    return flags;
  }

  /** Tells whether a setting is set, in the conf or in the environment, where the front reads it itself. */
  boolean isSet(String name) {
    String variable = "FLIGHTSVC_" + name.replaceAll("([A-Z])", "_$1").toUpperCase(Locale.ROOT);
    return get(name, null) != null || System.getenv(variable) != null;
  }

  private static String nearest(String name, List<String> known) {
    String nearest = known.get(0);
    for (String other : known) {
      if (distance(name, other) < distance(name, nearest)) {
        nearest = other;
      }
    }
    return nearest;
  }

  /** Returns the edit distance (Levenshtein) of two words. */
  private static int distance(String a, String b) {
    int[] row = new int[b.length() + 1];
    for (int j = 0; j <= b.length(); j++) {
      row[j] = j;
    }
    for (int i = 1; i <= a.length(); i++) {
      int diagonal = row[0];
      row[0] = i;
      for (int j = 1; j <= b.length(); j++) {
        boolean same = Character.toLowerCase(a.charAt(i - 1)) == Character.toLowerCase(b.charAt(j - 1));
        int changed = diagonal + (same ? 0 : 1);
        diagonal = row[j];
        row[j] = Math.min(changed, 1 + Math.min(row[j], row[j - 1]));
      }
    }
    return row[b.length()];
  }
}
