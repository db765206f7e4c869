"""What may every test count on? No plot opens a window, and nothing is fetched from a model hub."""

from __future__ import annotations

import os

# before any test module imports torch, matplotlib or a hub client: they read these once
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
