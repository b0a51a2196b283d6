"""`python -m megadistill`: what every launcher starts. It knows the command line only."""

import sys

from megadistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
