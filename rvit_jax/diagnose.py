"""Where a forward pass grows too large: for the message of a run that stops on it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from rvit_jax.model import RViT
from rvit_jax.shapes import Mask, NumFrames, Video

_PARTS = ("attention", "mlp")  # of a layer, in the order of computation


def largest_activations(
    model: RViT, video: Video, num_frames: NumFrames, mask: Mask
) -> dict[str, float]:
    """The largest absolute value of what each stage gives, over the real frames of real clips.

    Computed without dropout, frame by frame, so that it needs little memory.

    Args:
        model: in either mode; left in evaluation mode.
        video: [B, T, H, W, 3], float in [-1, 1] or uint8.
        num_frames: real frames of each clip, [B].
        mask: which clips are real, [B].

    Returns:
        Stage -> value, in the order in which they are computed: "patch_embedding", of each layer
        "attention" and "mlp", then "state" and "logits". A value that is not finite is NaN or
        infinite.
    """
    model.eval()
    graphdef, variables = nnx.split(model)
    layers = [f"layers/{index}/{part}" for index in range(len(model.layers)) for part in _PARTS]
    names = ["patch_embedding", *layers, "state", "logits"]

    def read_frame(
        variables: nnx.State[Any, Any], frame: Array, hidden: Array, active: Array
    ) -> tuple[list[Array], Array]:
        module = nnx.merge(graphdef, variables)
        module.remat = "none"  # what is captured must leave the layers
        look = nnx.capture(RViT.step, nnx.Intermediate, method_outputs=nnx.Intermediate)
        (logits, new_hidden), seen = look(module, frame, hidden)

        def largest(rows: Array, axis: int = 0) -> Array:
            rows = jnp.moveaxis(rows, axis, 0)
            return jnp.where(active.reshape(-1, *[1] * (rows.ndim - 1)), jnp.abs(rows), 0.0).max()

        parts = [_output(seen, name) for name in names[:-2]]
        return [*map(largest, parts), largest(new_hidden, axis=1), largest(logits)], new_hidden

    read_frame = jax.jit(read_frame)
    hidden, total = model.initial_hidden(video.shape[0]), np.zeros(len(names))
    for t in range(video.shape[1]):
        active = jnp.asarray(mask) & (t < jnp.asarray(num_frames))
        values, hidden = read_frame(variables, video[:, t], hidden, active)
        total = np.maximum(total, jax.device_get(values))  # NaN stays NaN
    return dict(zip(names, total.tolist(), strict=True))


def _output(captured: Any, name: str) -> Array:
    """What a module's call returned, of the captures of one pass; `name` as "layers/0/mlp"."""
    for part in name.split("/"):
        captured = captured[int(part) if part.isdigit() else part]
    (value,) = captured["__call__"].get_value()
    return value
