"""Small trainings that tell of larger ones: a law and its forecast, a rate that transfers."""
