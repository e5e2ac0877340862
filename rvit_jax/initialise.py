"""Starting a run from another model: `config.init_from`.

The weights come from any trained or converted model, or from a plain ViT's file (`rvit_jax.vit`).
A converted training checkpoint of PyTorch of the same model and classes brings its AdamW state and
its epoch too: the run goes on where that stopped. In all other cases the optimizer starts anew.

What may differ, and what becomes of it:

| | |
|---|---|
| classes | by name: the head begins anew; in another order its outputs are put in theirs |
| `head`, `readout` | the head begins anew |
| `image_size`, `patch_size` | positions: bicubic on the grid of patches, the class token's kept |
| `patch_size` | patch kernels: so that a resized patch gives the same (arXiv:2212.08013) |
| `num_layers` | the lowest layers are taken; those that are new above them begin as they begin |

All other keys of `config.model` that shape the network must agree.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jaxtyping import Array
from ml_collections import ConfigDict

from rvit_jax import checkpoint, optimizer, precision, vit
from rvit_jax.config import lookup
from rvit_jax.shapes import HostOrDevice
from rvit_jax.steps import State, TrainState, begin_average

# Keys of config.model that change no shape and no function of the weights.
_FREE_MODEL_KEYS = (
    "dropout_rate",
    "block_dropout_rate",
    "remat",
    "schedule",
    "segment_frames",
)
# Keys whose differences are mended, see above.
_MENDED_MODEL_KEYS = ("image_size", "patch_size", "num_layers", "num_classes", "head", "readout")
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


def check_there(init_from: str) -> None:
    """Raises FileNotFoundError where `config.init_from` names no model; reads none."""
    path = Path(init_from).expanduser()
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"config.init_from: there is no file {path}")
        return
    try:
        checkpoint.resolve_checkpoint(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config.init_from: {error}") from error


def initialise(
    config: ConfigDict,
    state: TrainState,
    steps_per_epoch: int,
    class_names: Sequence[str] | None = None,
) -> Start:
    """Puts the weights that `config.init_from` names in a run's first state.

    Args:
        config: of the run.
        state: of step 0.
        steps_per_epoch: of the run's data.
        class_names: of the run's data, in index order; without, numbers of classes are compared.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it cannot be read, or differs from the config's in what cannot be mended.
    """
    path = Path(config.init_from).expanduser()
    if path.suffix == ".safetensors":
        source, unused = vit.read_vit(path)
        _check_same_width(config, source)
        state, notes = _take_weights(config, state, source, unused)
        notes.append("a ViT computes otherwise in places: rvit_jax/vit.py lists them")
        if config.model.attention != "softmax":
            notes.append(f"its attention is softmax, this model's {config.model.attention}")
        return Start(state, 0, (f"weights of a ViT from {path}", *notes))
    loaded = checkpoint.load(config.init_from)
    _check_mendable(config, loaded)
    order, why_anew = _compare_heads(config, loaded, class_names)
    if why_anew is None and order is None and not _differing(config, loaded, _MENDED_MODEL_KEYS):
        return _go_on(config, state, loaded, steps_per_epoch)
    source = _flat(nnx.to_pure_dict(nnx.state(loaded.model.module)))
    notes = []
    if order is not None:
        notes.append("the same classes in another order: the head's outputs were put in this one")
        for name in ("head/dense/kernel", "head/dense/bias"):
            source[name] = source[name][..., order]
    if why_anew is not None:
        notes.append(f"the head begins anew: {why_anew}")
        source = {name: array for name, array in source.items() if not name.startswith("head/")}
    state, taken = _take_weights(config, state, source, [])
    notes += [*taken, "the optimizer begins anew"]
    return Start(state, 0, (f"weights from {loaded.path}", *notes))


def _go_on(
    config: ConfigDict, state: TrainState, loaded: checkpoint.LoadedModel, steps_per_epoch: int
) -> Start:
    """From the same model: all of its weights, and a PyTorch run's optimizer state and epoch."""
    variables = nnx.to_pure_dict(nnx.state(loaded.model.module))
    state = _with_variables(state, variables)
    notes = [f"weights from {loaded.path}"]
    description = loaded.description
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
        dataclasses.replace(state, step=jnp.asarray(step, state.step.dtype), opt_state=opt_state),
        epochs,
        tuple(notes),
    )


