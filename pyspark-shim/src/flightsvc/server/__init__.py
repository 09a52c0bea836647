"""Speaking to a front: which one there is, its clients, streams of record batches, models on their way."""
