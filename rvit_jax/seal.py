"""Checksums of what a checkpoint holds, so that damage is noticed before anything is made of it.

Orbax keeps none of array bytes, and casts what it reads to the type asked for: a flipped bit would
come back as another number, in silence.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from rvit_jax.optimizer import path_string

# In a sealed JSON file: the checksum of all the rest.
_OWN = "sha256"


class DamagedError(ValueError):
    """A file is not what was written; the message names the file and the cause."""


def seal_arrays(tree: Any) -> dict[str, str]:
    """The type, shape and SHA-256 of every array of a tree, as "float32[3,4] HEX".

    Waits for arrays on a device. Of arrays that lie on several processes, each must call it.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    on_host = [_on_host(leaf) for _, leaf in leaves]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing frees the GIL
        sums = list(pool.map(_array_sum, on_host))
    return {path_string(path): total for (path, _), total in zip(leaves, sums, strict=True)}


def kinds(tree: Any) -> dict[str, str]:
    """The type and shape of every array of a tree, "float32[3,4]"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_string(path): _kind(leaf) for path, leaf in leaves}


def kinds_of_seal(sums: Mapping[str, str]) -> dict[str, str]:
    """`kinds` of the tree that a seal was made of."""
    return {path: total.partition(" ")[0] for path, total in sums.items()}


def differing(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Names whose values differ, or that one of the two lacks."""
    return sorted(
        name for name in {*saved, *here} if name not in saved or saved[name] != here.get(name)
    )


def seal_json(content: Any) -> str:
    """The SHA-256 of what JSON says, however it is laid out."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_own_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that holds the checksum of the rest of it."""
    rest = {key: value for key, value in content.items() if key != _OWN}
    return {**rest, _OWN: seal_json(rest)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object agrees with its own checksum; one without says nothing against it."""
    rest = {key: value for key, value in content.items() if key != _OWN}
    return content.get(_OWN, None) in (None, seal_json(rest))


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _kind(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _array_sum(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{_kind(array)} {hashlib.sha256(content.data).hexdigest()}"
