"""Text to documents to tokens to batches."""
