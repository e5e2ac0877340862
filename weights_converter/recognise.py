"""Finds out which RViT a file's weights belong to, from the file alone.

Sizes, read-out and head follow from shapes. The number of heads and the kind of attention do not:
they are read from what else the file tells (module attributes, constants and calls in its code
text, the optimizer's state), each finding with its reason. Reading code proves nothing; `prove`
does.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from ml_collections import ConfigDict

from configs import base
from weights_converter import mapping
from weights_converter.archive import FileRefused, Source, class_texts

ATTENTIONS = ("linear", "softmax", "reattention")
# Attributes that say the number of heads, and those that say the width of one.
HEAD_COUNT_NAMES = ("num_heads", "heads", "n_heads", "num_attention_heads", "nhead", "n_head")
HEAD_WIDTH_NAMES = ("head_dim", "dim_head", "head_width", "head_size", "d_head")
REATTENTION = "attention.reattn_"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that shapes do not tell.

    Attributes:
        value: what was found; None where nothing tells.
        reasons: what says so.
    """

    value: str | int | None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return f"{self.value} ({'; '.join(self.reasons)})"


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
    num_heads: Finding
    attention: Finding
    notes: tuple[str, ...]

    @property
    def has_reattention(self) -> bool:
        """Whether re-attention parameters are there, used or not."""
        return any(REATTENTION in name for name in self.weights)

    def model_config(self, attention: str, num_heads: int) -> ConfigDict:
        """`config.model` of one candidate."""
        config = base.get_config().model
        config.update(
            **self.sizes,
            attention=attention,
            num_heads=num_heads,
            unused_reattention=self.has_reattention and attention != "reattention",
        )
        return config

    def possible_heads(self) -> list[int]:
        """The number of heads where it is known, else every divisor of D, likely ones first."""
        if self.num_heads.value is not None:
            return [int(self.num_heads.value)]
        width = int(self.sizes["hidden_size"])
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        return sorted(divisors, key=lambda n: abs(math.log2(n / 8)))

    def possible_attentions(self) -> list[str]:
        """The kinds that the parameters allow, the one that the file speaks for first."""
        kinds = [k for k in ATTENTIONS if k != "reattention" or self.has_reattention]
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
        ValueError: what the user says does not fit the file, or the file contradicts itself.
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
    width = int(sizes["hidden_size"])
    heads = _combine(_best_heads_evidence(source, tensors, width), "num_heads", num_heads)
    audited = base.get_config().model
    audited.update(**sizes, unused_reattention=has_reattention, attention="softmax")
    audited.num_heads = int(heads.value or 1)
    try:
        mapping.to_flax({ours: tensors[theirs] for ours, theirs in names.items()}, audited)
    except ValueError as error:
        raise FileRefused(str(error)) from error
    if heads.value is not None and (heads.value < 1 or width % heads.value):
        raise ValueError(f"{heads.value} heads do not divide the hidden size {width}")
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
    width, _, patch, _ = shape("embedding.weight", 4)
    classes, features = shape("fc.class_.weight" if head == "mlp" else "classifier.1.weight", 2)
    if features == width:
        readout = "class_token"
    elif features == (num_layers + 1) * width:
        readout = "class_and_hidden_tokens"
    else:
        raise FileRefused(
            f"the head reads {features} features; with {num_layers} layers of width {width} it "
            f"would be {width} (class token) or {(num_layers + 1) * width} (class and state tokens)"
        )
    tokens = shape(_positions_name(tensors, width), 3)[1]
    side = math.isqrt(tokens - 1)
    if side < 1 or side * side != tokens - 1:
        raise FileRefused(
            f"the positions are for {tokens - 1} patches and a class token, which is no square "
            "frame; only square frames are known here"
        )
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": num_layers,
        "mlp_dim": shape(_first_like(tensors, "transformer.layers.", ".mlp.net.0.weight"), 2)[0],
        "num_classes": classes,
        "readout": readout,
        "head": head,
    }


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


