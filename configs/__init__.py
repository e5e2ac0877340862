"""Experiments: one file each; `base.py` holds every key."""
