"""Packing: every way in which a model becomes a pack. Needs the extra `pack` (PyTorch)."""
