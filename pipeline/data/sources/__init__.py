"""Where documents come from, a file a source."""
