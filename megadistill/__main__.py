"""`python -m megadistill` and `torchrun -m megadistill`: the command line."""

from megadistill.cli.main import main

if __name__ == "__main__":
    main()
