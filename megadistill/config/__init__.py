"""The typed recipe, how it is read, and the table of its keys."""
