"""Models in Spark: checks on the driver, and the functions that run in the workers."""
