"""What people ask of the project: a function for each verb of `python -m pipeline`."""
