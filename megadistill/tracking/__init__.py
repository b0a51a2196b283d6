"""Trackers of other people (Weights & Biases, MLflow): a process that follows the records of a run and sends them on.

The run's own files are the queue: a tracker that is slow, fails or hangs holds nothing up, and resumes where it
stopped. The run only starts the process, and ends it.
"""
