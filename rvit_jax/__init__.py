"""RViT, a recurrent vision transformer for video action recognition, in JAX and Flax NNX.

loaded = rvit_jax.load("results/gestures")
logits, hidden = loaded.model(loaded.preprocess(frames)[None])
"""

from rvit_jax.checkpoint import LoadedModel, load
from rvit_jax.model import RViT
from rvit_jax.version import __version__

__all__ = ["LoadedModel", "RViT", "__version__", "load"]
