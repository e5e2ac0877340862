"""Losses of one clip each; the caller averages over the real clips of a batch."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rvit_jax.shapes import Logits

# Class indices, or a target for every class: shares that sum to 1 (mixup), or 0 and 1 each for
# itself (several labels per clip).
Labels = Int[Array, "B"] | Float[Array, "B K"]
PerClip = Float[Array, "B"]


def cross_entropy(logits: Logits, label: Labels) -> PerClip:
    """`-log softmax(logits)[label]` of each clip, in nats."""
    if label.ndim == 2:
        return optax.softmax_cross_entropy(logits, label)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def smoothed_cross_entropy(logits: Logits, label: Labels, label_smoothing: float) -> PerClip:
    """Cross-entropy in nats; `label_smoothing` of the target is spread evenly over all K classes.

    The reference's `LSCE`, with 0.1.
    """
    target = label if label.ndim == 2 else jax.nn.one_hot(label, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(target, label_smoothing))


def binary_cross_entropy(logits: Logits, label: Float[Array, "B K"]) -> PerClip:
    """Each class for itself: the mean over the K classes of their binary cross-entropies, nats."""
    return optax.sigmoid_binary_cross_entropy(logits, label).mean(-1)


def make_loss(config: ConfigDict) -> Callable[[Logits, Labels], PerClip]:
    """The function of logits [B, K] and labels that `config.loss` asks for."""
    if config.name == "smoothed_cross_entropy":
        return lambda logits, label: smoothed_cross_entropy(logits, label, config.label_smoothing)
    return {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}[
        config.name
    ]
