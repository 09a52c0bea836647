package io.flightsvc.spark;

import java.io.BufferedReader;
import java.io.File;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.URISyntaxException;
import java.nio.charset.StandardCharsets;
import java.security.CodeSource;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;
import org.apache.spark.SparkFiles;

/** Finds the program {@code flightsvc} on this host. */
final class Program {
  private static final String NAME = "flightsvc";
  private static final long PYTHON_SECONDS = 10;

  /** Python code that prints the path of the package flightsvc, without importing it. */
  private static final String PACKAGE =
      "import importlib.util as u; s = u.find_spec('flightsvc'); print(s.origin if s and s.origin else '')";

  private Program() {}

  /**
   * Returns the first program found: the one that is set, or else one among {@code spark.files}, in an archive unpacked
   * as {@code flightsvc}, in the Python package that holds this jar, in the package of the executor's Python, on {@code
   * PATH}.
   *
   * @param python the executor's Python
   * @throws IOException there is no such program; the message says what to do
   */
  static File find(Settings settings, String python) throws IOException {
    String set = settings.get("binary", System.getenv("FLIGHTSVC_BINARY"));
    if (set != null && !set.isEmpty()) {
      File program = existing(here(set));
      if (program == null) {
        throw new IOException(
            set + " is not there (spark.flightsvc.binary or FLIGHTSVC_BINARY); give its path on the executors, or its "
                + "name among spark.files");
      }
      return executable(program);
    }
    List<File> places = here(NAME);
    places.addAll(here(NAME + "/" + NAME));
    places.addAll(here(NAME + "/bin/" + NAME));
    File jar = jar();
    if (jar != null && jar.getParentFile() != null) {
      places.add(new File(jar.getParentFile().getParentFile(), "_bin/" + NAME));
    }
    File program = existing(places);
    if (program == null) {
      places.clear();
      String origin = origin(python);
      if (!origin.isEmpty()) {
        places.add(new File(new File(origin).getParentFile(), "_bin/" + NAME));
      }
      String path = System.getenv("PATH");
      for (String folder : (path == null ? "" : path).split(File.pathSeparator)) {
        places.add(new File(folder, NAME));
      }
      program = existing(places);
    }
    if (program == null) {
      throw new IOException(
          "the program flightsvc is neither among spark.files, nor in an archive unpacked as flightsvc, nor in the "
              + "package of " + python + ", nor on PATH; install the package on the executors, or set "
              + "spark.flightsvc.binary to its path");
    }
    return executable(program);
  }

  /** Returns where a path may be: a relative one in the working folder, or in the folder of spark.files. */
  private static List<File> here(String path) {
    List<File> places = new ArrayList<>();
    places.add(new File(path).getAbsoluteFile());
    if (!new File(path).isAbsolute()) {
      places.add(new File(SparkFiles.getRootDirectory(), path).getAbsoluteFile());
    }
    return places;
  }

  private static File existing(List<File> places) {
    for (File place : places) {
      if (place.isFile()) {
        return place;
      }
    }
    return null;
  }

  private static File executable(File program) throws IOException {
    if (!program.canExecute()) {
      throw new IOException(program + " may not be run by this user; run: chmod a+x " + program);
    }
    return program;
  }

  private static File jar() {
    CodeSource source = Program.class.getProtectionDomain().getCodeSource();
    try {
      return source == null ? null : new File(source.getLocation().toURI());
    } catch (URISyntaxException | IllegalArgumentException e) {
      return null; // not loaded from a file
    }
  }

  /** Returns the path of the package flightsvc in a Python, or "" if either does not exist. */
  private static String origin(String python) {
    Process process;
    try {
      process =
          new ProcessBuilder(python, "-c", PACKAGE)
              .redirectError(new File("/dev/null"))
              .redirectInput(new File("/dev/null"))
              .start();
    } catch (IOException e) {
      return "";
    }
    try (BufferedReader said =
        new BufferedReader(new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8))) {
      if (!process.waitFor(PYTHON_SECONDS, TimeUnit.SECONDS)) { // the pipe's buffer holds the line
        return "";
      }
      String line = said.readLine();
      return line == null ? "" : line.trim();
    } catch (IOException e) {
      return "";
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
      return "";
    } finally {
      process.destroyForcibly();
    }
  }
}
