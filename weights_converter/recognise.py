"""Finds out which RViT a file's weights belong to, from the file alone.

Sizes, read-out and head follow from shapes. The number of heads and the kind of attention do not:
they are read from what else the file tells (module attributes, constants and calls in its code
text, the optimizer's state), each finding with its reason. Reading code proves nothing; `prove`
does.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeGuard, TypeVar

import numpy as np
from ml_collections import ConfigDict

from configs import base
from rvit_jax.config import ATTENTION_KINDS
from weights_converter import mapping
from weights_converter.archive import FileRefused, Source

MAX_LISTS = 5_000  # of sizes, looked at in one class of a code text
# Attributes that say the number of heads, and those that say the width of one.
HEAD_COUNT_NAMES = ("num_heads", "heads", "n_heads", "num_attention_heads", "nhead", "n_head")
HEAD_WIDTH_NAMES = ("head_dim", "dim_head", "head_width", "head_size", "d_head")
REATTENTION = "attention.reattn_"


_T = TypeVar("_T", bound=int | str)


@dataclasses.dataclass(frozen=True)
class Finding(Generic[_T]):
    """Something that a name or a shape of the weights does not settle.

    Attributes:
        value: what was found; None where nothing tells, or the reasons contradict each other.
        reasons: what says so.
        certain: the user says it, or a shape does; the rest is evidence.
    """

    value: _T | None
    reasons: tuple[str, ...] = ()
    certain: bool = False

    def __str__(self) -> str:
        value = "undecided" if self.value is None else self.value
        return f"{value} ({'; '.join(self.reasons) or 'nothing tells'})"


@dataclasses.dataclass(frozen=True)
class Recognised:
    """An RViT in a file.

    Attributes:
        source: the file.
        weights: float32 by the reference's names, in the file's order.
        names: the reference's name -> the file's.
        sizes: the keys of `config.model` that follow from shapes.
        num_heads: the number of heads, as far as the file tells.
        attention: the kind of attention, as far as the file tells.
        notes: what was changed on the way.
    """

    source: Source
    weights: dict[str, np.ndarray]
    names: dict[str, str]
    sizes: dict[str, int | str]
    num_heads: Finding[int]
    attention: Finding[str]
    notes: tuple[str, ...]

    @property
    def has_reattention(self) -> bool:
        """Whether re-attention parameters are there, used or not."""
        return any(REATTENTION in name for name in self.weights)

    @property
    def num_patches(self) -> int:
        """N of a frame."""
        return _num_patches(self.sizes)

    def model_config(
        self,
        attention: str,
        num_heads: int,
        *,
        state_keeps_positions: bool = True,
        learned_hidden_token: bool = True,
    ) -> ConfigDict:
        """`config.model` of one reading of the file."""
        config = base.get_config().model
        config.update(
            **self.sizes,
            attention=attention,
            num_heads=num_heads,
            state_keeps_positions=state_keeps_positions,
            learned_hidden_token=learned_hidden_token,
            unused_reattention=self.has_reattention and attention != "reattention",
        )
        return config

    def possible_heads(self) -> list[int]:
        """The number of heads where it is certain, else every divisor of D, likely ones first."""
        if self.num_heads.certain and self.num_heads.value is not None:
            return [self.num_heads.value]
        hidden_size, likely = int(self.sizes["hidden_size"]), self.num_heads.value or 8
        divisors = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
        return sorted(divisors, key=lambda n: abs(math.log2(n / likely)))

    def possible_attentions(self) -> list[str]:
        """The kinds that the parameters allow, the one that the file speaks for first."""
        kinds = [k for k in ATTENTION_KINDS if k != "reattention" or self.has_reattention]
        return sorted(kinds, key=lambda kind: kind != self.attention.value)


def recognise(
    source: Source, *, attention: str | None = None, num_heads: int | None = None
) -> Recognised:
    """Recognises the model.

    Args:
        source: what `archive.read` found.
        attention: the user's word on it; it wins over the evidence.
        num_heads: the same.

    Raises:
        FileRefused: this is no RViT: names are missing, extra or misshapen, or a value is not
            finite.
        ValueError: what the user says does not fit the file.
    """
    try:
        return _recognise(source, attention, num_heads)
    except FileRefused as error:
        raise FileRefused(f"{source.path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _recognise(source: Source, attention: str | None, num_heads: int | None) -> Recognised:
    tensors, notes = _plain_names(source.tensors)
    _check_is_rvit(tensors)
    sizes = _sizes(tensors)
    names = _reference_names(tensors, sizes)
    # The audit needs no knowledge of the attention: heads show in the re-attention's shapes alone.
    has_reattention = any(REATTENTION in name for name in names)
    hidden_size = int(sizes["hidden_size"])
    heads = _find_heads(source, tensors, hidden_size, num_heads)
    if heads.value is not None and not (
        1 <= heads.value <= hidden_size and hidden_size % heads.value == 0
    ):
        raise ValueError(f"{heads.value} heads do not divide the hidden size {hidden_size}")
    audited = base.get_config().model
    audited.update(**sizes, unused_reattention=has_reattention, attention="softmax")
    audited.num_heads = heads.value or 1
    try:
        mapping.to_flax({ours: tensors[theirs] for ours, theirs in names.items()}, audited)
    except ValueError as error:
        raise FileRefused(str(error)) from error
    kind = _combine(_attention_evidence(source, tensors, has_reattention), "attention", attention)
    if kind.value == "reattention" and not has_reattention:
        raise ValueError("attention 'reattention', but the file has no re-attention parameters")
    weights, more = _to_float32(tensors, names)
    return Recognised(source, weights, names, sizes, heads, kind, (*notes, *more))


def _plain_names(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    if tensors and all(name.startswith("module.") for name in tensors):
        plain = {name.removeprefix("module."): array for name, array in tensors.items()}
        return plain, ["every name began with `module.` (data parallelism)"]
    return dict(tensors), []


def _check_is_rvit(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses another network in one sentence; an RViT with faults passes to the audit."""
    some = ("embedding.weight", "transformer.layers.0.0.attention.to_qkv_h.weight")
    missing = [name for name in some if name not in tensors]
    if len(missing) == len(some):
        first = ", ".join(list(tensors)[:4]) or "none"
        raise FileRefused(
            f"no RViT: it lacks {' and '.join(missing)}; its tensors are called {first}, ..."
        )


