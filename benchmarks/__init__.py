"""Measurements at the shapes of published models. See `python -m benchmarks --help`, or `make bench SHAPE=3b`."""
