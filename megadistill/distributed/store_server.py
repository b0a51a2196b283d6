"""`python -m megadistill.distributed.store_server --port P`: the store in which replicas of a run meet.

A process of its own, outside of all replicas, so that the loss of any of them leaves it. It holds some kilobytes, and
ends by a signal, with the exit code of a shell (143 for SIGTERM): to a scheduler, 0 would be a Job that is complete,
which nobody starts again. Whoever can reach the port can read and write it, as torch's own store on rank 0.
"""

import argparse
import signal
import sys
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from megadistill.distributed.launch import raise_open_files


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megadistill.distributed.store_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port to listen at; 0: a free one, which is printed")
    port = parser.parse_args().port
    if not 0 <= port < 1 << 16:
        parser.error(f"--port is {port}: give one from 1 to 65535, or 0")
    raise_open_files()
    try:
        store = TCPStore("0.0.0.0", port, None, True, timedelta(minutes=1), False)
    except RuntimeError as error:
        sys.exit(f"store: port {port} cannot be listened at: {str(error).splitlines()[0]}")
    print(f"store: listening at port {store.port}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(each) is not signal.SIG_IGN:  # a batch script has it outlive the ranks, which save first
            signal.signal(each, lambda number, _: sys.exit(128 + number))
    main()