def _sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, int | str]:
    """The keys of `config.model` that follow from shapes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        array = tensors.get(name)
        if array is None:
            raise FileRefused(_say_missing(tensors, num_layers, head))
        if array.ndim != rank or 0 in array.shape:
            raise FileRefused(f"{name} is {list(array.shape)}, expected {rank} dimensions")
        return array.shape

    layers = {
        int(found.group(1))
        for name in tensors
        if (found := re.match(r"transformer\.layers\.(\d{1,3})\.", name))
    }
    num_layers = max(layers, default=0) + 1
    head = "mlp" if any(name.startswith("fc.") for name in tensors) else "linear"
    hidden_size, _, patch, _ = shape("embedding.weight", 4)
    classes, features = shape("fc.class_.weight" if head == "mlp" else "classifier.1.weight", 2)
    if features == hidden_size:
        readout = "class_token"
    elif features == (num_layers + 1) * hidden_size:
        readout = "class_and_hidden_tokens"
    else:
        raise FileRefused(
            f"the head reads {features} features; with {num_layers} layers of width {hidden_size} "
            f"it would be {hidden_size} (class token) or {(num_layers + 1) * hidden_size} (class "
            "and state tokens)"
        )
    tokens = shape(_positions_name(tensors, hidden_size), 3)[1]
    side = math.isqrt(tokens - 1)
    if side < 1 or side * side != tokens - 1:
        raise FileRefused(
            f"the positions are for {tokens - 1} patches and a class token, which is no square "
            "frame; only square frames are known here"
        )
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "mlp_dim": shape(_first_like(tensors, "transformer.layers.", ".mlp.net.0.weight"), 2)[0],
        "num_classes": classes,
        "readout": readout,
        "head": head,
    }


def _num_patches(sizes: Mapping[str, int | str]) -> int:
    return (int(sizes["image_size"]) // int(sizes["patch_size"])) ** 2


def _first_like(tensors: Mapping[str, np.ndarray], start: str, end: str) -> str:
    """A name that is there if any such is: of a layer that is missing, the audit tells."""
    matches = (name for name in tensors if name.startswith(start) and name.endswith(end))
    return next(matches, f"{start}0.0{end}")


def _say_missing(tensors: Mapping[str, np.ndarray], num_layers: int, head: str) -> str:
    """All that is missing, where so much is that the sizes are unknown."""
    config = base.get_config().model
    config.update(num_layers=num_layers, head=head)
    missing = [p.torch for p in mapping.parameters(config) if p.torch not in tensors]
    return f"the PyTorch weights do not fit an RViT of {num_layers} layers: missing: " + ", ".join(
        missing
    )


def _is_root(name: str) -> bool:
    return "." not in name


def _positions_name(tensors: Mapping[str, np.ndarray], hidden_size: int) -> str:
    """The positional embedding [1, S, D], whatever it is called."""
    if "pos_embedding" in tensors:
        return "pos_embedding"
    found = [
        name
        for name, array in tensors.items()
        if _is_root(name) and array.ndim == 3 and array.shape[::2] == (1, hidden_size)
        if array.shape[1] > 1
    ]
    if len(found) != 1:
        raise FileRefused(
            "the PyTorch weights lack pos_embedding, and "
            + (f"{' and '.join(found)} could both be it" if found else "nothing has its shape")
        )
    return found[0]


def _reference_names(
    tensors: Mapping[str, np.ndarray], sizes: Mapping[str, int | str]
) -> dict[str, str]:
    """The reference's name -> the file's. Root parameters of other names go by their shape."""
    hidden_size = int(sizes["hidden_size"])
    roots = {
        "pos_embedding": (1, _num_patches(sizes) + 1, hidden_size),
        "_cls": (1, 1, hidden_size),
        "_seq": (int(sizes["num_layers"]), 1, 1, hidden_size),
    }
    free = {n: a.shape for n, a in tensors.items() if _is_root(n) and n not in roots}
    names = {}
    for wanted, shape in roots.items():
        matches = [name for name, other in free.items() if other == shape]
        if wanted not in tensors and len(matches) == 1:
            names[matches[0]] = wanted
    return {names.get(name, name): name for name in tensors}


def _to_float32(
    tensors: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    notes = [
        f"{theirs} is taken for {ours}, by its shape"
        for ours, theirs in names.items()
        if ours != theirs
    ]
    dtypes = {tensors[name].dtype for name in names.values()}
    whole = [name for name in names.values() if tensors[name].dtype.kind != "f"]
    if whole:
        raise FileRefused(f"{whole[0]} holds {tensors[whole[0]].dtype}, expected floats")
    bad = [name for name in names.values() if not np.isfinite(tensors[name]).all()]
    if bad:
        raise FileRefused(f"{len(bad)} tensors hold NaN or infinite values: {', '.join(bad[:4])}")
    if np.dtype(np.float64) in dtypes:
        notes.append("float64 weights were rounded to float32")
    if np.dtype(np.float16) in dtypes:
        notes.append("half-precision weights became float32, exactly")
    with np.errstate(over="ignore"):
        weights = {ours: tensors[theirs].astype(np.float32) for ours, theirs in names.items()}
    lost = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if lost:
        raise FileRefused(f"{lost[0]} holds values that float32 cannot")
    return weights, notes


def _combine(evidence: Iterable[tuple[_T, str]], what: str, asked: _T | None) -> Finding[_T]:
    """One finding from several reasons, or the user's word."""
    evidence = list(dict.fromkeys(evidence))
    if asked is not None:
        against = [f"though {reason} says {v}" for v, reason in evidence if v != asked]
        return Finding(asked, (f"asked for with --{what}", *against), certain=True)
    values = {value for value, _ in evidence}
    if len(values) > 1:
        return Finding(None, tuple(f"{reason} says {value}" for value, reason in evidence))
    return Finding(values.pop() if values else None, tuple(reason for _, reason in evidence))


