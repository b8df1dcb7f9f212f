"""What of a model is trained, by spec.method, and what holds it near to what it was."""
