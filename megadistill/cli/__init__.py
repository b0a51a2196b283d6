"""The front door, as a package: `front` parses and exits, and each group of verbs has a module of its own."""

from megadistill.cli.front import entry, main, parser

__all__ = ["entry", "main", "parser"]