# --------------------------------------------------------------------------- evidence


def baked_frames(source: Source) -> int | None:
    """The number of frames in a traced file's code: each block has a method for every frame."""
    for text in source.classes.values():
        calls = re.findall(r"^  def forward(\d{1,4})\(", text, re.M)
        if calls and re.search(r"^  layer_norm_hidden : ", text, re.M):
            return max(map(int, calls)) + 1
    return None


def _attention_classes(source: Source) -> list[str]:
    """Texts of the classes that own `to_qkv`."""
    texts = source.classes.values()
    return [text for text in texts if re.search(r"^  to_qkv : ", text, re.M)]


def _bodies(text: str) -> str:
    """A class's methods: a submodule that is declared need not be used."""
    _, found, body = text.partition("\n  def ")
    return found + body


def _find_heads(
    source: Source, tensors: Mapping[str, np.ndarray], hidden_size: int, asked: int | None
) -> Finding[int]:
    """A shape tells more than a name, a name more than a number in a reshape, that than a scale."""
    by_shape = [
        (array.shape[0], "the re-attention matrix")
        for name, array in tensors.items()
        if name.endswith("attention.reattn_weights") and array.ndim == 2
    ]
    texts = _attention_classes(source)
    named = [
        (attribute, value, f"the attribute {attribute}")
        for name, value in source.attributes.items()
        for owner, _, attribute in [name.rpartition(".")]
        if owner.endswith("attention")
    ]
    for text in texts:
        constants = re.findall(r"^  (\w+) : Final\[\w+\] = (\d+\.?\d*)$", text, re.M)
        named += [(name, float(value), f"the constant {name}") for name, value in constants]
    by_name = (found for entry in named for found in _heads_by_name(*entry, hidden_size))
    by_reshape = (
        found for text in texts for found in _heads_from_reshapes(_bodies(text), hidden_size)
    )
    by_scale = (found for entry in named for found in _heads_by_scale(*entry, hidden_size))
    for evidence in (by_shape, by_name, by_reshape, by_scale):
        if reasons := list(evidence):
            found = _combine(reasons, "num_heads", asked)
            told = evidence is by_shape and found.value is not None
            return dataclasses.replace(found, certain=found.certain or told)
    return _combine([], "num_heads", asked)


