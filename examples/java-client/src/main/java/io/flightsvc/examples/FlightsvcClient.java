package io.flightsvc.examples;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.grpc.ManagedChannel;
import io.grpc.netty.NettyChannelBuilder;
import io.netty.channel.EventLoopGroup;
import io.netty.channel.MultiThreadIoEventLoopGroup;
import io.netty.channel.nio.NioIoHandler;
import io.netty.channel.socket.nio.NioDomainSocketChannel;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.net.URI;
import java.net.UnixDomainSocketAddress;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.logging.Level;
import java.util.logging.Logger;
import org.apache.arrow.flight.Action;
import org.apache.arrow.flight.ActionType;
import org.apache.arrow.flight.ErrorFlightMetadata;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.flight.FlightEndpoint;
import org.apache.arrow.flight.FlightGrpcUtils;
import org.apache.arrow.flight.FlightInfo;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.FlightStatusCode;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.ipc.ArrowStreamReader;
import org.apache.arrow.vector.ipc.ArrowStreamWriter;

/**
 * Sends the record batches of an Arrow IPC stream file through a model and writes the answers to another file. It
 * follows docs/protocol.md: GetSchema, GetFlightInfo, then DoExchange at the returned location or, if the client cannot
 * connect there, through the front. A stream that breaks later is not resumed.
 *
 * <pre>java -jar flightsvc-java-client.jar ADDRESS DESCRIPTOR QUESTIONS [ANSWERS]</pre>
 *
 * ADDRESS is that of the front, grpc+unix:///path. DESCRIPTOR is a JSON object, or only a model's name or URI.
 */
public final class FlightsvcClient implements AutoCloseable {
  private static final ObjectMapper JSON = new ObjectMapper();
  private static final int WINDOW = 4; // the most record batches that are sent and not answered
  private static final long PATIENCE_MS = 120_000; // how long an unavailable server is retried
  private static final int MESSAGE_BYTES = 257 << 20; // the largest message that a server sends
  private static final Logger NETTY = Logger.getLogger("io.netty.bootstrap"); // a strong reference keeps its level
  private static final int END = -1; // instead of a number of rows: there are no more record batches

  private final EventLoopGroup loop = new MultiThreadIoEventLoopGroup(1, NioIoHandler.newFactory());
  private final BufferAllocator memory;
  private final FlightClient front;
  private FlightClient runner; // null: the data goes through the front

  private FlightsvcClient(BufferAllocator memory, String address) {
    this.memory = memory;
    this.front = connect(address);
  }

  public static void main(String[] args) throws Exception {
    if (args.length < 3 || args.length > 4) {
      System.err.println("usage: java -jar flightsvc-java-client.jar ADDRESS DESCRIPTOR QUESTIONS [ANSWERS]");
      System.exit(2);
    }
    NETTY.setLevel(Level.SEVERE); // gRPC sets TCP's keep-alive, which a Unix socket lacks
    JsonNode descriptor =
        args[1].startsWith("{") ? JSON.readTree(args[1]) : JSON.createObjectNode().put("v", 1).put("model", args[1]);
    try (BufferAllocator memory = new RootAllocator();
        FlightsvcClient client = new FlightsvcClient(memory, args[0]);
        ArrowStreamReader questions = new ArrowStreamReader(new FileInputStream(args[2]), memory)) {
      client.describe((ObjectNode) descriptor);
      client.exchange((ObjectNode) descriptor, questions, args.length == 4 ? args[3] : "/dev/null");
    } catch (FlightRuntimeException e) { // the code says whether trying again helps
      System.err.println(e.status().code() + ": " + e.status().description());
      System.exit(1);
    }
  }

  /** Prints the server's actions, and the schema of the answer; loads no model. */
  private void describe(ObjectNode descriptor) throws IOException {
    for (ActionType action : front.listActions()) {
      System.out.println("action " + action.getType() + ": " + action.getDescription());
    }
    var status = front.doAction(new Action("status", JSON.writeValueAsBytes(JSON.createObjectNode())));
    System.out.println("server " + JSON.readTree(status.next().getBody()).get("flightsvc").asText());
    System.out.println("answer " + front.getSchema(command(descriptor)).getSchema());
  }

