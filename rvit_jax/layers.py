"""Parts with PyTorch's numbers: initial distributions, epsilons and the exact GELU.

Flax's defaults differ (LeCun normal kernels, zero biases, epsilon 1e-6, the tanh GELU), and
training would start elsewhere.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

LAYER_NORM_EPSILON = 1e-5


class UnusedParam(nnx.Variable):
    """A parameter carried for a lossless round trip: no gradient, no decay, no optimizer state."""


def uniform_fan_in(fan_in: int) -> Callable[..., Array]:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): `torch.nn.Linear` and `Conv2d`, weight and bias."""
    bound = 1.0 / math.sqrt(fan_in)

    def initialise(key: Array, shape: tuple[int, ...], dtype=jnp.float32, **_) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


class Linear(nnx.Linear):
    """`x @ kernel + bias`, kernel [in, out], starting from PyTorch's distribution."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        init = uniform_fan_in(in_features)
        super().__init__(in_features, out_features, kernel_init=init, bias_init=init, rngs=rngs)


class LayerNorm(nnx.Module):
    """Normalises the last axis; its two parameters may be of another variable type.

    The variance is the mean of squared deviations. Flax's faster `E[x^2] - E[x]^2` loses digits
    where the mean is large, as in a recurrent state that grows.
    """

    def __init__(self, size: int, *, rngs: nnx.Rngs, variable: type[nnx.Variable] = nnx.Param):
        del rngs  # the same signature as every other part; ones and zeros need no random numbers
        self.scale = variable(jnp.ones(size))
        self.bias = variable(jnp.zeros(size))

    def __call__(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
        """Returns `(x - mean) / sqrt(variance + 1e-5) * scale + bias`, over the last axis."""
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
        return normal * self.scale[...] + self.bias[...]


class MLP(nnx.Module):
    """Linear, exact GELU, dropout, Linear, dropout (the reference's `FeedForward`)."""

    def __init__(self, size: int, mlp_dim: int, dropout_rate: float, *, rngs: nnx.Rngs):
        self.dense_in = Linear(size, mlp_dim, rngs=rngs)
        self.dense_out = Linear(mlp_dim, size, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self, x: Float[Array, "*batch F"], key: Array | None = None
    ) -> Float[Array, "*batch F"]:
        """Returns the same shape; `key` seeds the dropout in training mode."""
        inner_key, outer_key = split_key(key)
        x = jax.nn.gelu(self.dense_in(x), approximate=False)
        x = self.dense_out(self.dropout(x, rngs=inner_key))
        return self.dropout(x, rngs=outer_key)


def split_key(key: Array | None, num: int = 2) -> tuple[Array | None, ...]:
    """`jax.random.split` that passes the `None` of a deterministic call on."""
    return (None,) * num if key is None else tuple(jax.random.split(key, num))