def _heads_by_name(
    attribute: str, value: object, reason: str, hidden_size: int
) -> Iterable[tuple[int, str]]:
    if not _is_number(value) or value != int(value) or not 1 <= value <= hidden_size:
        return
    if attribute in HEAD_COUNT_NAMES:
        yield int(value), reason
    elif attribute in HEAD_WIDTH_NAMES and hidden_size % int(value) == 0:
        yield hidden_size // int(value), reason


def _heads_by_scale(
    attribute: str, value: object, reason: str, hidden_size: int
) -> Iterable[tuple[int, str]]:
    """(D/A)^-0.5. Some write D^-0.5 whatever the number of heads: 1 head says nothing."""
    if attribute != "scale" or not _is_number(value) or not 0 < value <= 1:
        return
    heads = hidden_size * value * value
    if heads > 1.5 and abs(heads - round(heads)) < 1e-3 and hidden_size % round(heads) == 0:
        yield round(heads), reason


def _is_number(value: object) -> TypeGuard[int | float]:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
    )  # so that NaN is none


def _heads_from_reshapes(body: str, hidden_size: int) -> Iterable[tuple[int, str]]:
    """Constants of a traced file: `reshape(qkv, [.., .., 3, 8, 24])`, `view(q, [.., .., 8, 24])`.

    Any list of four to eight sizes will do, whatever call it stands in, but for a permutation.
    """
    for found in itertools.islice(re.finditer(r"\[([^\[\]]{0,200})\]", body), MAX_LISTS):
        entries = [entry.strip() for entry in found.group(1).split(",") if entry.strip()]
        numbers = [int(e) if re.fullmatch(r"-?\d{1,6}", e) else None for e in entries]
        if not 4 <= len(numbers) <= 8 or set(numbers) == set(range(len(numbers))):
            continue
        before, *last = numbers[-3:]
        told = ", ".join("?" if n is None else str(n) for n in numbers[-3:])
        reason = f"the code's reshape to [..., {told}]"
        match [number if number and number > 0 else None for number in last]:
            case [int(a), int(b)] if a * b == hidden_size:
                yield a, reason
            case [int(a), None] if before == 3 and hidden_size % a == 0:
                yield a, reason
            case [None, int(b)] if before == 3 and b < hidden_size and hidden_size % b == 0:
                yield hidden_size // b, reason


def _attention_evidence(
    source: Source, tensors: Mapping[str, np.ndarray], has_reattention: bool
) -> Iterable[tuple[str, str]]:
    texts = _attention_classes(source)
    if texts:
        elu = any(_uses(text, "elu") for text in texts)
        softmax = any(_uses(text, "softmax") for text in texts)
        mixes = any(
            re.search(r'self\.reattn_weights|getattr\(self, "reattn_weights"\)', _bodies(text))
            for text in texts
        )
        if elu and not softmax:
            yield "linear", "its code calls elu and no softmax"
        elif softmax and mixes and not elu:
            yield "reattention", "its code calls softmax and reads reattn_weights"
        elif softmax and not elu:
            yield "softmax", "its code calls softmax and no elu"
    if has_reattention and source.optimizer is not None:
        yield from _attention_from_optimizer(source.optimizer, list(tensors))


def _uses(text: str, function: str) -> bool:
    """Whether a class calls a function, or a submodule that is this function."""
    body = _bodies(text)
    if re.search(rf"(?<![A-Za-z0-9_]){function}\(|functional\.{function}\b", body):
        return True
    modules = re.findall(r"^  (\w+) : __torch__\.[\w.]*?(\w+)$", text, re.M)
    return any(
        kind.lower() == function and re.search(rf"self\.{name}\b", body) for name, kind in modules
    )


def _attention_from_optimizer(
    optimizer: Mapping[str, object], names: list[str]
) -> Iterable[tuple[str, str]]:
    """Parameters without a gradient have no state in AdamW: re-attention carried but unused."""
    from weights_converter.adamw import entries_by_name

    entries = entries_by_name(optimizer, names)
    if not entries:
        return
    stateless = {name for name in names if name not in entries}
    reattention = {name for name in names if REATTENTION in name}
    if reattention <= stateless:
        reason = "the optimizer never trained the re-attention parameters, as in the later source"
        yield "softmax", reason
    elif not reattention & stateless:
        yield "reattention", "the optimizer trained the re-attention parameters"
