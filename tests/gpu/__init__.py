"""Checks of the package on one NVIDIA GPU: `make gpu`, or `python -m tests.gpu --help`.

`__main__`, `runner`, `checks`, `results`, `page` and `wheels` need Python's standard library alone, since they install
the rest. A check is a module here, NAME.py, with `run(device: Device, record: Record) -> None` (device.py, results.py),
and an entry of `checks.CHECKS` with its question, its time limit and the bars of its figures. It is a process of its
own: an exception is its failure, `NotMeasurable` says why there is no answer here. It runs to its end with the stand-in
device too (`device.stand_in`), a CPU and tiny sizes, through the same lines.
"""
