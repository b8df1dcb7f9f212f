"""Main process of a training pod: starts the workers by torchrun and reports how they ended."""
