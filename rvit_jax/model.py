"""RViT: a vision transformer whose layers carry a state from frame to frame.

"Recurring the Transformer for Video Action Recognition" (CVPR 2022). For each frame and layer,
with that layer's state `hidden` [S, D] (the reference's `model/RViT.py`):

    x      = x + positions                         the same positions before every layer
    g      = hidden + positions                    and in every frame
    a      = attention_gate(LN(x), LN(g))
    hidden = a + g                                 (or a + hidden: `state_keeps_positions`)
    y      = x + a
    x      = y + MLP(LN(y))

`RViT.encode_frame` is this cell, one frame through all layers; `RViT.step` is the cell and the
read-out; `RViT.__call__` reads a clip by `jax.lax.scan`, in one of two orders (`schedule.py`).

Tokens are in `dtype`, which is that of the matrix products; the state, LayerNorms, softmax, the
sums of linear attention and the head are in float32 whatever it is (`precision.py`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from rvit_jax.attention import AttentionGate
from rvit_jax.config import check_model_config
from rvit_jax.layers import (
    MLP,
    Dropout,
    LayerNorm,
    Linear,
    UnusedParam,
    add_bias,
    in_float32,
    split_key,
    uniform_fan_in,
)
from rvit_jax.schedule import read_clip
from rvit_jax.shapes import (
    ClassTokens,
    Frame,
    Hidden,
    Logits,
    Mask,
    NumFrames,
    OneToken,
    PRNGKey,
    Projected,
    Tokens,
    Video,
)

# A compiler rewrites and fuses `(x / 255 - 0.5) / 0.5` and loses its last bit; looked up, the
# pixels are the reference's bit for bit everywhere, as fast.
_NORMALISED = (np.arange(256, dtype=np.float32) / np.float32(255) - 0.5) / np.float32(0.5)


def normalise(video: Video | Frame) -> Video | Frame:
    """uint8 [0, 255] to float32 [-1, 1], `(x / 255 - 0.5) / 0.5`; floats pass unchanged."""
    if video.dtype != jnp.uint8:
        return jnp.asarray(video)
    return jnp.take(_NORMALISED, jnp.asarray(video).astype(jnp.int32), axis=0, mode="clip")


class PatchEmbedding(nnx.Module):
    """Cuts a frame in P x P patches, row by row, and projects each: a convolution of stride P."""

    def __init__(self, patch_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        init = uniform_fan_in(3 * patch_size**2)
        self.patch_size = patch_size
        kernel_shape = (patch_size, patch_size, 3, hidden_size)
        self.kernel = nnx.Param(init(rngs.params(), kernel_shape))
        self.bias = nnx.Param(init(rngs.params(), (hidden_size,)))

    def __call__(self, frame: Frame) -> Tokens:
        """Returns [B, N, D] for a frame [B, H, W, 3] in [-1, 1]."""
        batch, height, width, channels = frame.shape
        size = self.patch_size
        patches = jnp.asarray(frame).reshape(
            batch, height // size, size, width // size, size, channels
        )
        patches = patches.transpose(0, 1, 3, 2, 4, 5)  # [B, H/P, W/P, P, P, 3]
        patches = patches.reshape(batch, -1, size * size * channels)
        kernel = self.kernel[...].reshape(size * size * channels, -1).astype(frame.dtype)
        return add_bias(patches @ kernel, self.bias[...])


class EncoderBlock(nnx.Module):
    """One layer for one frame: the attention gate and the MLP."""

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.norm_input = LayerNorm(size, rngs=rngs)
        self.norm_hidden = LayerNorm(size, rngs=rngs)
        self.norm_out = LayerNorm(size, rngs=rngs)
        self.attention = AttentionGate(
            size,
            config.num_heads,
            config.attention,
            unused_reattention=config.unused_reattention,
            rngs=rngs,
        )
        self.mlp = MLP(size, config.mlp_dim, config.block_dropout_rate, rngs=rngs)
        self.dropout = Dropout(config.block_dropout_rate)

    def __call__(
        self, x: Tokens, g: Tokens, key: PRNGKey | None = None, *, class_token_only: bool = False
    ) -> tuple[Tokens | OneToken, Tokens]:
        """Returns the layer's output and its gate, which the caller adds to the state.

        Args:
            x: the frame's tokens [B, S, D], positions added.
            g: the layer's state [B, S, D], positions added.
            key: for dropout, in training mode.
            class_token_only: compute the output of token 0 alone, [B, 1, D]. The gate is
                whole either way. Deviation: the reference computes all of the last layer's
                tokens; the others reach nothing.
        """
        gate = self.attention(self.norm_input(x), self.norm_hidden(g).astype(x.dtype))
        if class_token_only:
            return self.leave(x[:, :1], gate[:, :1], key), gate
        return self.leave(x, gate, key), gate

    def project(self, x: Tokens) -> Projected:
        """The frame's part of queries, keys and values, [B, S, 3D]: it needs no state."""
        return self.attention.to_qkv(self.norm_input(x))

    def gate(self, projected: Projected, g: Tokens) -> Tokens:
        """The gate [B, S, D] for `project`'s result: all of the layer that needs the state."""
        return self.attention.gate(projected, self.norm_hidden(g).astype(projected.dtype))

    def leave(self, x: Tokens, gate: Tokens, key: PRNGKey | None = None) -> Tokens:
        """The layer's output, of the tokens that `x` and `gate` hold."""
        attention_key, mlp_key = split_key(key)
        # Dropped out on its way to x alone, as in the reference: the state gets the gate whole.
        y = x + self.dropout(gate, rngs=attention_key)
        return y + self.mlp(self.norm_out(y), mlp_key)


