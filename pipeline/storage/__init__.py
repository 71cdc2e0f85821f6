"""Bytes on disk, whole or not there: folders, tensors, DVC's cache."""
