"""PyTorch's AdamW state <-> optax's.

`torch.optim` numbers the parameters that it was given; it was given those that required a
gradient, in the order of the state dict. A parameter that never got a gradient has no entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from weights_converter import mapping
from weights_converter.archive import FileRefused

if TYPE_CHECKING:
    import optax
    from ml_collections import ConfigDict

# What the reference freezes on request (`model/RViT.py`'s patch embedding).
FREEZABLE = ("embedding.weight", "embedding.bias")
EPSILON = 1e-8  # of ours; the same default in PyTorch


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The state of `torch.optim.AdamW`, by the reference's parameter names.

    Attributes:
        mean: first moments (`exp_avg`) of every parameter; zeros where PyTorch held none.
        square: second moments (`exp_avg_sq`).
        step: updates made.
        frozen: parameters that the optimizer was not given.
        stateless: parameters that it was given and that never got a gradient.
        learning_rate: of the last update.
        betas: decay rates of the moments.
        weight_decay: decoupled.
    """

    mean: dict[str, np.ndarray]
    square: dict[str, np.ndarray]
    step: int
    frozen: tuple[str, ...]
    stateless: tuple[str, ...]
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


def entries_by_name(
    optimizer: Mapping[str, Any], names: list[str]
) -> dict[str, Mapping[str, Any]] | None:
    """An optimizer's entries by parameter name.

    Args:
        optimizer: its state dict.
        names: of the model's parameters, in the order of the model's state dict.

    Returns:
        Entries; a parameter without one is absent. None where the count of parameters fits
        neither the whole model nor the model with its embedding frozen.
    """
    given = trained_names(optimizer, names)
    state = optimizer.get("state")
    if given is None or not isinstance(state, dict):
        return None
    return {name: state[i] for i, name in enumerate(given) if isinstance(state.get(i), dict)}


def trained_names(optimizer: Mapping[str, Any], names: list[str]) -> list[str] | None:
    """The parameters that the optimizer was given, in its order; None where none fit."""
    groups = optimizer.get("param_groups")
    # Several groups are numbered through in their own order, which the file does not tell.
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        return None
    numbers = groups[0].get("params")
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        return None
    if numbers != list(range(len(numbers))):
        return None
    for given in (names, [name for name in names if name not in FREEZABLE]):
        if len(given) == len(numbers):
            return list(given)
    return None


def read_adamw(optimizer: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> AdamW:
    """Understands an optimizer's state dict.

    Args:
        optimizer: as `torch.optim.AdamW.state_dict` gives it.
        weights: the model's, by the reference's names, in the order of its state dict.

    Raises:
        FileRefused: it is not AdamW's as ours computes it, or does not fit the weights.
    """
    names = list(weights)
    given, entries = trained_names(optimizer, names), entries_by_name(optimizer, names)
    if given is None or entries is None:
        raise FileRefused(
            f"the optimizer's parameters are not the model's {len(names)}, nor those without the "
            "embedding, in one group"
        )
    mean = {name: np.zeros_like(array) for name, array in weights.items()}
    square = {name: np.zeros_like(array) for name, array in weights.items()}
    steps = set()
    for name, entry in entries.items():
        if set(entry) != {"step", "exp_avg", "exp_avg_sq"}:
            raise FileRefused(
                f"the optimizer is no AdamW: its entry for {name} holds "
                f"{', '.join(map(str, entry))}"
            )
        mean[name] = _moment(entry["exp_avg"], weights[name], f"exp_avg of {name}")
        square[name] = _moment(entry["exp_avg_sq"], weights[name], f"exp_avg_sq of {name}")
        if (square[name] < 0).any():
            raise FileRefused(f"exp_avg_sq of {name} is negative somewhere")
        steps.add(_step(entry["step"], name))
    if len(steps) > 1:
        raise FileRefused(f"the optimizer's parameters are at different steps: {sorted(steps)}")
    return AdamW(
        mean,
        square,
        steps.pop() if steps else 0,
        frozen=tuple(name for name in names if name not in given),
        stateless=tuple(name for name in given if name not in entries),
        **_settings(optimizer["param_groups"][0]),
    )


def _step(value: Any, name: str) -> int:
    """Updates made: a whole number, or a tensor that holds one."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(()).item()
    if _is_real(value) and 0 <= value < 2**31 and value == int(value):
        return int(value)
    raise FileRefused(f"the optimizer's step of {name} is no count of updates")


def _is_real(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and abs(value) < 2**62  # so that NaN is none


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    if type(group.get("amsgrad")) is not bool:
        raise FileRefused("the optimizer is no AdamW: it has no setting `amsgrad`")
    rate, decay, epsilon = (group.get(key) for key in ("lr", "weight_decay", "eps"))
    betas: Any = group.get("betas")
    if isinstance(rate, np.ndarray) and rate.size == 1:
        rate = rate.reshape(()).item()
    if not (_is_real(rate) and rate >= 0 and _is_real(decay) and decay >= 0 and _is_real(epsilon)):
        raise FileRefused("the optimizer's lr, weight_decay or eps is no number of that kind")
    if (
        type(betas) not in (tuple, list)
        or len(betas) != 2
        or not all(_is_real(beta) and 0 <= beta < 1 for beta in betas)
    ):
        raise FileRefused("the optimizer's betas are no pair of numbers in [0, 1)")
    odd = [key for key in ("amsgrad", "maximize") if group.get(key) is True]
    if odd:
        raise FileRefused(f"the optimizer uses {odd[0]}, which ours does not")
    if decay and group.get("decoupled_weight_decay") is False:
        raise FileRefused("the optimizer is Adam with a coupled weight decay, not AdamW")
    if epsilon != EPSILON:
        raise FileRefused(f"the optimizer's eps is {epsilon}; ours is {EPSILON}")
    return {"learning_rate": rate, "betas": tuple(betas), "weight_decay": decay}


def _moment(value: Any, like: np.ndarray, what: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.shape != like.shape or value.dtype.kind != "f":
        shape = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
        raise FileRefused(f"the optimizer's {what} is {shape}, expected {list(like.shape)}")
    if not np.isfinite(value).all():
        raise FileRefused(f"the optimizer's {what} holds NaN or infinite values")
    return value.astype(np.float32)


def to_optax(adamw: AdamW, opt_state: optax.OptState, config_model: ConfigDict) -> optax.OptState:
    """Puts PyTorch's moments and counts in an optax state.

    Args:
        adamw: PyTorch's.
        opt_state: of `optimizer.make_optimizer`'s chain, as its `init` gives it.
        config_model: `config.model`.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from rvit_jax import optimizer

    moments = {
        "mu": mapping.to_flax(adamw.mean, config_model),
        "nu": mapping.to_flax(adamw.square, config_model),
    }

    def fill(field: str, tree: Any) -> Any:
        """The optimizer's tree holds the trained parameters alone."""
        # Flax allows other keys in a path; those of a module are names and numbers.
        flat = nnx.to_flat_state(tree)
        pairs = [
            (
                path,
                leaf
                if optimizer.is_masked(leaf)
                else leaf.replace(jnp.asarray(moments[field][path])),  # type: ignore[index]
            )
            for path, leaf in flat
        ]
        return nnx.from_flat_state(pairs)

    def replace(node: Any) -> Any:
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(
                count=jnp.asarray(adamw.step, node.count.dtype),
                mu=fill("mu", node.mu),
                nu=fill("nu", node.nu),
            )
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=jnp.asarray(adamw.step, node.count.dtype))
        return node

    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    return jax.tree.map(replace, opt_state, is_leaf=lambda node: isinstance(node, kinds))
