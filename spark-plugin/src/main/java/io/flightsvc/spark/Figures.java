package io.flightsvc.spark;

import com.codahale.metrics.Counter;
import com.codahale.metrics.Gauge;
import com.codahale.metrics.MetricRegistry;
import java.util.Map;
import java.util.function.Supplier;

/** One value for each {@link Figure}, of a sidecar or summed over many; immutable. */
final class Figures {
  /** No sidecar. */
  static final Figures NONE = new Figures(new double[Figure.values().length]);

  private final double[] values; // a double counts exactly to 2^53

  private Figures(double[] values) {
    this.values = values;
  }

  /** Returns what a report says; a figure that it does not have is 0. */
  static Figures of(Map<String, String> report) {
    double[] values = new double[NONE.values.length];
    for (Figure figure : Figure.values()) {
      values[figure.ordinal()] = Double.parseDouble(report.getOrDefault(figure.field, "0"));
    }
    return new Figures(values);
  }

  /** Adds to a report what {@link #of} reads there. */
  void put(Map<String, String> report) {
    for (Figure figure : Figure.values()) {
      report.put(figure.field, Double.toString(get(figure)));
    }
  }

  double get(Figure figure) {
    return values[figure.ordinal()];
  }

  /** Returns these with one figure of another value. */
  Figures with(Figure figure, double value) {
    double[] changed = values.clone();
    changed[figure.ordinal()] = value;
    return new Figures(changed);
  }

  Figures plus(Figures other) {
    double[] sum = values.clone();
    for (int i = 0; i < sum.length; i++) {
      sum[i] += other.values[i];
    }
    return new Figures(sum);
  }

  /** Returns what remains when the sidecar has gone: all that grows for ever. */
  Figures totals() {
    double[] kept = values.clone();
    for (Figure figure : Figure.values()) {
      if (figure.kind == Figure.Kind.NOW) {
        kept[figure.ordinal()] = 0;
      }
    }
    return new Figures(kept);
  }

  /** Makes metrics of the figures that {@code source} returns whenever somebody reads them. */
  static void register(MetricRegistry registry, Supplier<Figures> source) {
    for (Figure figure : Figure.values()) {
      if (figure.kind == Figure.Kind.COUNT) {
        registry.register(
            figure.metric,
            new Counter() {
              @Override
              public long getCount() {
                return (long) source.get().get(figure);
              }
            });
      } else if (figure.kind == Figure.Kind.SECONDS) {
        registry.register(figure.metric, (Gauge<Double>) () -> source.get().get(figure));
      } else {
        registry.register(figure.metric, (Gauge<Long>) () -> (long) source.get().get(figure));
      }
    }
  }
}
