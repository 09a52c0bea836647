package io.flightsvc.spark;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.BufferedReader;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * A front as a child process of this JVM, restarted whenever it ends, until {@link #close}.
 *
 * <p>The child ends when its standard input does. Only this JVM has the other end of that pipe, so the child ends with
 * the JVM, even if that is killed. One thread, {@code flightsvc-sidecar}, starts the child and reads its reports;
 * another, {@code flightsvc-log}, copies its log.
 */
final class Sidecar {
  private static final Logger log = LoggerFactory.getLogger(FlightsvcPlugin.class);

  private static final JsonFactory JSON = new JsonFactory(); // jackson-core only, which loads quickly

  private static final long START_SECONDS = 10;
  private static final long FIRST_PAUSE = 100; // ms before the first restart; doubles with each restart
  private static final long LAST_PAUSE = 2_000; // short: the next front cleans up after a dead one within 5 s
  private static final long HEALTHY_SECONDS = 60; // a front that ran longer resets the pause to FIRST_PAUSE
  private static final long END_SECONDS = 2;

  // The variables that the child inherits, as in cmd/flightsvc/detach.go. Those that Spark sets for its own processes,
  // such as OMP_NUM_THREADS, are wrong for a server.
  private static final Set<String> KEPT =
      new HashSet<>(
          Arrays.asList(
              "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
              "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE",
              "SSL_CERT_DIR"));
  private static final List<String> KEPT_PREFIXES =
      Arrays.asList("LC_", "XDG_", "FLIGHTSVC_", "TF_", "CUDA_", "NVIDIA_", "AWS_", "GOOGLE_", "AZURE_");

  private final Callable<List<String>> command;
  private final Path endpointFile;
  private final ScheduledExecutorService clock;
  private final Runnable changed;
  private final Thread owner = new Thread(this::keep, "flightsvc-sidecar");
  private final CountDownLatch settled = new CountDownLatch(1); // the first start has succeeded or failed

  // Guarded by this.
  private boolean closed;
  private Process process; // the latest one
  private String endpoint; // of the first front; later ones serve there, too
  private String reason = "it has not started yet"; // why no front serves now; null while one does
  private Figures before = Figures.NONE; // sums of the earlier fronts
  private Figures current = Figures.NONE;

  /**
   * Makes a sidecar; {@link #start} starts it.
   *
   * @param command the command line without the endpoint; called before each start
   * @param endpointFile the file in which workers find the endpoint
   * @param clock limits the time of each start
   * @param changed called, in the sidecar's thread, after each start and each end
   */
  Sidecar(Callable<List<String>> command, Path endpointFile, ScheduledExecutorService clock, Runnable changed) {
    this.command = command;
    this.endpointFile = endpointFile;
    this.clock = clock;
    this.changed = changed;
    owner.setDaemon(true);
  }

  /** Starts the front, and returns when it serves or its start has failed. */
  void start() throws InterruptedException {
    owner.start();
    settled.await();
  }

  /** Returns why no front serves now, or null if one does. */
  synchronized String reason() {
    return reason;
  }

  synchronized String endpoint() {
    return endpoint;
  }

  /** Returns the figures of all fronts so far. */
  synchronized Figures figures() {
    return before.plus(current);
  }

  /** Ends the front, by force after {@link #END_SECONDS}, and removes the endpoint file. */
  void close() throws InterruptedException {
    Process last;
    synchronized (this) {
      closed = true;
      last = process;
    }
    owner.interrupt(); // if it pauses before a restart
    if (last != null) {
      end(last);
    }
    try {
      Files.deleteIfExists(endpointFile);
    } catch (IOException e) {
      log.info("{} stays: {}", endpointFile, e.toString());
    }
  }

  private static void end(Process process) throws InterruptedException {
    try {
      process.getOutputStream().close();
    } catch (IOException e) {
      log.debug("standard input of the sidecar", e); // the sidecar has ended already
    }
    if (!process.waitFor(END_SECONDS, TimeUnit.SECONDS)) {
      process.destroyForcibly().waitFor(END_SECONDS, TimeUnit.SECONDS);
    }
  }

  /** Runs fronts one after the other until {@link #close}. */
  private void keep() {
    long pause = FIRST_PAUSE;
    String said = null;
    try {
      while (true) {
        long began = System.nanoTime();
        String why;
        try {
          why = serve();
        } catch (InterruptedException e) {
          return;
        } catch (Exception e) { // any exception: the executor must continue
          why = e.getMessage() == null ? e.toString() : e.getMessage();
        }
        if (System.nanoTime() - began > TimeUnit.SECONDS.toNanos(HEALTHY_SECONDS)) {
          pause = FIRST_PAUSE;
          said = null;
        }
        synchronized (this) {
          if (closed) {
            return;
          }
          reason = why;
          before = before.plus(current.totals());
          current = Figures.NONE;
        }
        if (!why.equals(said)) { // the same reason is logged once
          log.warn("no sidecar: {}; it is started again, first in {} ms", why, pause);
          said = why;
        }
        settled.countDown();
        changed.run();
        Thread.sleep(pause);
        pause = Math.min(2 * pause, LAST_PAUSE);
      }
    } catch (InterruptedException e) {
      log.debug("closed");
    } finally {
      settled.countDown();
    }
  }

  /** Runs one front, and returns why it has ended. */
  private String serve() throws Exception {
    Process process = launch();
    LogCopy copy = new LogCopy(process.getErrorStream());
    copy.start();
    boolean serving = false;
    try (BufferedReader lines =
        new BufferedReader(new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8))) {
      ScheduledFuture<?> limit = clock.schedule(process::destroyForcibly, START_SECONDS, TimeUnit.SECONDS);
      String line = lines.readLine();
      boolean inTime = limit.cancel(false);
      if (line != null) {
        String where = parse(line).get("endpoint");
        if (where == null) {
          throw new IOException("flightsvc said " + line + " instead of its endpoint; is it flightsvc?");
        }
        ready(where);
        serving = true;
        while ((line = lines.readLine()) != null) {
          report(parse(line));
        }
      } else if (!inTime) {
        throw new IOException(
            "flightsvc was not ready after " + START_SECONDS + " s; its messages are in this executor's log");
      }
    } finally {
      end(process);
    }
    int code = process.exitValue();
    String how = code > 128 ? "signal " + (code - 128) : "exit code " + code;
    if (serving) {
      return "flightsvc has ended: " + how;
    }
    copy.join(TimeUnit.SECONDS.toMillis(END_SECONDS)); // a time limit, since another process may hold the pipe open
    String last = copy.last();
    return "flightsvc did not start: " + (last.isEmpty() ? how : last);
  }

  private Process launch() throws Exception {
    List<String> words = new ArrayList<>(command.call());
    synchronized (this) {
      if (endpoint != null) {
        words.add("--endpoint=" + endpoint);
      }
    }
    ProcessBuilder builder = new ProcessBuilder(words);
    builder
        .environment()
        .keySet()
        .removeIf(name -> !KEPT.contains(name) && KEPT_PREFIXES.stream().noneMatch(name::startsWith));
    synchronized (this) { // so that either close sees this process, or none is started
      if (closed) {
        throw new InterruptedException();
      }
      process = builder.start();
      return process;
    }
  }

  private void ready(String where) throws IOException {
    Path beside = endpointFile.resolveSibling(endpointFile.getFileName() + ".new");
    synchronized (this) {
      if (closed) {
        return;
      }
      Files.write(beside, where.getBytes(StandardCharsets.UTF_8));
      Files.move(beside, endpointFile, StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
      endpoint = where;
      reason = null;
      current = current.with(Figure.SIDECARS, 1);
    }
    settled.countDown();
    changed.run();
  }

  private synchronized void report(Map<String, String> line) {
    current = Figures.of(line).with(Figure.SIDECARS, 1);
  }

  /** Returns the fields of a line, which is a flat JSON object. */
  private static Map<String, String> parse(String line) throws IOException {
    Map<String, String> fields = new HashMap<>();
    try (JsonParser json = JSON.createParser(line)) {
      json.nextToken();
      while (json.nextToken() == JsonToken.FIELD_NAME) {
        String name = json.getCurrentName();
        json.nextToken();
        fields.put(name, json.getText());
      }
    }
    return fields;
  }

  /** Copies the child's log to this JVM's standard error, and keeps its last line that is not JSON. */
  private static final class LogCopy extends Thread {
    private final InputStream from;
    private volatile String last = "";

    LogCopy(InputStream from) {
      super("flightsvc-log");
      this.from = from;
      setDaemon(true);
    }

    /** Returns the last line that is not JSON: the error of a front that did not start. */
    String last() {
      return last;
    }

    @Override
    public void run() {
      try (BufferedReader lines = new BufferedReader(new InputStreamReader(from, StandardCharsets.UTF_8))) {
        String line;
        while ((line = lines.readLine()) != null) {
          System.err.println(line);
          if (!line.startsWith("{") && !line.trim().isEmpty()) {
            last = line.trim();
          }
        }
      } catch (IOException e) {
        log.debug("standard error of the sidecar", e);
      }
    }
  }
}
