package io.flightsvc.spark;

import org.apache.spark.api.plugin.DriverPlugin;
import org.apache.spark.api.plugin.ExecutorPlugin;
import org.apache.spark.api.plugin.SparkPlugin;

/**
 * Gives each executor a sidecar: {@code spark.plugins=io.flightsvc.spark.FlightsvcPlugin}.
 *
 * <p>{@link ExecutorSide} starts and ends the program {@code flightsvc}; {@link DriverSide} checks the settings, warns
 * of sidecars that did not start, and sums up their metrics. Models and data pass through neither.
 */
public final class FlightsvcPlugin implements SparkPlugin {
  @Override
  public DriverPlugin driverPlugin() {
    return new DriverSide();
  }

  @Override
  public ExecutorPlugin executorPlugin() {
    return new ExecutorSide();
  }
}