def _positions_name(tensors: Mapping[str, np.ndarray], width: int) -> str:
    """The positional embedding [1, S, D], whatever it is called."""
    if "pos_embedding" in tensors:
        return "pos_embedding"
    found = [
        name
        for name, array in tensors.items()
        if _is_root(name) and array.ndim == 3 and array.shape[::2] == (1, width)
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
    width = int(sizes["hidden_size"])
    tokens = (int(sizes["image_size"]) // int(sizes["patch_size"])) ** 2 + 1
    roots = {
        "pos_embedding": (1, tokens, width),
        "_cls": (1, 1, width),
        "_seq": (int(sizes["num_layers"]), 1, 1, width),
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


def _combine(
    evidence: Iterable[tuple[str | int, str]], what: str, asked: str | int | None
) -> Finding:
    """One finding from several reasons, or the user's word.

    Raises:
        ValueError: reasons contradict each other, and the user says nothing.
    """
    evidence = list(evidence)
    values = {value for value, _ in evidence}
    if asked is not None:
        against = [f"though {reason} says {v}" for v, reason in evidence if v != asked]
        return Finding(asked, (f"asked for with --{what}", *against))
    if len(values) > 1:
        said = "; ".join(f"{reason} says {value}" for value, reason in evidence)
        raise ValueError(f"the file contradicts itself on {what}: {said}. Decide with --{what}")
    if not values:
        return Finding(None)
    return Finding(values.pop(), tuple(dict.fromkeys(reason for _, reason in evidence)))


# --------------------------------------------------------------------------- evidence


def _attention_classes(code: Mapping[str, str]) -> list[str]:
    """Texts of the classes that own `to_qkv`."""
    texts = class_texts(dict(code)).values()
    return [text for text in texts if re.search(r"^  to_qkv : ", text, re.M)]


def _bodies(text: str) -> str:
    """A class's methods: a submodule that is declared need not be used."""
    _, found, body = text.partition("\n  def ")
    return found + body


def _best_heads_evidence(
    source: Source, tensors: Mapping[str, np.ndarray], width: int
) -> list[tuple[int, str]]:
    """A shape tells more than a name, a name more than numbers in a reshape."""
    for evidence in (_heads_from_shapes(tensors), *_heads_from_code(source, width)):
        if found := list(evidence):
            return found
    return []


def _heads_from_shapes(tensors: Mapping[str, np.ndarray]) -> Iterable[tuple[int, str]]:
    for name, array in tensors.items():
        if name.endswith("attention.reattn_weights") and array.ndim == 2:
            yield array.shape[0], "the re-attention matrix"


def _heads_from_code(source: Source, width: int) -> tuple[Iterable[tuple[int, str]], ...]:
    """By names, and by reshapes."""
    texts = _attention_classes(source.code)
    named = [
        (attribute, value, f"the attribute {attribute}")
        for name, value in source.attributes.items()
        for owner, _, attribute in [name.rpartition(".")]
        if owner.endswith("attention")
    ]
    for text in texts:
        constants = re.findall(r"^  (\w+) : Final\[\w+\] = ([\d.e+-]+)$", text, re.M)
        named += [(name, float(value), f"the constant {name}") for name, value in constants]
    by_name = (found for entry in named for found in _heads_from(*entry, width))
    by_reshape = (found for text in texts for found in _heads_from_reshapes(_bodies(text), width))
    return by_name, by_reshape


def _heads_from(
    attribute: str, value: object, reason: str, width: int
) -> Iterable[tuple[int, str]]:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return
    if attribute in HEAD_COUNT_NAMES and value == int(value):
        yield int(value), reason
    elif attribute in HEAD_WIDTH_NAMES and value == int(value) and width % int(value) == 0:
        yield width // int(value), reason
    elif attribute == "scale":  # (D/A)^-0.5
        heads = width * value * value
        if heads >= 1 and abs(heads - round(heads)) < 1e-3 and width % round(heads) == 0:
            yield round(heads), reason


def _heads_from_reshapes(body: str, width: int) -> Iterable[tuple[int, str]]:
    """Constants of a traced file: `reshape(qkv, [.., .., 3, 8, 24])`, `view(q, [.., .., 8, 24])`.

    Any list of four sizes or more will do, whatever call it stands in, but for a permutation.
    """
    for sizes in re.findall(r"\[([^\[\]()]*)\]", body):
        entries = [entry.strip() for entry in sizes.split(",") if entry.strip()]
        numbers = [int(e) if re.fullmatch(r"-?\d{1,6}", e) else None for e in entries]
        if len(numbers) < 4 or set(numbers) == set(range(len(numbers))):
            continue
        before, heads, head_width = numbers[-3:]
        told = ", ".join("?" if n is None else str(n) for n in numbers[-3:])
        reason = f"the code's reshape to [..., {told}]"
        known = [number if number and number > 0 else None for number in (heads, head_width)]
        match known:
            case [int(a), int(b)] if a * b == width:
                yield a, reason
            case [int(a), None] if before == 3:
                yield a, reason
            case [None, int(b)] if before == 3:
                yield width // b, reason


def _attention_evidence(
    source: Source, tensors: Mapping[str, np.ndarray], has_reattention: bool
) -> Iterable[tuple[str, str]]:
    bodies = "".join(map(_bodies, _attention_classes(source.code)))
    if bodies:
        elu = re.search(r"(?<![A-Za-z0-9_])elu(?![A-Za-z0-9_])", bodies)
        softmax = re.search(r"(?<!log_)softmax", bodies)
        mixes = re.search(r'self\.reattn_weights|getattr\(self, "reattn_weights"\)', bodies)
        if elu and not softmax:
            yield "linear", "its code calls elu and no softmax"
        elif softmax and mixes and not elu:
            yield "reattention", "its code calls softmax and reads reattn_weights"
        elif softmax and not elu:
            yield "softmax", "its code calls softmax and no elu"
    if has_reattention and source.optimizer is not None:
        yield from _attention_from_optimizer(source.optimizer, list(tensors))


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
        yield "softmax", "the optimizer holds no state for the re-attention parameters"
    elif not reattention & stateless:
        yield "reattention", "the optimizer trained the re-attention parameters"
