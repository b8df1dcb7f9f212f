"""Which samples are trained in which step, row and process, and at what rate: pure functions of the
spec, the index and the seed."""
