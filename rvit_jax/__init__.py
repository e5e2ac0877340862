"""RViT, a recurrent vision transformer for video action recognition, in JAX and Flax NNX.

loaded = rvit_jax.load("results/gestures")
logits, hidden = loaded.model(loaded.preprocess(frames)[None])
"""

import importlib
from typing import TYPE_CHECKING, Any

from rvit_jax.version import __version__

if TYPE_CHECKING:
    from rvit_jax.checkpoint import LoadedModel, load
    from rvit_jax.model import RViT

__all__ = ["LoadedModel", "RViT", "__version__", "load"]

_ROOMS = {"LoadedModel": "checkpoint", "load": "checkpoint", "RViT": "model"}


def __getattr__(name: str) -> Any:
    """Imports JAX and Orbax, which take seconds, when they are first needed: `--help` is not."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
