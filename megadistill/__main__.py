"""`python -m megadistill`: what every launcher starts. It knows the command line only."""

from megadistill.cli import entry

if __name__ == "__main__":
    entry()
