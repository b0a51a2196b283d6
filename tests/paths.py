"""Where the checkout's own files are, for tests that read them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DS_CONFIGS = ROOT / "ds_configs"
RECIPES = ROOT / "recipes"
