"""What one rank of `tests.benchmarks.frameworks` runs: recipes, and the loops that they are compared with."""
