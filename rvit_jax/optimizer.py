"""The learning-rate schedule and the optax chain that `config.optimizer` asks for."""

import fnmatch

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int, num_epochs: int
) -> optax.Schedule:
    """Learning rate of each step, counted from 0.

    Args:
        config: `config.optimizer`.
        steps_per_epoch: optimizer steps of an epoch.
        num_epochs: length of the run; the cosine reaches 0 there.
    """
    rate, warmup = config.learning_rate, config.warmup_epochs
    if config.schedule == "constant":
        return optax.constant_schedule(rate)
    if config.schedule == "cosine":
        warmup_steps = round(warmup * steps_per_epoch)
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup_steps else rate, rate, warmup_steps, num_epochs * steps_per_epoch
        )

    def step_schedule(step):
        # The reference's: per epoch, powers of ten up to the rate, then a staircase counted from
        # epoch 0, not from the end of the warm-up.
        epoch = step // steps_per_epoch
        rising = rate * 10.0 ** (epoch - warmup + 1.0)
        falling = rate * config.step_factor ** (epoch // config.step_epochs)
        return jnp.where(epoch < warmup, rising, falling)

    return step_schedule


def path_string(path: tuple) -> str:
    """ "layers/0/mlp/dense_in/kernel" for a key path of a parameter tree."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The chain: clip, precondition, decay, learning rate; frozen parameters get no update.

    AdamW decays every parameter, biases and tokens too, decoupled from the gradient, as
    `torch.optim.AdamW` does; for "adam" and "sgd" the decay is part of the gradient, as in theirs.

    Raises:
        ValueError: on `init`, a pattern of `config.frozen` that matches no parameter.
    """
    chain = []
    if config.clip_norm:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    first, second = config.betas
    if config.name == "adamw":
        chain.append(optax.adamw(schedule, first, second, weight_decay=config.weight_decay))
    else:
        if config.weight_decay:
            chain.append(optax.add_decayed_weights(config.weight_decay))
        if config.name == "adam":
            chain.append(optax.adam(schedule, first, second))
        else:
            chain.append(optax.sgd(schedule, momentum=first or None))
    optimizer = optax.chain(*chain)
    if not config.frozen:
        return optimizer

    def label(params: nnx.State):
        return _label_frozen(params, tuple(config.frozen))

    parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, label)


def _label_frozen(params: nnx.State, patterns: tuple[str, ...]):
    """A tree like `params` that says "frozen" or "trained"."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_string(path) for path, _ in leaves]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"config.optimizer.frozen: {pattern!r} matches no parameter; they are called "
                f"{', '.join(paths[:4])}, ..."
            )

    def label_one(path: tuple, _):
        name = path_string(path)
        return "frozen" if any(fnmatch.fnmatch(name, p) for p in patterns) else "trained"

    return jax.tree_util.tree_map_with_path(label_one, params)
