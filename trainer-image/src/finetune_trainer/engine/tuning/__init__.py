"""Tuning methods (``spec.method``), and anchors that keep a model near its base model."""
