"""How a clip is read: in which order its frames and the model's layers are computed.

Layer l's state after frame t depends on its own state before and on what enters the layer. So
there are two orders with the same numbers, `config.model.schedule`:

    "frames"   frame by frame through all layers: `lax.scan` of `RViT.encode_frame`. Holds one
               frame's activations, which fit a CPU's caches.
    "layers"   layer after layer over many frames: embedding, the frames' projections and the MLPs
               are a few large matrix products, and `lax.scan` over the frames runs the gate alone:
               for devices that single products are too small to fill.

Either way a clip is read in segments of at most `config.model.segment_frames` frames, so that no
memory but the video's grows with longer clips. In training what is kept for the gradient is that of
one segment, and the state before each: a longer clip's frames are computed once more.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Key

from rvit_jax.layers import DROPOUT_MASK
from rvit_jax.shapes import (
    ClassTokens,
    Hidden,
    Mask,
    NumFrames,
    OneToken,
    PRNGKey,
    Projected,
    Tokens,
    Video,
)

if TYPE_CHECKING:
    from rvit_jax.model import RViT

# What training keeps for the gradient, by `config.model.remat` other than "none"; the rest is
# computed again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(DROPOUT_MASK),
    ),
    "frames": jax.checkpoint_policies.nothing_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}

Carry = tuple[ClassTokens, Hidden]  # of the frame read last


def resolve(schedule: str) -> str:
    """ "frames" or "layers", whichever "auto" stands for: what was measured to be the faster.

    On a CPU "frames" is, by a third to a half (docs/performance.md). On accelerators "layers" has
    not been measured yet, and "frames" is ahead of PyTorch by far.
    """
    return "frames" if schedule == "auto" else schedule


def read_clip(
    model: "RViT",
    video: Video,
    hidden: Hidden,
    num_frames: NumFrames | None,
    key: PRNGKey | None,
) -> Carry:
    """The class token [B, D] and the state [L, B, S, D] after each clip's last real frame.

    Args:
        model: its `schedule`, `remat` and `segment_frames` say how.
        video: [B, T, H, W, 3], float in [-1, 1] or uint8.
        hidden: the state before the first frame, [L, B, S, D].
        num_frames: real frames of each clip [B]; None: all.
        key: for dropout; each frame's is folded from it, whatever the schedule.
    """
    total, most = video.shape[1], model.segment_frames
    counted = isinstance(total, int)  # not where a model is exported for any number of frames
    by_layers = counted and resolve(model.schedule) == "layers"
    read = _read_by_layers if by_layers else _read_by_frames

    def read_segment(carry: Carry, start: jax.Array | int, length: int) -> Carry:
        times = start + jnp.arange(length)
        return read(model, video, times, carry, num_frames, key)

    carry = (jnp.zeros((video.shape[0], hidden.shape[-1]), model.token_dtype(video)), hidden)
    if not (counted and _in_segments(model)) or total <= most:
        return read_segment(carry, 0, total)
    whole, rest = divmod(total, most)

    def body(carry: Carry, start: jax.Array) -> tuple[Carry, None]:
        return read_segment(carry, start, most), None

    if model.remat != "none":
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.nothing_saveable)
    carry, _ = jax.lax.scan(body, carry, most * jnp.arange(whole))
    return read_segment(carry, most * whole, rest) if rest else carry


def _in_segments(model: "RViT") -> bool:
    """Whether reading a long clip whole would hold more than reading a part of it."""
    if resolve(model.schedule) == "layers":
        return True
    in_training = not model.dropout.deterministic
    return in_training and model.remat != "none"


def rematerialised(model: "RViT", function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which training keeps what `model.remat` says."""
    if model.remat == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[model.remat])