def _with_variables(state: TrainState, variables: dict[str, Any]) -> TrainState:
    """The state with a model's variables, in its own types.

    Its moving average, and the float32 copy of bfloat16 parameters, begin as a copy of them.
    """
    own = nnx.to_pure_dict(nnx.merge_state(state.params, state.fixed))
    variables = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), variables, own)
    state = checkpoint.with_variables(state, variables)
    opt_state = precision.with_master_of(state.opt_state, state.params)
    state = dataclasses.replace(state, opt_state=opt_state)
    if state.ema is None:
        return state
    return dataclasses.replace(state, ema=begin_average(state.params))


def _take_weights(
    config: ConfigDict, state: TrainState, source: vit.Weights, unused: list[str]
) -> tuple[TrainState, list[str]]:
    """Puts in a state what `source` has for it, resized where that mends it.

    Args:
        config: of the run.
        state: of step 0, whose values stay where `source` has none.
        source: path -> array.
        unused: names beside `source` that were not taken.

    Returns:
        The state, and what was loaded, resized, not there, and not taken.

    Raises:
        ValueError: shapes that cannot be mended.
    """
    ours = _flat(nnx.to_pure_dict(nnx.merge_state(state.params, state.fixed)))
    taken, resized, misshapen = {}, [], []
    for name, like in ours.items():
        if name not in source:
            continue
        array = _resized(name, source[name], like)
        if array is not None:
            taken[name] = jnp.asarray(array, like.dtype)
            if array is not source[name]:
                before, after = (list(a.shape) for a in (source[name], like))
                resized.append(f"{name} from {before} to {after}")
        elif not name.startswith("head/"):  # a ViT's last norm, where the head's is wider
            misshapen.append(f"{name} is {list(source[name].shape)}, expected {list(like.shape)}")
    if misshapen:
        raise ValueError(
            f"config.init_from={config.init_from} does not fit config.model: {'; '.join(misshapen)}"
        )
    notes = [f"loaded {_names(taken, ours)}"]
    notes += [f"resized {', '.join(resized)}"] if resized else []
    fresh = [name for name in ours if name not in taken]
    notes += [f"as they begin, not loaded: {_names(fresh, ours)}"] if fresh else []
    left = [name for name in source if name not in taken]
    left = [*_names(left, source).split(", "), *unused] if left else unused
    notes += [f"left out: {', '.join(left)}"] if left else []
    variables = traverse_util.unflatten_dict(
        {_path(name): a for name, a in {**ours, **taken}.items()}
    )
    return _with_variables(state, variables), notes


def _resized(name: str, array: HostOrDevice, like: HostOrDevice) -> HostOrDevice | None:
    """The array in the shape of `like`, itself in the same one; None where nothing mends that."""
    shape = like.shape
    if array.shape == shape:
        return array
    if name == "pos_embedding" and array.shape[-1] == shape[-1]:
        return resize_positions(array, shape[1])
    if name == "patch_embedding/kernel" and array.shape[2:] == shape[2:]:
        return resize_patches(array, shape[0])
    if name == "hidden_class_token" and array.shape[1:] == shape[1:]:
        return jnp.concatenate([array[: shape[0]], like[array.shape[0] :]])  # a row per layer
    return None


def resize_positions(positions: HostOrDevice, num_tokens: int) -> Array:
    """Positions [1, S, D] for a grid of other size [1, num_tokens, D]; the class token's are kept.

    Bicubic (Keys, -0.5), smoothed where the grid shrinks.
    """
    side, new_side = (math.isqrt(n - 1) for n in (positions.shape[1], num_tokens))
    grid = jnp.asarray(positions)[:, 1:].reshape(1, side, side, -1)
    grid = jax.image.resize(grid, (1, new_side, new_side, grid.shape[-1]), "bicubic")
    return jnp.concatenate([positions[:, :1], grid.reshape(1, num_tokens - 1, -1)], axis=1)


def resize_patches(kernel: HostOrDevice, size: int) -> Array:
    """Patch kernels [P, P, 3, D] for patches of another size, [size, size, 3, D].

    A patch resized (bicubic) to the new size gives what it gave: exactly where patches grow, as
    nearly as can be where they shrink (FlexiViT's resize by pseudo-inverse, arXiv:2212.08013).
    """
    old = kernel.shape[0]
    basis = jnp.eye(old * old).reshape(old, old, old * old)
    basis = jax.image.resize(basis, (size, size, old * old), "bicubic")
    spread = np.asarray(basis, np.float64).reshape(size * size, old * old)
    flat = np.asarray(kernel, np.float64).reshape(old * old, -1)
    resized = np.linalg.pinv(spread.T) @ flat  # [size^2, 3 D]
    return jnp.asarray(resized.reshape(size, size, *kernel.shape[2:]), kernel.dtype)


