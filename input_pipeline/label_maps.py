"""Which class a clip shows in a mirror or run backwards, and the draws that change a clip in time.

A class map is int32 [K]: the index of the class that a clip of class k becomes, or `NEVER` where
none of the chosen classes fits, so that clips of class k must be left as they are.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline import jester

NEVER = -1
MIRROR_RULES = ("auto", "jester", "something_something", "unchanged")

# Something-Something's templates that name a side, without the brackets of its label files. The
# other 168 of its 174 say nothing of left and right ("pulling it right out" and "upright" do not).
_SIDED_TEMPLATES = (
    ("Pulling something from left to right", "Pulling something from right to left"),
    ("Pushing something from left to right", "Pushing something from right to left"),
    (
        "Turning the camera left while filming something",
        "Turning the camera right while filming something",
    ),
)
_OTHER_SIDE = {a: b for pair in _SIDED_TEMPLATES for a, b in (pair, pair[::-1])}
_STREAM = 0x61756774  # keeps these draws apart from others made of the same seed, epoch and clip


def mirror_map(class_names: Sequence[str], rule: str = "auto") -> np.ndarray:
    """The class of each class's clips seen in a mirror, left for right.

    Args:
        class_names: in index order.
        rule: `dataset.augment.mirror_classes`: "jester"; "something_something"; "unchanged": every
            class stays itself; "auto": one of the first two, found by the names.

    Returns:
        int32 [K]. A class whose mirrored class is not among `class_names` becomes `NEVER`.

    Raises:
        ValueError: the rule is unknown, or the classes are not those of the rule, or "auto" knows
            nothing of such classes.
    """
    names = tuple(class_names)
    if rule == "unchanged":
        return np.arange(len(names), dtype=np.int32)
    if rule == "auto":
        rule = _recognise(names)
    if rule == "jester":
        _check_jester(names, "dataset.augment.mirror_classes=jester")
        return _index_map(names, jester.MIRRORED)
    if rule == "something_something":
        plain = tuple(_without_brackets(name) for name in names)
        return _index_map(plain, {name: _OTHER_SIDE.get(name, name) for name in plain})
    raise ValueError(
        f"dataset.augment.mirror_classes is {rule!r}; choose one of: {', '.join(MIRROR_RULES)}"
    )


def reversal_map(class_names: Sequence[str]) -> np.ndarray:
    """The class of each class's clips run backwards; known for Jester's classes alone.

    Args:
        class_names: in index order, from Jester's 27.

    Returns:
        int32 [K]. `NEVER` for Thumb Up, Thumb Down, Stop Sign and Doing other things, whose
        reversal shows no gesture of the 27, and where the reversed class is not among them.

    Raises:
        ValueError: a class is none of Jester's.
    """
    names = tuple(class_names)
    _check_jester(names, "dataset.augment.time_reversal above 0", "dataset.augment.time_reversal=0")
    return _index_map(names, jester.REVERSED)


def map_label(
    label: int | np.integer | np.ndarray, class_map: np.ndarray
) -> int | np.ndarray | None:
    """The label of the mirrored or reversed clip, or None where the clip must stay as it is.

    Args:
        label: a class index, or one number per class [K], those above 0 being the clip's classes.
        class_map: int [K].

    Returns:
        A label of the same kind. None: one of the clip's classes maps to `NEVER`, or the clip has
        no label (-1).
    """
    if np.ndim(label) == 0:
        mapped = int(class_map[label]) if label >= 0 else NEVER
        return None if mapped == NEVER else mapped
    present = np.flatnonzero(label)
    if np.any(class_map[present] == NEVER):
        return None
    moved = np.zeros_like(label)
    moved[class_map[present]] = np.asarray(label)[present]
    return moved


def clip_generator(seed: int, epoch: int, clip_id: str) -> np.random.Generator:
    """The random numbers of one clip in one epoch: the same wherever and whenever it is read.

    Args:
        seed: the config's, from 0.
        epoch: counted from 0.
        clip_id: the clip's id.
    """
    return np.random.default_rng([seed, epoch, zlib.crc32(clip_id.encode()), _STREAM])


def reverse_indices(indices: np.ndarray) -> np.ndarray:
    """The frames [n] of a clip from the last to the first: before a short clip is filled up."""
    return np.ascontiguousarray(indices[::-1])


def reverse_at_random(
    indices: np.ndarray,
    label: int | np.ndarray,
    class_map: np.ndarray,
    *,
    probability: float,
    random: np.random.Generator,
) -> tuple[np.ndarray, int | np.ndarray]:
    """Runs a clip backwards with a probability, and gives it the class that it then shows.

    Args:
        indices: the clip's frames, int [n], before a short clip is filled up.
        label: a class index, or one number per class [K].
        class_map: of `reversal_map`.
        probability: `dataset.augment.time_reversal`, 0 to 1.
        random: of `clip_generator`. One number is drawn, whatever the class.

    Returns:
        Indices [n] and the label, both as they were where the class has no reversal.

    Raises:
        ValueError: the probability is not within 0 and 1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"dataset.augment.time_reversal is {probability}; expected 0 to 1")
    chosen = random.random() < probability
    mapped = map_label(label, class_map) if chosen else None
    return (indices, label) if mapped is None else (reverse_indices(indices), mapped)


