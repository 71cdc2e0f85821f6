"""What ails a run: the forecast before it, the doctor after it, a look inside a step."""
