"""Which examples each step consumed."""
