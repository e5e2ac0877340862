"""Compares a PyTorch file with a checkpoint, part by part, so that a mismatch names its place."""

import dataclasses
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rvit_jax
from rvit_jax.checkpoint import LoadedModel
from weights_converter import archive, mapping
from weights_converter.recognise import Recognised, recognise

PART_FRAMES = 4  # a recurrence shows every part in two frames
BAR = 1e-5  # x the part's largest absolute value


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model on both sides.

    Attributes:
        name: "weights", "embedding", "layers.0.state", ..., "read-out", "logits".
        error: largest difference over the largest absolute value in PyTorch.
        bar: what `error` must not exceed.
        where: what differs most, where that can be told.
    """

    name: str
    error: float
    bar: float
    where: str = ""

    @property
    def equal(self) -> bool:
        """Whether the two sides agree."""
        return self.error <= self.bar


def verify(
    file: str | os.PathLike,
    checkpoint: str | os.PathLike,
    *,
    prove: bool = False,
    timeout: float = 120.0,
) -> Iterator[Part]:
    """Compares weights, every part and the logits.

    Args:
        file: see `archive.read`.
        checkpoint: see `rvit_jax.load`.
        prove: run the file's own code, which the user trusts; else our PyTorch RViT with the
            file's weights stands in for it.
        timeout: of each run of the file, in seconds.

    Raises:
        FileNotFoundError: the file or the checkpoint is missing.
        ValueError: one cannot be read, or the file cannot be run.
    """
    loaded = rvit_jax.load(checkpoint)
    config = loaded.config.model
    found = recognise(archive.read(file), attention=config.attention, num_heads=config.num_heads)
    differing = [key for key, value in found.sizes.items() if config[key] != value]
    if differing:
        raise ValueError(
            f"{file} and {checkpoint} are different models: "
            + "; ".join(f"{k} is {found.sizes[k]} and {config[k]}" for k in differing)
        )
    yield _compare_weights(found, loaded)
    yield from _compare_parts(found, loaded, prove, timeout)


def _compare_weights(found: Recognised, loaded: LoadedModel) -> Part:
    ours = mapping.flatten(loaded.model.module)
    theirs = mapping.to_flax(found.weights, loaded.config.model)
    errors = {path: _error(ours[path], theirs[path]) for path in theirs}
    worst = max(errors, key=errors.get)
    return Part("weights", errors[worst], 0.0, "/".join(map(str, worst)))


def _compare_parts(
    found: Recognised, loaded: LoadedModel, prove: bool, timeout: float
) -> Iterator[Part]:
    from weights_converter import prove as proving
    from weights_converter.run_archive import run_parts, seeded_clips

    config = loaded.config.model
    candidate = proving.Candidate(config.attention, config.num_heads)
    side = config.image_size
    clips = (1, PART_FRAMES)
    video = seeded_clips(*clips, side)
    oracle = proving.make_oracle(found, candidate)
    in_float64 = run_parts(oracle.double(), {}, config.readout, video.astype(np.float64))
    oracle = oracle.float()
    rounded = run_parts(oracle, {}, config.readout, video)
    ours = _run_parts(loaded.model.module, video)
    if not prove:
        theirs = rounded
    else:
        request = {
            "what": "parts",
            "clips": clips,
            "image_size": side,
            "names": found.names,
            "readout": config.readout,
        }
        try:
            result, arrays = proving.run_in_child(found.source.path, request, timeout)
        except proving.NotRun as error:
            raise ValueError(f"{found.source.path}: {error}") from error
        theirs = {name: arrays[f"part_{i}"] for i, name in enumerate(result["parts"])}
    for name in theirs:
        rounding = _error(rounded[name], in_float64[name])
        bar = max(BAR, proving.ROUNDING_FACTOR * rounding)
        yield Part(name, _error(ours[name], theirs[name]), bar)
    if prove:
        proof = proving.prove(found, timeout=timeout)
        bar = max(BAR, proving.ROUNDING_FACTOR * proof.rounding)
        yield Part(f"logits, {proof.clips[1]} frames", proof.logits, bar)
    else:
        frames = loaded.config.dataset.num_frames
        video = seeded_clips(1, frames, side)
        theirs_whole = proving.run_oracle(oracle, video)[0]
        rounding = _error(theirs_whole, proving.run_oracle(oracle.double(), video)[0])
        whole = np.asarray(loaded.model(video)[0])
        bar = max(BAR, proving.ROUNDING_FACTOR * rounding)
        yield Part(f"logits, {frames} frames", _error(whole, theirs_whole), bar)


def _run_parts(model: rvit_jax.RViT, video: np.ndarray) -> dict[str, np.ndarray]:
    """As `run_archive.run_parts`, of the Flax model."""

    @nnx.jit
    def read_frame(model, frame, hidden):
        patches = model.patch_embedding(frame)
        tokens = jnp.broadcast_to(model.class_token[...], (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([tokens, patches], axis=1)
        positions = model.pos_embedding[...]
        parts, new_hidden = {"embedding": patches}, []
        for index, layer in enumerate(model.layers):
            x, state = layer(x + positions, hidden[index] + positions)
            parts[f"layers.{index}.state"], parts[f"layers.{index}.output"] = state, x
            new_hidden.append(state)
        return parts, jnp.stack(new_hidden), model.read_out(x[:, 0], jnp.stack(new_hidden))

    hidden = model.initial_hidden(len(video))
    collected = []
    for t in range(video.shape[1]):
        parts, hidden, read_out = read_frame(model, video[:, t], hidden)
        collected.append(parts)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *collected)
    return {**stacked, "read-out": np.asarray(read_out)}


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    from weights_converter.prove import relative_error

    return relative_error(ours, theirs)
