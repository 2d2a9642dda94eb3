"""Public models with random weights, and what this package does with each: see benchmarks/zoo/__main__.py."""
