"""Who takes part in a run whose ranks come and go."""
