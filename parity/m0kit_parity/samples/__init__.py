"""Checkpoints and adapters that tests and benchmarks are made with."""
