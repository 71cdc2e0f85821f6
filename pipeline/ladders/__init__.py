"""Small trainings that forecast a larger one: a law, its forecast on record, the outcome."""