  /** Streams all record batches, checks that each is answered row by row, and prints a line for each. */
  private void exchange(ObjectNode descriptor, ArrowStreamReader questions, String answers) throws Exception {
    VectorSchemaRoot question = questions.getVectorSchemaRoot();
    BlockingQueue<Integer> sent = new ArrayBlockingQueue<>(WINDOW); // rows of each unanswered record batch
    try (FlightClient.ExchangeReaderWriter stream = open(descriptor, question)) {
      FlightStream reader = stream.getReader();
      // Two threads, since a client that writes large record batches without reading blocks on flow control.
      Thread writer = new Thread(() -> write(questions, stream, sent), "writer");
      writer.start();
      System.out.println("stream open " + (runner != null ? "at the runner" : "through the front"));
      System.out.printf("%6s %8s %6s %8s %10s  %s%n", "batch", "rows", "parts", "tf_rows", "run_us", "server");
      String server = "";
      try (ArrowStreamWriter out =
          new ArrowStreamWriter(reader.getRoot(), reader.getDictionaryProvider(), new FileOutputStream(answers))) {
        int batch = 0;
        for (int rows = sent.take(); rows != END; rows = sent.take(), batch++) {
          int answered = 0, parts = 0;
          JsonNode about;
          do { // a large answer comes in several record batches
            check(reader.next(), "the stream ended without an answer to record batch %d", batch);
            about = appMetadata(reader);
            int number = about.get("batch").asInt();
            check(number == batch, "record batch %d was answered, not %d", number, batch);
            answered += reader.getRoot().getRowCount();
            parts++;
            out.writeBatch();
            server = about.path("server").asText(server); // in the first answer only
          } while (!about.get("last").asBoolean());
          check(answered == rows, "%d rows were answered with %d", rows, answered);
          System.out.printf(
              "%6d %8d %6d %8d %10d  %s%n",
              batch, rows, parts, about.get("tf_rows").asInt(), about.get("run_us").asLong(), server);
        }
        check(!reader.next(), "there is an answer that nobody asked for");
      } catch (Exception e) {
        reader.cancel("the client gave up", e); // also ends a blocked write
        throw e;
      } finally {
        writer.interrupt();
        writer.join();
      }
    }
  }

  /** Writes all record batches; {@code sent} gets the rows of each before it is written, and END after the last. */
  private static void write(
      ArrowStreamReader questions, FlightClient.ExchangeReaderWriter stream, BlockingQueue<Integer> sent) {
    try {
      while (questions.loadNextBatch()) {
        sent.put(questions.getVectorSchemaRoot().getRowCount()); // blocks while the window is full
        stream.getWriter().putNext();
      }
      stream.getWriter().completed(); // half-close
      sent.put(END);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt(); // the reader has ended the stream
    } catch (IOException e) {
      System.err.println("the questions cannot be read: " + e.getMessage());
      stream.getWriter().error(e); // ends the stream
      sent.offer(END); // not added if full; then the reader learns of the error with the next answer
    } catch (RuntimeException e) {
      sent.offer(END); // the stream has ended; the reader gets the reason
    }
  }

  /** Opens a stream, and waits for the schema of its answer. Tries again while the server is unavailable. */
  private FlightClient.ExchangeReaderWriter open(ObjectNode descriptor, VectorSchemaRoot question) throws Exception {
    long end = System.currentTimeMillis() + PATIENCE_MS;
    for (long pause = 50; ; pause = Math.min(2 * pause, 5_000)) {
      boolean redirected = false;
      try {
        FlightInfo info = front.getInfo(command(descriptor));
        FlightEndpoint endpoint = info.getEndpoints().get(0);
        redirected = !endpoint.getLocations().isEmpty();
        close(runner);
        runner = redirected ? connect(endpoint.getLocations().get(0).getUri().toString()) : null;
        byte[] ticket = endpoint.getTicket().getBytes(); // sent back unchanged
        FlightClient.ExchangeReaderWriter stream =
            (redirected ? runner : front).doExchange(FlightDescriptor.command(ticket));
        stream.getWriter().start(question);
        stream.getReader().getSchema();
        return stream;
      } catch (FlightRuntimeException e) {
        if (e.status().code() != FlightStatusCode.UNAVAILABLE || System.currentTimeMillis() + pause > end) {
          throw e;
        }
        // If we cannot connect to the runner, the front can still relay the stream.
        descriptor.put("redirect", !redirected);
        ErrorFlightMetadata trailer = e.status().metadata();
        String after = trailer != null && trailer.containsKey("retry-after-ms") ? trailer.get("retry-after-ms") : "0";
        Thread.sleep(Math.max(pause, Long.parseLong(after)));
      }
    }
  }

  /** Connects to grpc+unix:///path; Arrow's own FlightClient.builder takes such an address, but fails with it. */
  private FlightClient connect(String address) {
    ManagedChannel channel =
        NettyChannelBuilder.forAddress(UnixDomainSocketAddress.of(URI.create(address).getPath()))
            .channelType(NioDomainSocketChannel.class)
            .eventLoopGroup(loop)
            .overrideAuthority("localhost")
            .usePlaintext()
            .maxInboundMessageSize(MESSAGE_BYTES)
            .build();
    return FlightGrpcUtils.createFlightClient(memory, channel);
  }

  private static FlightDescriptor command(JsonNode descriptor) throws IOException {
    return FlightDescriptor.command(JSON.writeValueAsBytes(descriptor));
  }

  private static JsonNode appMetadata(FlightStream reader) throws IOException {
    ArrowBuf data = reader.getLatestMetadata();
    byte[] bytes = new byte[(int) data.readableBytes()];
    data.getBytes(data.readerIndex(), bytes);
    return JSON.readTree(bytes);
  }

  private static void check(boolean holds, String format, Object... args) {
    if (!holds) {
      throw new IllegalStateException(String.format(format, args));
    }
  }

  private static void close(AutoCloseable client) throws Exception {
    if (client != null) {
      client.close();
    }
  }

  @Override
  public void close() throws Exception {
    close(runner);
    front.close();
    loop.shutdownGracefully(0, 1, TimeUnit.SECONDS);
  }
}
