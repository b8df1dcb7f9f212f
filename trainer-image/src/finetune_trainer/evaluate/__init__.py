"""What a model scores: losses and generated text over the held-out sets (``measure``), by the
metrics that papers quote (``scores``)."""
