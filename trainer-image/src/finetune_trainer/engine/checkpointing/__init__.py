"""Save and load the training state; the world size may differ between the two."""
