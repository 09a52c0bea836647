"""The client side of a front: finding or starting one, streams of record batches, pushing models."""
