"""The first process of a training pod: starts the workers through torchrun, and says how they
ended."""
