"""The attention gate: where a frame and the recurrent state meet (paper, section 3).

Queries, keys and values are sums of a projection of the frame's tokens and one of the state's:
the gate decides, token by token, what of the frame enters the state and what of the past is read.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rvit_jax.config import check_choice
from rvit_jax.layers import LayerNorm, Linear, UnusedParam, in_float32
from rvit_jax.shapes import Projected, Tokens

Heads = Float[Array, "B A S C"]
AttentionMaps = Float[Array, "B A S S"]


def _elu_plus_one(x: Array) -> Array:
    """`elu(x) + 1`: the positive feature map of linear attention, in float32."""
    return jax.nn.elu(in_float32(x)) + 1.0


def linear_attention_maps(q: Heads, k: Heads) -> AttentionMaps:
    """Weights `(elu(q) + 1) . (elu(k) + 1)`: positive, neither scaled nor normalised."""
    return _elu_plus_one(q) @ jnp.swapaxes(_elu_plus_one(k), -1, -2)


def linear_attention(q: Heads, k: Heads, v: Heads) -> Heads:
    """The values summed with `linear_attention_maps`, which are not built.

    Deviation: the reference builds the S x S weights; `q (k^T v)` is the same number for S / C
    times fewer operations, and never holds a map.
    """
    dtype, q, k, v = v.dtype, _elu_plus_one(q), _elu_plus_one(k), in_float32(v)
    return (q @ (jnp.swapaxes(k, -1, -2) @ v)).astype(dtype)  # [B, A, S, C] @ [B, A, C, C]


def softmax_attention_maps(q: Heads, k: Heads) -> AttentionMaps:
    """Scaled dot-product attention weights; each row (query) sums to 1."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.matmul(
        q * q.shape[-1] ** -0.5, jnp.swapaxes(k, -1, -2), preferred_element_type=wide
    )
    return jax.nn.softmax(scores, axis=-1)


class AttentionGate(nnx.Module):
    """Joint attention over a frame's tokens and the state's.

    Args:
        hidden_size: D.
        num_heads: A; divides D. Channel c of q, k and v belongs to head `c // (D / A)`.
        kind: one of `config.ATTENTION_KINDS`. "reattention" mixes the softmax maps across heads
            with a learned A x A matrix and normalises the result over the heads (DeepViT, 2021).
        unused_reattention: carry re-attention parameters that take no part in the computation,
            as the reference's later source does; only for `kind` other than "reattention".
        rngs: for the initial parameters.

    Raises:
        ValueError: another `kind`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kind: str,
        *,
        unused_reattention: bool = False,
        rngs: nnx.Rngs,
    ):
        check_choice("model.attention", kind)
        self.kind = kind
        self.num_heads = num_heads
        self.to_qkv = Linear(hidden_size, 3 * hidden_size, rngs=rngs)
        self.to_qkv_hidden = Linear(hidden_size, 3 * hidden_size, rngs=rngs)
        self.to_out = Linear(hidden_size, hidden_size, rngs=rngs)
        if kind == "reattention" or unused_reattention:
            variable = nnx.Param if kind == "reattention" else UnusedParam
            unit_normal = nnx.initializers.normal(1.0)
            self.reattention_kernel = variable(unit_normal(rngs.params(), (num_heads, num_heads)))
            self.reattention_norm = LayerNorm(num_heads, rngs=rngs, variable=variable)

    def queries_keys_values(self, x: Tokens, g: Tokens) -> tuple[Heads, Heads, Heads]:
        """Projects the normalised frame `x` and state `g` and splits the sum into heads."""
        return self._split_heads(self.to_qkv(x) + self.to_qkv_hidden(g))

    def _split_heads(self, z: Projected) -> tuple[Heads, Heads, Heads]:
        z = z.reshape(*z.shape[:2], 3, self.num_heads, -1)  # [B, S, 3, A, C]
        # Heads before tokens: plain batched products, twice as fast on CPU as summing in place.
        q, k, v = z.transpose(2, 0, 3, 1, 4)
        return q, k, v

    def maps(self, q: Heads, k: Heads) -> AttentionMaps:
        """The weights with which each query (row) sums the values, of whatever kind."""
        if self.kind == "linear":
            return linear_attention_maps(q, k)
        maps = softmax_attention_maps(q, k)
        if self.kind == "reattention":
            maps = jnp.einsum("bhqk,hg->bgqk", maps, self.reattention_kernel[...])
            maps = jnp.moveaxis(self.reattention_norm(jnp.moveaxis(maps, 1, -1)), -1, 1)
        return maps

    def attend(self, q: Heads, k: Heads, v: Heads) -> Heads:
        """The values summed with `maps(q, k)`; linear attention never builds the maps."""
        if self.kind == "linear":
            return linear_attention(q, k, v)
        return self.maps(q, k).astype(v.dtype) @ v

    def __call__(self, x: Tokens, g: Tokens) -> Tokens:
        """Returns the gate's output for the normalised frame tokens `x` and state tokens `g`."""
        return self.gate(self.to_qkv(x), g)

    def gate(self, projected: Projected, g: Tokens) -> Tokens:
        """The same from `to_qkv` of the frame's tokens: all that needs the state."""
        attended = self.attend(*self._split_heads(projected + self.to_qkv_hidden(g)))
        attended = jnp.swapaxes(attended, 1, 2)  # [B, S, A, C]
        return self.to_out(attended.reshape(g.shape))  # heads side by side: [B, S, D]
