"""Validation in a run: the rows, their measures, and the record of both."""