def _read_by_frames(
    model: "RViT",
    video: Video,
    times: jax.Array,
    carry: Carry,
    num_frames: NumFrames | None,
    key: PRNGKey | None,
) -> Carry:
    positions = model.positions(video.shape[0])

    def read_frame(carry: Carry, t: jax.Array) -> tuple[Carry, None]:
        class_token, hidden = carry
        # Looked up in place: `scan` over the video would copy it with time first.
        frame = jax.lax.dynamic_index_in_dim(video, t, axis=1, keepdims=False)
        frame_key = None if key is None else jax.random.fold_in(key, t)
        new_token, new_hidden = model.encode_frame(frame, hidden, frame_key, positions)
        if num_frames is not None:
            active = (t < num_frames)[:, None]  # [B, 1]
            new_token = jnp.where(active, new_token, class_token)
            new_hidden = jnp.where(active[..., None], new_hidden, hidden)
        return (new_token, new_hidden), None

    carry, _ = jax.lax.scan(rematerialised(model, read_frame), carry, times)
    return carry


def _read_by_layers(
    model: "RViT",
    video: Video,
    times: jax.Array,
    carry: Carry,
    num_frames: NumFrames | None,
    key: PRNGKey | None,
) -> Carry:
    class_token, hidden = carry
    segment = jax.lax.dynamic_slice_in_dim(video, times[0], len(times), axis=1)
    keys = None
    if key is not None:
        keys = jax.vmap(lambda t: model.split_keys(jax.random.fold_in(key, t)))(times)  # 2 L of [T]
    active = None if num_frames is None else times[:, None] < num_frames  # [T, B]
    x = jax.vmap(model.embed)(jnp.moveaxis(segment, 1, 0))  # [T, B, S, D]
    new_hidden = []
    for index in range(len(model.layers)):
        layer_keys = (None, None) if keys is None else keys[2 * index : 2 * index + 2]
        x, state = _read_layer(model, index, x, hidden[index], active, layer_keys)
        new_hidden.append(state)
    tokens = x[:, :, 0]  # [T, B, D]: the last layer gave token 0 alone
    if num_frames is None:
        return tokens[-1], jnp.stack(new_hidden)
    last = num_frames - 1 - times[0]  # [B], within this segment or not
    picked = jnp.take_along_axis(tokens, jnp.clip(last, 0, len(times) - 1)[None, :, None], axis=0)
    class_token = jnp.where((last >= 0)[:, None], picked[0], class_token)
    return class_token, jnp.stack(new_hidden)


def _read_layer(
    model: "RViT",
    index: int,
    x: Float[jax.Array, "T B S D"],
    hidden: Tokens,
    active: Bool[jax.Array, "T B"] | None,
    keys: tuple[Key[jax.Array, " T"] | None, ...],
) -> tuple[Float[jax.Array, "T B _ D"], Tokens]:
    """One layer over all frames [T, B, S, D]: its output, and its state [B, S, D] after them."""
    layer = model.layers[index]
    last = index == len(model.layers) - 1
    positions = model.positions(hidden.shape[0])

    def enter(x: Tokens, key: PRNGKey | None) -> tuple[Tokens, Projected]:
        x = model.add_positions(x, positions, key)
        return x, layer.project(x)

    def gate(
        hidden: Tokens, inputs: tuple[Projected, Mask | None]
    ) -> tuple[Tokens, Tokens | OneToken]:
        z, active = inputs
        g = hidden + positions
        gate = layer.gate(z, g)
        new = model.next_state(gate, hidden, g)
        if active is not None:
            new = jnp.where(active[:, None, None], new, hidden)
        return new, gate[:, :1] if last else gate

    def leave(x: Tokens, gate: Tokens | OneToken, key: PRNGKey | None) -> Tokens | OneToken:
        return layer.leave(x[:, :1] if last else x, gate, key)

    x, z = jax.vmap(rematerialised(model, enter))(x, keys[0])
    hidden, gates = jax.lax.scan(rematerialised(model, gate), hidden, (z, active))
    return jax.vmap(rematerialised(model, leave))(x, gates, keys[1]), hidden
