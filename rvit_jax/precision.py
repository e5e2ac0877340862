"""How exactly a model computes and is kept: `config.opt_level`.

    level   parameters   tokens and matrix products   optimizer
    O0      float32      float32                      float32
    O1      float32      bfloat16                     float32
    O2      bfloat16     bfloat16                     float32, with a float32 copy of the parameters

In all of them LayerNorm, softmax, the loss, the head, the recurrent state and the sums of linear
attention are in float32, gradients are summed over the frames in float32, and matrix products of
bfloat16 numbers are accumulated in float32.

There is no level of float16. Linear attention's weights are not normalised: its sums grow with the
number of tokens, the state with the number of frames, and above 65,504 a float16 is infinite.
bfloat16 has float32's range, and needs no scaling of the loss.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from rvit_jax.layers import in_float32
from rvit_jax.model import RViT


def compute_dtype(level: str) -> jnp.dtype:
    """Of tokens and matrix products."""
    return jnp.dtype(jnp.float32 if level == "O0" else jnp.bfloat16)


def param_dtype(level: str) -> jnp.dtype:
    """Of the parameters, in training and on disk."""
    return jnp.dtype(jnp.bfloat16 if level == "O2" else jnp.float32)


def make_model(config: ConfigDict, *, rngs: nnx.Rngs) -> RViT:
    """The model of a whole config, at its level.

    Raises:
        ValueError: see `RViT`.
    """
    model = RViT(config.model, dtype=compute_dtype(config.opt_level), rngs=rngs)
    dtype = param_dtype(config.opt_level)
    if dtype != jnp.float32:
        nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    return model


class MasterState(NamedTuple):
    """The state of `with_master_weights`.

    Attributes:
        master: the parameters in float32.
        inner: the optimizer's own state.
    """

    master: Any
    inner: optax.OptState


def with_master_weights(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """An optimizer that keeps the parameters in float32 and hands them out rounded.

    Updates far smaller than a bfloat16 parameter, which a sum in bfloat16 would lose, add up in the
    copy.
    """

    def init(params: Any) -> MasterState:
        master = jax.tree.map(in_float32, params)
        return MasterState(master, optimizer.init(master))

    def update(updates: Any, state: MasterState, params: Any) -> tuple[Any, MasterState]:
        updates, inner = optimizer.update(updates, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        # In float32; `optax.apply_updates` adds and rounds to the parameter's own type.
        updates = jax.tree.map(lambda new, old: new - in_float32(old), master, params)
        return updates, MasterState(master, inner)

    return optax.GradientTransformation(init, update)


def make_optimizer_for(
    level: str, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optimizer` as a level needs it."""
    return with_master_weights(optimizer) if level == "O2" else optimizer


def with_master_of(opt_state: optax.OptState, params: Any) -> optax.OptState:
    """The optimizer's state with `params`, which came from elsewhere, as its float32 copy, if any.

    Args:
        opt_state: of `make_optimizer_for`.
        params: not yet rounded.
    """
    if isinstance(opt_state, MasterState):
        return opt_state._replace(master=jax.tree.map(in_float32, params))
    return opt_state
