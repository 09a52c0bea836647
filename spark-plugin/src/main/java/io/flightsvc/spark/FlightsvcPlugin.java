package io.flightsvc.spark;

import org.apache.spark.api.plugin.DriverPlugin;
import org.apache.spark.api.plugin.ExecutorPlugin;
import org.apache.spark.api.plugin.SparkPlugin;

/**
 * Gives each executor a sidecar: {@code spark.plugins=io.flightsvc.spark.FlightsvcPlugin}.
 *
 * <p>The executor's side starts and ends the program {@code flightsvc}; the driver's side checks the settings, says
 * which sidecars did not start, and has the sums of their metrics. Models and data never pass through either.
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
