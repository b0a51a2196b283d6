"""Measurements that a reader can repeat. Not part of the package: `python -m benchmarks.loss --help`, from the root."""