def jitter_stride(stride: float, rates: Sequence[float], *, random: np.random.Generator) -> float:
    """The stride of a clip that plays faster or slower by a random factor.

    Args:
        stride: source frames from one taken frame to the next, above 0.
        rates: `dataset.augment.frame_rate_jitter`, lowest and highest factor: at 2 the clip plays
            twice as fast. Drawn evenly in its logarithm, so that 1/2 is as likely as 2.
        random: of `clip_generator`. One number is drawn.

    Returns:
        The stride, source frames, above 0; seldom whole.

    Raises:
        ValueError: `rates` are not two numbers above 0 in order.
    """
    if len(rates) != 2 or not 0 < rates[0] <= rates[1] < math.inf:
        raise ValueError(
            f"dataset.augment.frame_rate_jitter is {tuple(rates)}; expected (lowest, highest) "
            "with 0 < lowest <= highest; (1.0, 1.0) changes nothing"
        )
    share = random.random()
    if rates[0] == rates[1]:  # exactly: 2 ** log2(r) may differ from r in the last bit
        return stride * rates[0]
    return stride * math.exp(math.log(rates[0]) + share * math.log(rates[1] / rates[0]))


def _index_map(names: tuple[str, ...], becomes: Mapping[str, str]) -> np.ndarray:
    index: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return np.array([index.get(becomes.get(name), NEVER) for name in names], np.int32)


def _without_brackets(name: str) -> str:
    return name.replace("[", "").replace("]", "")


def _recognise(names: tuple[str, ...]) -> str:
    """The rule for these names; the names are never guessed to be without sides."""
    if set(names) <= set(jester.CLASS_NAMES):
        return "jester"
    if any(_without_brackets(name) in _OTHER_SIDE for name in names):
        return "something_something"
    unknown = next(name for name in names if name not in jester.CLASS_NAMES)
    raise ValueError(
        "dataset.augment.horizontal_flip: it is not known what the mirror image of the class "
        f"{unknown!r} is called. Where no class depends on left and right (Kinetics, Charades), "
        "set dataset.augment.mirror_classes=unchanged; for a part of Something-Something, "
        "something_something; otherwise dataset.augment.horizontal_flip=0"
    )


def _check_jester(names: tuple[str, ...], wanted: str, remedy: str = "") -> None:
    for name in names:
        if name not in jester.CLASS_NAMES:
            near = difflib.get_close_matches(name, jester.CLASS_NAMES, n=1, cutoff=0.8)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{wanted}: the class {name!r} is none of Jester's 27{hint}, the only ones whose "
                f"mirrored and reversed classes are known: set "
                f"{remedy or 'dataset.augment.mirror_classes=unchanged or horizontal_flip=0'}"
            )
