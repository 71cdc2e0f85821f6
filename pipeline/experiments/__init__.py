"""Several experiments: swept, compared, filled into MLflow."""
