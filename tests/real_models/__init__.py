"""Published models as teachers. `make real-models` installs them, 330 MB; without them these tests are skipped."""
