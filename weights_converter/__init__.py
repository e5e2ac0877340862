"""Weights between PyTorch and Flax, and the oracle that proves them equal."""
