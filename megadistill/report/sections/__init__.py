"""Sections of the page that have figures and a table of their own."""
