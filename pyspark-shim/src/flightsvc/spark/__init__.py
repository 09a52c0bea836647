"""Record batches and columns of Spark: what is checked on the driver, and what runs in the workers."""
