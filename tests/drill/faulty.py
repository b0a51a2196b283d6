"""`python -m tests.drill.faulty ARGUMENTS` is `megadistill ARGUMENTS` with faults: the words of DRILL_FAULTS."""

import os

from megadistill.cli.main import main
from tests.drill.faults import inject

if __name__ == "__main__":
    inject(os.environ["DRILL_FAULTS"].split())
    main()
