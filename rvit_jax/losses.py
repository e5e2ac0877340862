"""Losses of one clip each; the caller averages over the real clips of a batch."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rvit_jax.shapes import Logits

Labels = Int[Array, "B"]
PerClip = Float[Array, "B"]


def cross_entropy(logits: Logits, label: Labels) -> PerClip:
    """`-log softmax(logits)[label]` of each clip, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def smoothed_cross_entropy(logits: Logits, label: Labels, label_smoothing: float) -> PerClip:
    """Cross-entropy in nats; `label_smoothing` of the target is spread evenly over all K classes.

    The reference's `LSCE`, with 0.1.
    """
    target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, target)


def make_loss(config: ConfigDict) -> Callable[[Logits, Labels], PerClip]:
    """The function of logits [B, K] and labels [B] that `config.loss` asks for."""
    if config.name == "smoothed_cross_entropy":
        return lambda logits, label: smoothed_cross_entropy(logits, label, config.label_smoothing)
    return cross_entropy
