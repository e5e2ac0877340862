"""The learning-rate schedule and the optax chain that `config.optimizer` asks for."""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from rvit_jax.config import check_choice


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int, num_epochs: int
) -> optax.Schedule:
    """Learning rate of each step, counted from 0.

    Args:
        config: `config.optimizer`.
        steps_per_epoch: optimizer steps of an epoch.
        num_epochs: length of the run; the cosine reaches 0 there.

    Raises:
        ValueError: `config.schedule` is unknown.
    """
    check_choice("optimizer.schedule", config.schedule)
    rate, warmup = config.learning_rate, config.warmup_epochs
    if config.schedule == "constant":
        return optax.constant_schedule(rate)
    if config.schedule == "cosine":
        warmup_steps = round(warmup * steps_per_epoch)
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup_steps else rate, rate, warmup_steps, num_epochs * steps_per_epoch
        )

    def step_schedule(step: Any) -> jax.Array:  # a number, or an array of one
        # The reference's: per epoch, powers of ten up to the rate, then a staircase counted from
        # epoch 0, not from the end of the warm-up.
        epoch = step // steps_per_epoch
        rising = rate * 10.0 ** (epoch - warmup + 1.0)
        falling = rate * config.step_factor ** (epoch // config.step_epochs)
        return jnp.where(epoch < warmup, rising, falling)

    return step_schedule


def path_string(path: tuple[Any, ...]) -> str:
    """ "layers/0/mlp/dense_in/kernel" for a key path of a parameter tree."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The chain: clip, precondition, decay, learning rate, layer decay; frozen parameters get none.

    AdamW decays every parameter, biases and tokens too, decoupled from the gradient, as
    `torch.optim.AdamW` does; for "adam" and "sgd" the decay is part of the gradient, as in theirs.
    LAMB (arXiv:1904.00962) is AdamW whose update of each tensor has the length of the tensor,
    before the learning rate: for large batches. The clip is of the trained parameters' gradient.

    Raises:
        ValueError: `config.name` is unknown; on `init`, a pattern of `config.frozen` that matches
            no parameter.
    """
    check_choice("optimizer.name", config.name)
    chain = []
    if config.clip_norm:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    first, second = config.betas
    if config.name in ("adamw", "lamb"):
        make = {"adamw": optax.adamw, "lamb": optax.lamb}[config.name]
        chain.append(make(schedule, first, second, weight_decay=config.weight_decay))
    else:
        if config.weight_decay:
            chain.append(optax.add_decayed_weights(config.weight_decay))
        if config.name == "adam":
            chain.append(optax.adam(schedule, first, second))
        else:
            chain.append(optax.sgd(schedule, momentum=first or None))
    optimizer = optax.chain(*chain)
    if config.frozen:

        def label(params: nnx.State[Any, Any]) -> Any:
            return _label_frozen(params, tuple(config.frozen))

        parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.multi_transform(parts, label)
    if config.layer_decay != 1.0:
        optimizer = optax.chain(optimizer, _decay_by_layer(config.layer_decay))
    return optimizer


def layer_depth(path: str, num_layers: int) -> int:
    """How many layers lie above a parameter: the power of `config.optimizer.layer_decay`.

    | parameter | depth |
    |---|---|
    | `head/*` | 0 |
    | `layers/l/*`, l = 0 is the lowest | L - l |
    | `patch_embedding/*`, `class_token`, `pos_embedding`, `hidden_class_token` | L + 1 |

    The table is BEiT's (arXiv:2106.08254), with the state's first token among the embeddings: it
    too is what the layers begin with.
    """
    top, *rest = path.split("/")
    if top == "head":
        return 0
    return num_layers - int(rest[0]) if top == "layers" else num_layers + 1


def _decay_by_layer(rate: float) -> optax.GradientTransformation:
    """Multiplies each parameter's update, weight decay included, by `rate ** layer_depth`."""

    def scale(updates: nnx.State[Any, Any], params: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
        del params
        paths = [path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(updates)[0]]
        num_layers = 1 + max(
            (int(path.split("/")[1]) for path in paths if path.startswith("layers/")), default=-1
        )
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * rate ** layer_depth(path_string(path), num_layers),
            updates,
        )

    return optax.stateless(scale)


def updates_made(opt_state: optax.OptState) -> int:
    """How many updates the learning rate's schedule has seen; refused ones do not count."""
    counts = [
        node.count
        for node in jax.tree.leaves(opt_state, is_leaf=_is_schedule)
        if _is_schedule(node)
    ]
    return int(counts[0])


def is_masked(leaf: object) -> bool:
    """Whether the optimizer's state holds nothing in this place: a frozen parameter."""
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return isinstance(value, optax.MaskedNode)


def _is_schedule(node: object) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _label_frozen(params: nnx.State[Any, Any], patterns: tuple[str, ...]) -> Any:
    """A tree like `params` that says "frozen" or "trained"."""

    def name_of(path: tuple[Any, ...]) -> str:
        return path_string(path).removesuffix("/value")  # where nnx keeps a parameter's array

    def is_meant(name: str, pattern: str) -> bool:
        return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(f"{name}/value", pattern)

    paths = [name_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in patterns:
        if not any(is_meant(name, pattern) for name in paths):
            raise ValueError(
                f"config.optimizer.frozen: {pattern!r} matches no parameter; they are called "
                f"{', '.join(paths[:4])}, ..."
            )

    def label_one(path: tuple[Any, ...], _: object) -> str:
        frozen = any(is_meant(name_of(path), pattern) for pattern in patterns)
        return "frozen" if frozen else "trained"

    return jax.tree_util.tree_map_with_path(label_one, params)
