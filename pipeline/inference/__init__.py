"""A finished model at work: sampling and evaluation."""
