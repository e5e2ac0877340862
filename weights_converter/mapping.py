"""One table: PyTorch parameter name <-> NNX path, with the layout change between them.

`to_flax` and `to_torch` read the same rows, and both are audited on both sides: every missing,
extra and misshapen name is reported at once. Values are moved, never computed with, so a round
trip is exact bit for bit.

Letters: P patch side, S tokens, D hidden size, L layers, A heads, K classes, M mlp_dim,
F features of the read-out (D, or (L+1)*D with the state's tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

if TYPE_CHECKING:
    # Slow to import. The table is read without, so that a bad file is refused at once.
    from flax import nnx

_Key = TypeVar("_Key", bound="str | Path")
Path = tuple[str | int, ...]  # ("layers", 0, "norm_input", "scale"): as in `nnx.to_flat_state`

# Axes of the PyTorch array in the order that Flax keeps them in.
LAYOUTS = {
    "same": None,
    "linear": (1, 0),  # [out, in] -> [in, out]
    "conv": (2, 3, 1, 0),  # [out, in, kh, kw] -> [kh, kw, in, out]
}


class Row(NamedTuple):
    """One parameter, or one per layer where the names hold `{l}`."""

    torch: str  # name in PyTorch
    flax: str  # path in NNX, parts joined by "/"
    shape: str  # PyTorch's shape in letters
    layout: str = "same"  # key of LAYOUTS
    part: str = "always"  # which models have it: see `_parts`


_BLOCK = "transformer.layers.{l}.0."
_LAYER = "layers/{l}/"
TABLE = (
    Row("_cls", "class_token", "1 1 D"),
    Row("pos_embedding", "pos_embedding", "1 S D"),
    Row("_seq", "hidden_class_token", "L 1 1 D"),
    Row("embedding.weight", "patch_embedding/kernel", "D 3 P P", "conv"),
    Row("embedding.bias", "patch_embedding/bias", "D"),
    Row(_BLOCK + "layer_norm_input.weight", _LAYER + "norm_input/scale", "D"),
    Row(_BLOCK + "layer_norm_input.bias", _LAYER + "norm_input/bias", "D"),
    Row(_BLOCK + "layer_norm_hidden.weight", _LAYER + "norm_hidden/scale", "D"),
    Row(_BLOCK + "layer_norm_hidden.bias", _LAYER + "norm_hidden/bias", "D"),
    Row(_BLOCK + "layer_norm_out.weight", _LAYER + "norm_out/scale", "D"),
    Row(_BLOCK + "layer_norm_out.bias", _LAYER + "norm_out/bias", "D"),
    Row(_BLOCK + "attention.to_qkv.weight", _LAYER + "attention/to_qkv/kernel", "3D D", "linear"),
    Row(_BLOCK + "attention.to_qkv.bias", _LAYER + "attention/to_qkv/bias", "3D"),
    Row(
        _BLOCK + "attention.to_qkv_h.weight",
        _LAYER + "attention/to_qkv_hidden/kernel",
        "3D D",
        "linear",
    ),
    Row(_BLOCK + "attention.to_qkv_h.bias", _LAYER + "attention/to_qkv_hidden/bias", "3D"),
    Row(_BLOCK + "attention.to_out.0.weight", _LAYER + "attention/to_out/kernel", "D D", "linear"),
    Row(_BLOCK + "attention.to_out.0.bias", _LAYER + "attention/to_out/bias", "D"),
    Row(
        _BLOCK + "attention.reattn_weights",  # [old head, new head] on both sides
        _LAYER + "attention/reattention_kernel",
        "A A",
        part="reattention",
    ),
    Row(
        _BLOCK + "attention.reattn_norm.1.weight",
        _LAYER + "attention/reattention_norm/scale",
        "A",
        part="reattention",
    ),
    Row(
        _BLOCK + "attention.reattn_norm.1.bias",
        _LAYER + "attention/reattention_norm/bias",
        "A",
        part="reattention",
    ),
    Row(_BLOCK + "mlp.net.0.weight", _LAYER + "mlp/dense_in/kernel", "M D", "linear"),
    Row(_BLOCK + "mlp.net.0.bias", _LAYER + "mlp/dense_in/bias", "M"),
    Row(_BLOCK + "mlp.net.3.weight", _LAYER + "mlp/dense_out/kernel", "D M", "linear"),
    Row(_BLOCK + "mlp.net.3.bias", _LAYER + "mlp/dense_out/bias", "D"),
    Row("classifier.0.weight", "head/norm/scale", "F", part="linear head"),
    Row("classifier.0.bias", "head/norm/bias", "F", part="linear head"),
    Row("classifier.1.weight", "head/dense/kernel", "K F", "linear", "linear head"),
    Row("classifier.1.bias", "head/dense/bias", "K", part="linear head"),
    Row("fc.mlp.net.0.weight", "head/mlp/dense_in/kernel", "4F F", "linear", "mlp head"),
    Row("fc.mlp.net.0.bias", "head/mlp/dense_in/bias", "4F", part="mlp head"),
    Row("fc.mlp.net.3.weight", "head/mlp/dense_out/kernel", "F 4F", "linear", "mlp head"),
    Row("fc.mlp.net.3.bias", "head/mlp/dense_out/bias", "F", part="mlp head"),
    Row("fc.class_.weight", "head/dense/kernel", "K F", "linear", "mlp head"),
    Row("fc.class_.bias", "head/dense/bias", "K", part="mlp head"),
)


class Parameter(NamedTuple):
    """A row of the table made out for one model."""

    torch: str
    flax: Path
    torch_shape: tuple[int, ...]
    flax_shape: tuple[int, ...]
    axes: tuple[int, ...] | None  # of the PyTorch array, in Flax's order; None: as they are


def parameters(config_model: ConfigDict) -> list[Parameter]:
    """Every parameter of the model that `config.model` describes, in the table's order."""
    sizes, parts = _sizes(config_model), _parts(config_model)
    made_out = []
    for row in TABLE:
        if row.part not in parts:
            continue
        shape = tuple(sizes[letter] for letter in row.shape.split())
        axes = LAYOUTS[row.layout]
        flax_shape = shape if axes is None else tuple(shape[axis] for axis in axes)
        for layer in range(config_model.num_layers) if "{l}" in row.flax else (0,):
            name, path = row.torch.format(l=layer), _path(row.flax.format(l=layer))
            made_out.append(Parameter(name, path, shape, flax_shape, axes))
    return made_out


