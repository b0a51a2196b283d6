"""The command line: `main` parses and exits; each group of commands has a module of its own."""
