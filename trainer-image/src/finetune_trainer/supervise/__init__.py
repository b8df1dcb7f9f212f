"""Main process of a training pod: starts the workers through torchrun and reports how they ended."""
