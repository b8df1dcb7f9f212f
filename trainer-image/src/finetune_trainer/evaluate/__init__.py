"""Evaluation on held-out sets: losses and generated text (``measure``), and the metrics computed
from them as published papers define them (``scores``)."""
