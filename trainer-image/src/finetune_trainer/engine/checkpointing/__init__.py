"""The state of a training, out of the processes of a gang and into those of another."""
