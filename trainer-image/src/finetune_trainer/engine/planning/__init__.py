"""Samples of each step, micro-batch and rank, and the learning rate: pure functions of the spec,
the index and the seed."""
