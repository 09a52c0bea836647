package io.flightsvc.spark;

import com.codahale.metrics.Counter;
import com.codahale.metrics.Gauge;
import com.codahale.metrics.MetricRegistry;
import java.util.Map;
import java.util.function.Supplier;

/** One value for each {@link Figure}, of one sidecar or the sums of several; immutable. */
final class Figures {
  /** The figures where no sidecar runs: all are 0. */
  static final Figures NONE = new Figures(new double[Figure.values().length]);

  private final double[] values; // a double counts exactly to 2^53

  private Figures(double[] values) {
    this.values = values;
  }

  /** Returns the figures in a report; a missing one is 0. */
  static Figures of(Map<String, String> report) {
    double[] values = new double[NONE.values.length];
    for (Figure figure : Figure.values()) {
      values[figure.ordinal()] = Double.parseDouble(report.getOrDefault(figure.field, "0"));
    }
    return new Figures(values);
  }

  /** Writes the figures into a report, for {@link #of}. */
  void put(Map<String, String> report) {
    for (Figure figure : Figure.values()) {
      report.put(figure.field, Double.toString(get(figure)));
    }
  }

  double get(Figure figure) {
    return values[figure.ordinal()];
  }

  /** Returns a copy with another value of one figure. */
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

  /** Returns a copy for when the sidecar has ended: figures that can fall are 0. */
  Figures totals() {
    double[] kept = values.clone();
    for (Figure figure : Figure.values()) {
      if (figure.kind == Figure.Kind.NOW) {
        kept[figure.ordinal()] = 0;
      }
    }
    return new Figures(kept);
  }

  /** Registers metrics whose values {@code source} returns whenever they are read. */
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