def _flat(variables: dict[Any, Any]) -> vit.Weights:
    """Nested dicts as path -> array."""
    return {
        optimizer.path_string(path): array
        for path, array in traverse_util.flatten_dict(variables).items()
    }


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("/"))


def _names(some: Iterable[str], of: Iterable[str]) -> str:
    """Paths in short: `x/*` where all parameters of a module are meant, layers as `layers/0-7`."""
    some = set(some)
    modules: dict[str, list[str]] = {}
    for name in of:
        modules.setdefault(name.rpartition("/")[0], []).append(name)
    layers: dict[str, list[int]] = {}  # name with its layer as {} -> layers
    for module, members in modules.items():
        meant = [name for name in members if name in some]
        whole = module and len(members) > 1 and meant == members
        for name in [f"{module}/*"] if whole else meant:
            top, *rest = name.split("/")
            key, layer = (name, -1)
            if top == "layers":
                key, layer = "/".join(("layers/{}", *rest[1:])), int(rest[0])
            layers.setdefault(key, []).append(layer)
    return ", ".join(key.format(_runs(sorted(found))) for key, found in layers.items()) or "nothing"


def _runs(numbers: list[int]) -> str:
    """ "0-3" for 0, 1, 2, 3; "0+2" for 0, 2."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return "+".join(map(str, numbers))


def _differing(
    config: ConfigDict, loaded: checkpoint.LoadedModel, keys: Iterable[str]
) -> list[str]:
    there, here = loaded.config.model, config.model
    return [
        f"{key} is {there.get(key)!r} there, {here[key]!r} here"
        for key in keys
        if there.get(key) != here[key]
    ]


def _check_mendable(config: ConfigDict, loaded: checkpoint.LoadedModel) -> None:
    """Raises ValueError where no resizing makes one model of the other."""
    fixed = [key for key in config.model if key not in (*_FREE_MODEL_KEYS, *_MENDED_MODEL_KEYS)]
    if differing := _differing(config, loaded, fixed):
        raise ValueError(
            f"config.init_from={config.init_from} is another model: {'; '.join(differing)}. Set "
            "config.model to match it"
        )


def _compare_heads(
    config: ConfigDict, loaded: checkpoint.LoadedModel, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, str | None]:
    """The order that the other head's outputs must be put in, and why it cannot be taken.

    Both are None where it fits as it is.
    """
    keys = ["head", "readout"]
    if config.model.readout == "class_and_hidden_tokens":
        keys.append("num_layers")  # it reads a token of each
    if differing := _differing(config, loaded, keys):
        return None, "; ".join(differing)
    there, here = loaded.class_names, tuple(class_names or ())
    if not here:
        same = config.model.num_classes == loaded.config.model.num_classes
        return (
            None,
            None if same else f"{len(there)} classes there, {config.model.num_classes} here",
        )
    if there == here:
        return None, None
    if set(there) == set(here) and len(there) == len(here):
        return np.array([there.index(name) for name in here]), None
    new = [name for name in here if name not in there]
    what = f"{new[0]!r} among them is not known there" if new else f"{there[0]!r}, ... there"
    return None, f"{len(there)} classes there, {len(here)} here; {what}"


def _check_same_width(config: ConfigDict, source: vit.Weights) -> None:
    """Raises ValueError where a ViT has other widths than the config."""
    there = {
        "hidden_size": source["patch_embedding/kernel"].shape[-1],
        "mlp_dim": source["layers/0/mlp/dense_in/kernel"].shape[-1],
    }
    differing = [
        f"{key} is {value} there, {config.model[key]} here"
        for key, value in there.items()
        if value != config.model[key]
    ]
    if differing:
        raise ValueError(
            f"config.init_from={config.init_from} is a ViT of other widths: "
            f"{'; '.join(differing)}. Set config.model to match it"
        )


def _restore_optimizer(loaded: checkpoint.LoadedModel) -> optax.OptState:
    """The checkpoint's optax state, in the chain of its own config; see `read_arrays`."""
    params = nnx.state(loaded.model.module, nnx.Param)
    chain = optimizer.make_optimizer(loaded.config.optimizer, lambda step: 0.0)
    item = {"step": jnp.zeros((), jnp.int32), "state": chain.init(params)}
    return checkpoint.read_arrays(loaded.path, "optimizer", item, loaded.description)["state"]


def _is_node(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState | optax.ScaleByScheduleState)


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

    def moments(like: State, saved: State) -> State:
        flat = dict(nnx.to_flat_state(saved))
        pairs = []
        for path, leaf in nnx.to_flat_state(like):
            there = flat.get(path)
            if optimizer.is_masked(leaf):
                pairs.append((path, leaf))
            elif there is None or optimizer.is_masked(there):
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
