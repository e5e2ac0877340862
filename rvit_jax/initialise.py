"""Starting a run from another model: `config.init_from`.

The weights come from any trained or converted model of the same shapes. A converted training
checkpoint of PyTorch brings its AdamW state and its epoch too: the run goes on where that stopped.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from rvit_jax import checkpoint, optimizer
from rvit_jax.config import lookup
from rvit_jax.steps import TrainState

# Keys of config.model that change no shape and no function of the weights.
_FREE_MODEL_KEYS = ("dropout_rate", "block_dropout_rate", "remat")
_RECIPE_KEYS = ("learning_rate", "betas", "weight_decay", "schedule", "frozen")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        state: of its first step; `state.step` counts this run's steps.
        epochs: epochs behind it; the data goes on there.
        notes: what was taken over and what was not, to tell the user.
    """

    state: TrainState
    epochs: int
    notes: tuple[str, ...]


def initialise(config: ConfigDict, state: TrainState, steps_per_epoch: int) -> Start:
    """Puts the weights that `config.init_from` names in a run's first state.

    Args:
        config: of the run.
        state: of step 0.
        steps_per_epoch: of the run's data.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it cannot be read, or is another model than the config's.
    """
    loaded = checkpoint.load(config.init_from)
    _check_same_model(config, loaded)
    variables = nnx.to_pure_dict(nnx.state(loaded.model.module))
    state = checkpoint.with_variables(state, variables)
    notes = [f"weights from {loaded.path}"]
    description = json.loads((loaded.path / "model.json").read_text()) if _converted(loaded) else {}
    if not (loaded.path / "optimizer").is_dir() or "converted_from" not in description:
        return Start(state, 0, tuple(notes))
    if config.optimizer.name != "adamw":
        notes.append(f"its AdamW state is left behind: this run's is {config.optimizer.name}")
        return Start(state, 0, tuple(notes))
    epoch = description.get("epoch")
    epochs = 0 if epoch is None else epoch + 1
    step = epochs * steps_per_epoch
    theirs = _restore_optimizer(loaded)
    opt_state, missing = _take_over(state.opt_state, theirs, step)
    notes.append(f"AdamW's state after {description['step']} updates in PyTorch")
    if missing:
        notes.append(f"zero for {len(missing)} parameters that had none: {', '.join(missing[:4])}")
    for key in _RECIPE_KEYS:
        was, now = (lookup(c, f"optimizer.{key}") for c in (loaded.config, config))
        if was != now:
            notes.append(f"config.optimizer.{key} is {now!r}, there it was {was!r}")
    if epoch is None:
        notes.append("its epoch is unknown: this run begins with epoch 0")
    else:
        notes.append(f"going on after epoch {epoch} (from 0), at step {step}")
    return Start(
        state.replace(step=jnp.asarray(step, state.step.dtype), opt_state=opt_state),
        epochs,
        tuple(notes),
    )


def _converted(loaded: checkpoint.LoadedModel) -> bool:
    """A converted model holds its description at the top, a step of training in `meta/`."""
    return (loaded.path / "model.json").is_file()


def _check_same_model(config: ConfigDict, loaded: checkpoint.LoadedModel) -> None:
    differing = [
        f"{key} is {loaded.config.model[key]!r} there, {value!r} here"
        for key, value in config.model.items()
        if key not in _FREE_MODEL_KEYS and loaded.config.model.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"config.init_from={config.init_from} is another model: {'; '.join(differing)}. Set "
            "config.model to match it"
        )


def _restore_optimizer(loaded: checkpoint.LoadedModel) -> optax.OptState:
    """The checkpoint's optax state, in the chain of its own config."""
    params = nnx.state(loaded.model.module, nnx.Param)
    chain = optimizer.make_optimizer(loaded.config.optimizer, lambda step: 0.0)
    item = {"step": jnp.zeros((), jnp.int32), "state": chain.init(params)}
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, item)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(loaded.path.absolute() / "optimizer", template)["state"]
    except Exception as error:  # Orbax raises many kinds
        raise ValueError(f"{loaded.path}: the optimizer's state cannot be read: {error}") from error


def _is_node(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState | optax.ScaleByScheduleState)


def _is_masked(leaf: Any) -> bool:
    """Whether the optimizer holds nothing here: a frozen parameter."""
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return not isinstance(value, jax.Array | np.ndarray)


def _take_over(
    ours: optax.OptState, theirs: optax.OptState, step: int
) -> tuple[optax.OptState, list[str]]:
    """Adam's moments and count from `theirs`, the schedule's place from `step`.

    Also returns the paths of trained parameters that `theirs` has no moments of; theirs are zero,
    as PyTorch begins them.
    """
    adam = next(
        node
        for node in jax.tree.leaves(theirs, is_leaf=_is_node)
        if isinstance(node, optax.ScaleByAdamState)
    )
    missing: list[str] = []

    def moments(like: nnx.State, saved: nnx.State) -> nnx.State:
        flat = dict(nnx.to_flat_state(saved))
        pairs = []
        for path, leaf in nnx.to_flat_state(like):
            there = flat.get(path)
            if _is_masked(leaf):
                pairs.append((path, leaf))
            elif there is None or _is_masked(there):
                missing.append(optimizer.path_string(path))
                pairs.append((path, leaf))
            else:
                pairs.append((path, leaf.replace(jnp.asarray(there.get_value()))))
        return nnx.from_flat_state(pairs)

    def replace(node: Any) -> Any:
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(
                count=jnp.asarray(np.asarray(adam.count), node.count.dtype),
                mu=moments(node.mu, adam.mu),
                nu=moments(node.nu, adam.nu),
            )
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=jnp.asarray(step, node.count.dtype))
        return node

    return jax.tree.map(replace, ours, is_leaf=_is_node), sorted(set(missing))
