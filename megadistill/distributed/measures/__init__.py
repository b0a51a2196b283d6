"""Measures of the links between ranks, for doctor."""
