"""Reports on runs: a page with tables and plots."""
