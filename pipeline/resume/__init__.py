"""A training that goes on where it was stopped: run folders, checkpoints, signals."""
