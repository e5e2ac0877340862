"""Weights of a plain vision transformer for RViT: `config.init_from=FILE.safetensors`.

A ViT (arXiv:2010.11929) is an RViT without the state: the table says what becomes what. The state's
branch (`to_qkv_hidden`, `norm_hidden`, `hidden_class_token`) is in no ViT and keeps the values that
it begins with. What the two do differently, so that even a frame alone gives other numbers:

- RViT adds the positions before every layer and to the state; a ViT once, before the first.
- The state's queries, keys and values are added to the frame's from the first frame on.
- LayerNorm's epsilon is 1e-5 in RViT, 1e-6 in timm's and 1e-12 in Hugging Face's ViT.
- A ViT has a LayerNorm behind its last layer. It becomes the head's, where that has its width
  (readout "class_token", head "linear"), and is left out otherwise.
- Frames are normalised to [-1, 1]: as for timm's `augreg` and Google's models; others (DeiT, MAE)
  were trained with ImageNet's mean and deviation.
- The file does not say how many heads there are (ViT-Ti 3, S 6, B 12, L 16): `config.model` must.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rvit_jax.shapes import HostOrDevice

Weights = dict[str, HostOrDevice]  # path in NNX ("layers/0/norm_input/scale") -> array


class Row(NamedTuple):
    """A parameter of ours, and what holds it in each kind of file.

    Attributes:
        flax: path in NNX; `{l}` is the layer.
        timm: name in timm's models.
        hugging_face: names in Hugging Face's; several are laid one under the other.
        axes: of the file's array, in our order; None: as they are.
    """

    flax: str
    timm: str
    hugging_face: tuple[str, ...]
    axes: tuple[int, ...] | None = None


def _norm(flax: str, timm: str, theirs: str) -> tuple[Row, Row]:
    return (
        Row(f"{flax}/scale", f"{timm}.weight", (f"{theirs}.weight",)),
        Row(f"{flax}/bias", f"{timm}.bias", (f"{theirs}.bias",)),
    )


def _dense(flax: str, timm: str, *theirs: str, axes: tuple[int, ...] = (1, 0)) -> tuple[Row, Row]:
    """[out, in] -> [in, out]."""
    return (
        Row(f"{flax}/kernel", f"{timm}.weight", tuple(f"{name}.weight" for name in theirs), axes),
        Row(f"{flax}/bias", f"{timm}.bias", tuple(f"{name}.bias" for name in theirs)),
    )


_OURS, _TIMM, _THEIRS = "layers/{l}/", "blocks.{l}.", "encoder.layer.{l}."
_QKV = (_THEIRS + f"attention.attention.{part}" for part in ("query", "key", "value"))
TABLE = (
    Row("class_token", "cls_token", ("embeddings.cls_token",)),
    Row("pos_embedding", "pos_embed", ("embeddings.position_embeddings",)),
    *_dense(
        "patch_embedding",
        "patch_embed.proj",
        "embeddings.patch_embeddings.projection",
        axes=(2, 3, 1, 0),  # [out, in, kh, kw] -> [kh, kw, in, out]
    ),
    *_norm(_OURS + "norm_input", _TIMM + "norm1", _THEIRS + "layernorm_before"),
    *_dense(_OURS + "attention/to_qkv", _TIMM + "attn.qkv", *_QKV),
    *_dense(_OURS + "attention/to_out", _TIMM + "attn.proj", _THEIRS + "attention.output.dense"),
    *_norm(_OURS + "norm_out", _TIMM + "norm2", _THEIRS + "layernorm_after"),
    *_dense(_OURS + "mlp/dense_in", _TIMM + "mlp.fc1", _THEIRS + "intermediate.dense"),
    *_dense(_OURS + "mlp/dense_out", _TIMM + "mlp.fc2", _THEIRS + "output.dense"),
    *_norm("head/norm", "norm", "layernorm"),
)
OPTIONAL = ("class_token", "head/norm/scale", "head/norm/bias")  # not every ViT has them


def read_vit(path: Path) -> tuple[Weights, list[str]]:
    """The weights of a ViT as ours, and the names in the file that are none of ours.

    Args:
        path: a `.safetensors` file with timm's or Hugging Face's names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no ViT of these names.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"config.init_from={path}: there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            taken = _names(path, names)
            weights: Weights = {}
            for row, sources in taken.items():
                arrays = [np.asarray(file.get_tensor(name), np.float32) for name in sources]
                weights[row.flax] = _ours(path, row, arrays, sources)
    except (SafetensorError, TypeError, OSError) as error:  # TypeError: a type NumPy has not
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    tokens = weights["pos_embedding"].shape[1]
    if weights["pos_embedding"].ndim != 3 or math.isqrt(tokens - 1) ** 2 != tokens - 1:
        raise ValueError(
            f"{path}: positions of shape {list(weights['pos_embedding'].shape)}, expected [1, S, "
            "D], S of a class token and a square of patches: a ViT with other tokens cannot be used"
        )
    used = {name for sources in taken.values() for name in sources}
    return weights, sorted(names - used)


def _names(path: Path, names: set[str]) -> dict[Row, tuple[str, ...]]:
    """Each row of the table, made out for the file's layers, and its names in the file."""
    probe = next(row for row in TABLE if row.flax == "patch_embedding/kernel")
    for theirs in ("timm", "hugging_face"):
        wanted = probe.timm if theirs == "timm" else probe.hugging_face[0]
        found = [n for n in names if n == wanted or n.endswith("." + wanted)]
        if len(found) == 1:
            prefix = found[0].removesuffix(wanted)
            break
    else:
        hint = (
            "it is an RViT of PyTorch: convert it first (python -m weights_converter to_flax)"
            if any(re.search(r"attention\.to_qkv_h\.weight$", n) for n in names)
            else f"it holds {', '.join(sorted(names)[:3]) or 'nothing'}, ..."
        )
        raise ValueError(
            f"{path} holds no ViT with timm's or Hugging Face's names, such as "
            f"{probe.timm!r} or {probe.hugging_face[0]!r}; {hint}"
        )

    def of(row: Row, layer: int) -> tuple[str, ...]:
        sources = (row.timm,) if theirs == "timm" else row.hugging_face
        return tuple(prefix + name.format(l=layer) for name in sources)

    first = next(row for row in TABLE if row.flax == "layers/{l}/norm_input/scale")
    num_layers = 0
    while set(of(first, num_layers)) <= names:
        num_layers += 1
    taken, missing = {}, []
    for row in TABLE:
        for layer in range(num_layers) if "{l}" in row.flax else (0,):
            sources = of(row, layer)
            if set(sources) <= names:
                taken[row._replace(flax=row.flax.format(l=layer))] = sources
            elif row.flax not in OPTIONAL:
                missing += sorted(set(sources) - names)
    if missing or not num_layers:
        which = ", ".join(missing) or of(first, 0)[0]
        raise ValueError(f"{path} is no whole ViT: it lacks {which}")
    return taken


def _ours(path: Path, row: Row, arrays: list[np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """A parameter in our layout."""
    for name, array in zip(names, arrays, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
        if row.axes is not None and array.ndim != len(row.axes):
            raise ValueError(f"{path}: {name} has shape {list(array.shape)}: this is no ViT's")
    try:
        array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    except ValueError as error:
        raise ValueError(f"{path}: {', '.join(names)} do not fit together: {error}") from error
    return array if row.axes is None else np.transpose(array, row.axes)