class LinearHead(nnx.Module):
    """LayerNorm, Linear: the head of the released archive (`classifier`)."""

    def __init__(self, size: int, num_classes: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(size, rngs=rngs)
        self.dense = Linear(size, num_classes, rngs=rngs)

    def __call__(self, features: ClassTokens, key: PRNGKey | None = None) -> Logits:
        """Returns logits [B, K]; the head has no dropout and ignores `key`."""
        return self.dense(self.norm(features))


class MLPHead(nnx.Module):
    """MLP, Linear: the head of the reference's later source (`fc`)."""

    def __init__(self, size: int, num_classes: int, dropout_rate: float, *, rngs: nnx.Rngs):
        self.mlp = MLP(size, 4 * size, dropout_rate, rngs=rngs)
        self.dense = Linear(size, num_classes, rngs=rngs)

    def __call__(self, features: ClassTokens, key: PRNGKey | None = None) -> Logits:
        """Returns logits [B, K]; `key` seeds the dropout in training mode."""
        return self.dense(self.mlp(features, key))


class RViT(nnx.Module):
    """The recurrent vision transformer.

    Args:
        config: `config.model`, see `configs/base.py`.
        dtype: of the tokens and of matrix products: float32 or bfloat16.
        rngs: for the initial parameters, drawn from the distributions that PyTorch draws from.

    Raises:
        ValueError: a key is missing, out of range, or contradicts another.
    """

    def __init__(self, config: ConfigDict, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        check_model_config(config)
        size, num_layers = config.hidden_size, config.num_layers
        num_patches = (config.image_size // config.patch_size) ** 2
        unit_normal = nnx.initializers.normal(1.0)
        self.image_size = config.image_size
        self.readout = config.readout
        self.dtype = jnp.dtype(dtype)
        self.schedule = config.schedule
        self.segment_frames = config.segment_frames
        self.remat = config.remat
        self.num_patches = num_patches
        self.patch_embedding = PatchEmbedding(config.patch_size, size, rngs=rngs)
        self.class_token = nnx.Param(unit_normal(rngs.params(), (1, 1, size)))
        self.pos_embedding = nnx.Param(unit_normal(rngs.params(), (1, num_patches + 1, size)))
        self.state_keeps_positions = config.state_keeps_positions
        self.learned_hidden_token = config.learned_hidden_token
        kind = nnx.Param if config.learned_hidden_token else UnusedParam
        self.hidden_class_token = kind(unit_normal(rngs.params(), (num_layers, 1, 1, size)))
        self.layers = nnx.List([EncoderBlock(config, rngs=rngs) for _ in range(num_layers)])
        self.dropout = Dropout(config.dropout_rate)
        features = size * (num_layers + 1 if config.readout == "class_and_hidden_tokens" else 1)
        if config.head == "linear":
            self.head: LinearHead | MLPHead = LinearHead(features, config.num_classes, rngs=rngs)
        else:
            rate = config.block_dropout_rate
            self.head = MLPHead(features, config.num_classes, rate, rngs=rngs)
        self.dropout_rates = (config.dropout_rate, config.block_dropout_rate)

    def initial_hidden(self, batch_size: int) -> Hidden:
        """The state before the first frame: a learned token 0 per layer, zeros elsewhere."""
        num_layers, _, _, size = self.hidden_class_token.shape
        class_tokens = in_float32(self.hidden_class_token[...])
        if not self.learned_hidden_token:
            class_tokens = jnp.zeros_like(class_tokens)
        class_tokens = jnp.broadcast_to(class_tokens, (num_layers, batch_size, 1, size))
        zeros = jnp.zeros((num_layers, batch_size, self.num_patches, size), class_tokens.dtype)
        return jnp.concatenate([class_tokens, zeros], axis=2)

    def embed(self, frame: Frame) -> Tokens:
        """A frame [B, H, W, 3] as tokens [B, S, D]: the class token, then the patches."""
        dtype = self.token_dtype(frame)
        patches = self.patch_embedding(normalise(frame).astype(dtype))  # [B, N, D]
        batch_size, _, size = patches.shape
        class_tokens = jnp.broadcast_to(in_float32(self.class_token[...]), (batch_size, 1, size))
        return jnp.concatenate([class_tokens.astype(dtype), patches], axis=1)

    def token_dtype(self, frames: Video | Frame) -> jnp.dtype:
        """`dtype`; for frames in float64, which only JAX's x64 mode lets through, theirs."""
        return frames.dtype if frames.dtype == jnp.float64 else self.dtype

    def next_state(self, gate: Tokens, hidden: Tokens, g: Tokens) -> Tokens:
        """A layer's state after a frame, from its gate's output and its state before.

        Args:
            gate: [B, S, D].
            hidden: the state before, [B, S, D].
            g: the same, positions added.
        """
        return gate.astype(hidden.dtype) + (g if self.state_keeps_positions else hidden)

    def positions(self, batch_size: int) -> Tokens:
        """The position embedding, once for each clip, [B, S, D].

        So its gradient is summed over the frames first and over the clips at last; summing over the
        clips at every frame took a sixth of a training step on a CPU.
        """
        positions = self.pos_embedding[...]
        return jnp.broadcast_to(positions, (batch_size, *positions.shape[1:]))

    def add_positions(self, x: Tokens, positions: Tokens, key: PRNGKey | None = None) -> Tokens:
        """What a layer reads of the tokens [B, S, D] that the layer before gave."""
        return self.dropout(x + positions.astype(x.dtype), rngs=key)

    def split_keys(self, key: PRNGKey | None) -> tuple[PRNGKey | None, ...]:
        """Of one frame: for each layer, a key of `add_positions` and one of the layer."""
        return split_key(key, 2 * len(self.layers))

    def encode_frame(
        self,
        frame: Frame,
        hidden: Hidden,
        key: PRNGKey | None = None,
        positions: Tokens | None = None,
    ) -> tuple[ClassTokens, Hidden]:
        """One frame through all layers: the recurrent cell.

        Args:
            frame: [B, H, W, 3], float in [-1, 1] or uint8.
            hidden: the state after the frame before, [L, B, S, D].
            key: for dropout, in training mode.
            positions: `positions(B)`, where the caller has them.

        Returns:
            The class token [B, D] after the last layer, and the state [L, B, S, D].
        """
        x = self.embed(frame)
        if positions is None:
            positions = self.positions(x.shape[0])
        keys = self.split_keys(key)
        new_hidden = []
        for index, layer in enumerate(self.layers):
            read: Callable[..., tuple[Tokens | OneToken, Tokens]]
            read = functools.partial(self._read_layer, layer, index == len(self.layers) - 1)
            if self.remat == "layers":
                read = jax.checkpoint(read)
            g = hidden[index] + positions
            x, gate = read(x, g, positions, *keys[2 * index : 2 * index + 2])
            new_hidden.append(self.next_state(gate, hidden[index], g))
        return x[:, 0], jnp.stack(new_hidden)

    def _read_layer(
        self,
        layer: EncoderBlock,
        last: bool,
        x: Tokens,
        g: Tokens,
        positions: Tokens,
        position_key: PRNGKey | None,
        layer_key: PRNGKey | None,
    ) -> tuple[Tokens | OneToken, Tokens]:
        x = self.add_positions(x, positions, position_key)
        return layer(x, g, layer_key, class_token_only=last)

    def read_out(
        self, class_token: ClassTokens, hidden: Hidden, key: PRNGKey | None = None
    ) -> Logits:
        """Logits [B, K] from the class token of a frame and the state after it."""
        features = [in_float32(class_token)]
        if self.readout == "class_and_hidden_tokens":
            features.extend(hidden[:, :, 0])  # L times [B, D]
        return self.head(jnp.concatenate(features, axis=-1), key)

    def __call__(
        self,
        video: Video,
        hidden: Hidden | None = None,
        num_frames: NumFrames | None = None,
        *,
        rngs: PRNGKey | None = None,
    ) -> tuple[Logits, Hidden]:
        """Reads clips, frame by frame, and answers after the last one.

        Args:
            video: [B, T, H, W, 3], float in [-1, 1] or uint8; T is free.
            hidden: the state to go on from, [L, B, S, D]; `initial_hidden` by default.
            num_frames: real frames of each clip, [B], 1 to T; all by default. A clip's state and
                read-out stay as they are after its last real frame.
            rngs: a key, in training mode with dropout.

        Returns:
            Logits [B, K] and the state [L, B, S, D] after each clip's last real frame.

        Raises:
            ValueError: a shape or `num_frames` does not fit, or a key is missing.
        """
        self._check_frames(video, "video [B, T, H, W, 3]", rank=5)
        check_num_frames(num_frames, video.shape[0], video.shape[1])
        if rngs is None and not self.dropout.deterministic and any(self.dropout_rates):
            raise ValueError(
                "the model is in training mode with dropout: pass rngs=jax.random.key(...), or "
                "call model.eval() first"
            )
        if hidden is None:
            hidden = self.initial_hidden(video.shape[0])
        self._check_hidden(hidden, video.shape[0])
        frames_key, head_key = split_key(rngs)

        if num_frames is not None:
            num_frames = jnp.asarray(num_frames)
        class_token, hidden = read_clip(self, jnp.asarray(video), hidden, num_frames, frames_key)
        return self.read_out(class_token, hidden, head_key), hidden

    def step(
        self, frame: Frame, hidden: Hidden, active: Mask | None = None
    ) -> tuple[Logits, Hidden]:
        """Reads one frame of each stream and answers; T steps equal one call on T frames.

        Args:
            frame: [B, H, W, 3], float in [-1, 1] or uint8.
            hidden: the state after the frame before, [L, B, S, D].
            active: [B]; a stream that is not keeps its state, and its logits are NaN.

        Returns:
            Logits [B, K] and the new state [L, B, S, D].

        Raises:
            ValueError: a shape does not fit.
        """
        self._check_frames(frame, "frame [B, H, W, 3]", rank=4)
        self._check_hidden(hidden, frame.shape[0])
        class_token, new_hidden = self.encode_frame(frame, hidden)
        logits = self.read_out(class_token, new_hidden)
        if active is not None:
            logits = jnp.where(active[:, None], logits, jnp.nan)
            new_hidden = jnp.where(active[:, None, None], new_hidden, hidden)
        return logits, new_hidden

    def _check_frames(self, frames: Video | Frame, name: str, *, rank: int) -> None:
        side = self.image_size
        if frames.ndim != rank or frames.shape[-3:] != (side, side, 3) or 0 in frames.shape:
            raise ValueError(
                f"{name}: got shape {frames.shape}, but the model reads frames of "
                f"{side} x {side} pixels, channels last; resize them first (`loaded.preprocess`)"
            )
        if frames.dtype != jnp.uint8 and not jnp.issubdtype(frames.dtype, jnp.floating):
            raise ValueError(f"{name}: got {frames.dtype}, expected uint8 or floats in [-1, 1]")

    def _check_hidden(self, hidden: Hidden, batch_size: int) -> None:
        num_layers, _, _, size = self.hidden_class_token.shape
        expected = (num_layers, batch_size, self.num_patches + 1, size)
        if hidden.shape != expected:
            raise ValueError(
                f"hidden: got shape {hidden.shape}, expected [L, B, S, D] = {expected}; start from "
                f"model.initial_hidden({batch_size})"
            )


def check_num_frames(num_frames: NumFrames | None, batch_size: int, most: int) -> None:
    """Raises ValueError unless `num_frames` is [B] in 1...T; values under a trace pass."""
    if num_frames is None:
        return
    if not hasattr(num_frames, "dtype"):
        num_frames = np.asarray(num_frames)
    if num_frames.shape != (batch_size,) or not jnp.issubdtype(num_frames.dtype, jnp.integer):
        raise ValueError(
            f"num_frames: got {num_frames.dtype} {num_frames.shape}, expected whole numbers "
            f"[B] = ({batch_size},)"
        )
    if isinstance(num_frames, jax.core.Tracer):
        return
    values = np.asarray(num_frames)
    if (values < 1).any() or (values > most).any():
        raise ValueError(f"num_frames: {values.tolist()}, but a clip here has 1 to {most} frames")


class CompiledRViT:
    """An `RViT` whose calls are compiled, once per shape, and do not walk the module.

    `nnx.jit` takes a module apart at every call, which costs about as long as a small model's
    step; here it is taken apart once. Changing the module afterwards changes nothing here.

    Attributes:
        module: the model that this was made from.
    """

    def __init__(self, module: RViT):
        self.module = module
        graphdef, state = nnx.split(module)
        self._leaves, treedef = jax.tree.flatten(state)

        def merge(leaves: list[jax.Array]) -> RViT:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

        self._call = jax.jit(lambda leaves, *args: merge(leaves)(*args))
        self._step = jax.jit(lambda leaves, *args: merge(leaves).step(*args))

    def __call__(
        self, video: Video, hidden: Hidden | None = None, num_frames: NumFrames | None = None
    ) -> tuple[Logits, Hidden]:
        """`RViT.__call__`."""
        check_num_frames(num_frames, *video.shape[:2])
        if num_frames is not None:
            num_frames = jnp.asarray(num_frames)
        return self._call(self._leaves, video, hidden, num_frames)

    def step(
        self, frame: Frame, hidden: Hidden, active: Mask | None = None
    ) -> tuple[Logits, Hidden]:
        """`RViT.step`."""
        return self._step(self._leaves, frame, hidden, active)

    def initial_hidden(self, batch_size: int) -> Hidden:
        """`RViT.initial_hidden`."""
        return self.module.initial_hidden(batch_size)
