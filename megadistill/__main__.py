"""`python -m megadistill`: what every launcher starts. It knows the command line only."""

from megadistill.cli.main import entry

if __name__ == "__main__":
    entry()
