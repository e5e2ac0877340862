"""Parts with PyTorch's numbers: initial distributions, epsilons and the exact GELU.

Flax's defaults differ (LeCun normal kernels, zero biases, epsilon 1e-6, the tanh GELU), and
training would start elsewhere.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LAYER_NORM_EPSILON = 1e-5


class UnusedParam(nnx.Variable[Array]):
    """A parameter carried for a lossless round trip: no gradient, no decay, no optimizer state."""


def uniform_fan_in(fan_in: int) -> Callable[..., Array]:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): `torch.nn.Linear` and `Conv2d`, weight and bias."""
    bound = 1.0 / math.sqrt(fan_in)

    def initialise(
        key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_: object
    ) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


def in_float32(x: Array) -> Array:
    """Half precision raised to float32; wider types as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def add_bias(x: Float[Array, "*batch F"], bias: Float[Array, " F"]) -> Float[Array, "*batch F"]:
    """`x + bias` in x's type. Added in float32, and so is the bias's gradient over all tokens."""
    return (in_float32(x) + in_float32(bias)).astype(x.dtype)


class Linear(nnx.Linear):
    """`x @ kernel + bias` in x's type, kernel [in, out], starting from PyTorch's distribution."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        init = uniform_fan_in(in_features)
        super().__init__(in_features, out_features, kernel_init=init, bias_init=init, rngs=rngs)

    # Flax's takes a sharding too, which nothing here asks for.
    def __call__(  # type: ignore[override]
        self, x: Float[Array, "*batch I"]
    ) -> Float[Array, "*batch O"]:
        """Returns the projection of the last axis; half precision is summed in float32."""
        assert self.bias is not None
        return add_bias(x @ self.kernel[...].astype(x.dtype), self.bias[...])


class LayerNorm(nnx.Module):
    """Normalises the last axis; its two parameters may be of another variable type.

    The variance is the mean of squared deviations. Flax's faster `E[x^2] - E[x]^2` loses digits
    where the mean is large, as in a recurrent state that grows.
    """

    def __init__(self, size: int, *, rngs: nnx.Rngs, variable: type[nnx.Variable[Any]] = nnx.Param):
        del rngs  # the same signature as every other part; ones and zeros need no random numbers
        self.scale = variable(jnp.ones(size))
        self.bias = variable(jnp.zeros(size))

    def __call__(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
        """Returns `(x - mean) / sqrt(variance + 1e-5) * scale + bias`, over the last axis.

        Half precision is normalised in float32 and rounded at the end.
        """
        dtype, x = x.dtype, in_float32(x)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
        return (normal * self.scale[...] + self.bias[...]).astype(dtype)


# Names the masks for rematerialisation: kept, they take a byte a value; made again, half as long as
# the layer's matrix products.
DROPOUT_MASK = "dropout_mask"


class Dropout(nnx.Module):
    """In training mode, zeroes each value with a probability and scales the others to the mean.

    As `nnx.Dropout`, but for the random numbers: a CPU spent a fifth of a training step on making
    64 bits and a float for each value, from which one comparison was left.

    Args:
        rate: the probability, 0 to below 1; taken to the nearest 1 / 65536.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(
        self, x: Float[Array, "*batch F"], *, rngs: Array | None = None
    ) -> Float[Array, "*batch F"]:
        """Returns x in evaluation mode, else what is left of it; `rngs` is a key."""
        dropped = round(self.rate * 2**16)
        if self.deterministic or not dropped:
            return x
        assert rngs is not None  # `RViT` asks for it
        keep = checkpoint_name(random_uint16(rngs, x.shape) >= dropped, DROPOUT_MASK)
        return jnp.where(keep, x * (2**16 / (2**16 - dropped)), jnp.zeros_like(x))


def random_uint16(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform whole numbers [0, 65535] of a shape; uint32. A function of key and shape alone.

    With the key of a part (`sharding`), whose third word is its number, these are the part's rows
    of what its whole would draw.

    Four from each block of Threefry-2x32, JAX's own generator, whose counter runs over all axes but
    the last and a quarter of the last. `jax.random.bits` makes a block for each number, and on a
    CPU in a loop that goes through memory twenty times: 3 to 7 times as long.
    """
    *batch, size = shape
    blocks = -(-size // 4)
    number = math.prod(batch) * blocks
    key = jax.random.key_data(key)
    counter = jax.lax.iota(jnp.uint32, number).reshape(*batch, blocks)
    if len(key) > 2:
        counter = counter + key[2] * jnp.uint32(number)
    words = threefry_2x32(key[:2], jnp.zeros_like(counter), counter)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return jnp.concatenate(halves, axis=-1)[..., :size]


def threefry_2x32(key: Array, high: Array, low: Array) -> tuple[Array, Array]:
    """The block cipher Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), written to be fused.

    Args:
        key: uint32 [2].
        high, low: the counter, uint32 of any shape.

    Returns:
        Two random words for each counter.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    high, low = high + schedule[0], low + schedule[1]
    for group in range(5):
        for rotation in rotations[group % 2]:
            high = high + low
            low = high ^ ((low << rotation) | (low >> (32 - rotation)))
        high = high + schedule[(group + 1) % 3]
        low = low + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return high, low


class MLP(nnx.Module):
    """Linear, exact GELU, dropout, Linear, dropout (the reference's `FeedForward`)."""

    def __init__(self, size: int, mlp_dim: int, dropout_rate: float, *, rngs: nnx.Rngs):
        self.dense_in = Linear(size, mlp_dim, rngs=rngs)
        self.dense_out = Linear(mlp_dim, size, rngs=rngs)
        self.dropout = Dropout(dropout_rate)

    def __call__(
        self, x: Float[Array, "*batch F"], key: Array | None = None
    ) -> Float[Array, "*batch F"]:
        """Returns the same shape; `key` seeds the dropout in training mode."""
        inner_key, outer_key = split_key(key)
        inner = jax.nn.gelu(in_float32(self.dense_in(x)), approximate=False).astype(x.dtype)
        x = self.dense_out(self.dropout(inner, rngs=inner_key))
        return self.dropout(x, rngs=outer_key)


def split_key(key: Array | None, num: int = 2) -> tuple[Array | None, ...]:
    """`jax.random.split` that passes the `None` of a deterministic call on."""
    return (None,) * num if key is None else tuple(jax.random.split(key, num))
