"""Two runs beside each other: what they logged, and what they saved."""