def to_flax(
    state_dict: Mapping[str, np.ndarray], config_model: ConfigDict
) -> dict[Path, np.ndarray]:
    """PyTorch's arrays by name -> Flax's arrays by path.

    Names may all begin with `module.` (the reference under data parallelism).

    Raises:
        ValueError: names are missing, extra or misshapen for this model; the message lists all.
    """
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): array for name, array in state_dict.items()}
    wanted = parameters(config_model)
    _audit("PyTorch weights", state_dict, {p.torch: p.torch_shape for p in wanted})
    return {p.flax: _transposed(state_dict[p.torch], p.axes) for p in wanted}


def to_torch(flat: Mapping[Path, np.ndarray], config_model: ConfigDict) -> dict[str, np.ndarray]:
    """Flax's arrays by path -> PyTorch's arrays by name: the inverse of `to_flax`.

    Raises:
        ValueError: paths are missing, extra or misshapen for this model; the message lists all.
    """
    wanted = parameters(config_model)
    _audit("Flax weights", flat, {p.flax: p.flax_shape for p in wanted})
    inverse = {p.flax: None if p.axes is None else tuple(np.argsort(p.axes)) for p in wanted}
    return {p.torch: _transposed(flat[p.flax], inverse[p.flax]) for p in wanted}


def flatten(model: nnx.Module) -> dict[Path, np.ndarray]:
    """The model's parameters by path, used and unused; random-number states are left out."""
    return {path: np.asarray(variable.get_value()) for path, variable in _variables(model)}


def load_into(model: nnx.Module, flat: Mapping[Path, np.ndarray]) -> None:
    """Puts copies of the arrays in the model, in their own dtype (float64 with x64 enabled).

    Raises:
        ValueError: paths are missing, extra or misshapen for this model; the message lists all.
    """
    import jax.numpy as jnp
    from flax import nnx

    variables = dict(_variables(model))
    shapes = {path: variable.get_value().shape for path, variable in variables.items()}
    _audit("Flax weights", flat, shapes)
    pairs = [
        (path, variable.replace(jnp.array(flat[path]))) for path, variable in variables.items()
    ]
    nnx.update(model, nnx.from_flat_state(pairs))


def _sizes(config_model: ConfigDict) -> dict[str, int]:
    hidden_size = config_model.hidden_size
    concatenates = config_model.readout == "class_and_hidden_tokens"
    features = (config_model.num_layers + 1) * hidden_size if concatenates else hidden_size
    return {
        "1": 1,
        "3": 3,
        "P": config_model.patch_size,
        "S": (config_model.image_size // config_model.patch_size) ** 2 + 1,
        "D": hidden_size,
        "3D": 3 * hidden_size,
        "L": config_model.num_layers,
        "A": config_model.num_heads,
        "K": config_model.num_classes,
        "M": config_model.mlp_dim,
        "F": features,
        "4F": 4 * features,
    }


def _parts(config_model: ConfigDict) -> set[str]:
    parts = {"always", f"{config_model.head} head"}
    if config_model.attention == "reattention" or config_model.unused_reattention:
        parts.add("reattention")
    return parts


def _path(text: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in text.split("/"))


def _transposed(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return np.ascontiguousarray(array if axes is None else np.transpose(array, axes))


def _variables(model: nnx.Module) -> Iterable[tuple[Path, nnx.Variable[Any]]]:
    from flax import nnx

    # Flax allows other keys in a path; those of a module are names and numbers.
    return nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))  # type: ignore[return-value]


def _audit(
    what: str, arrays: Mapping[_Key, np.ndarray], shapes: Mapping[_Key, tuple[int, ...]]
) -> None:
    def names(keys: Iterable[str | Path]) -> str:
        return ", ".join(key if isinstance(key, str) else "/".join(map(str, key)) for key in keys)

    missing = [key for key in shapes if key not in arrays]
    extra = [key for key in arrays if key not in shapes]
    misshapen = [
        f"{names([key])} is {list(arrays[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in arrays and tuple(arrays[key].shape) != tuple(shape)
    ]
    problems = []
    if missing:
        problems.append(f"missing: {names(missing)}")
    if extra:
        problems.append(f"extra: {names(extra)}")
    if misshapen:
        problems.append(f"misshapen: {', '.join(misshapen)}")
    if problems:
        raise ValueError(f"the {what} do not fit config.model: {'; '.join(problems)}")
