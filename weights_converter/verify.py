"""Compares a PyTorch file with a checkpoint, part by part, so that a mismatch names its place."""

import dataclasses
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import rvit_jax
from rvit_jax.checkpoint import LoadedModel
from weights_converter import archive, mapping
from weights_converter import prove as proving
from weights_converter.prove import relative_error
from weights_converter.recognise import Recognised, recognise
from weights_converter.run_archive import ROOTS, run_parts, seeded_clips
from weights_converter.torch_rvit import TorchRViT

PART_FRAMES = 4  # a recurrence shows every part in two frames
BAR = 1e-5  # x the part's largest absolute value


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model on both sides.

    Attributes:
        name: "weights", "embedding", "layers.0.state", ..., "read-out", "logits".
        error: largest difference over the largest absolute value in PyTorch; None where the part
            could not be compared.
        bar: what `error` must not exceed.
        where: what differs most, or why nothing was compared.
    """

    name: str
    error: float | None
    bar: float
    where: str = ""

    @property
    def equal(self) -> bool:
        """Whether the two sides agree."""
        return self.error is not None and np.isfinite(self.error) and self.error <= self.bar


def verify(
    source: archive.Source,
    checkpoint: str | os.PathLike[str],
    *,
    prove: bool = False,
    timeout: float = 120.0,
) -> Iterator[Part]:
    """Compares weights, every part and the logits.

    Args:
        source: of the file, see `archive.read`.
        checkpoint: see `rvit_jax.load`.
        prove: run the file's own code, which the user trusts; else our PyTorch RViT with the
            file's weights stands in for it.
        timeout: of each run of the file, in seconds.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a side cannot be read, they are of different sizes, or the file cannot be run.
    """
    loaded = rvit_jax.load(checkpoint)
    config = loaded.config.model
    found = recognise(source, attention=config.attention, num_heads=config.num_heads)
    differing = [key for key, value in found.sizes.items() if config[key] != value]
    if differing:
        raise ValueError(
            f"{source.path} and {checkpoint} are different models: "
            + "; ".join(f"{k} is {found.sizes[k]} and {config[k]}" for k in differing)
        )
    yield _compare_weights(found, loaded)
    candidate = proving.Candidate(
        config.attention,
        config.num_heads,
        config.state_keeps_positions,
        config.learned_hidden_token,
    )
    if prove:
        yield from _compare_with_file(found, candidate, loaded, timeout)
    else:
        yield from _compare_with_oracle(found, candidate, loaded)


def _compare_weights(found: Recognised, loaded: LoadedModel) -> Part:
    ours = mapping.flatten(loaded.model.module)
    try:
        theirs = mapping.to_flax(found.weights, loaded.config.model)
    except ValueError as error:
        raise ValueError(f"{found.source.path} and {loaded.path}: {error}") from error
    errors = {path: relative_error(ours[path], theirs[path]) for path in theirs}
    worst = max(errors, key=errors.__getitem__)
    return Part("weights", errors[worst], 0.0, "/".join(map(str, worst)))


def _compare_with_oracle(
    found: Recognised, candidate: proving.Candidate, loaded: LoadedModel
) -> Iterator[Part]:
    oracle = proving.make_oracle(found, candidate)
    in_float64 = proving.make_oracle(found, candidate).double()
    config = loaded.config
    video = seeded_clips(1, PART_FRAMES, config.model.image_size)
    theirs = run_parts(oracle, {}, _reading(config.model), video)
    ours = _run_parts(loaded.model.module, video)
    yield from _parts(ours, theirs, theirs, in_float64, config.model, video)
    video = seeded_clips(1, config.dataset.num_frames, config.model.image_size)
    logits, exact = (proving.run_oracle(side, video)[0] for side in (oracle, in_float64))
    yield _logits(loaded, video, logits, relative_error(logits, exact))


def _compare_with_file(
    found: Recognised, candidate: proving.Candidate, loaded: LoadedModel, timeout: float
) -> Iterator[Part]:
    config = loaded.config.model
    in_float64 = proving.make_oracle(found, candidate).double()
    try:
        answers = next(proving.run_whole(found, timeout=timeout))
    except proving.NotRun as error:
        raise ValueError(f"{found.source.path}: {error}") from error
    rounded = proving.make_oracle(found, candidate).to(answers.dtype)
    clips = (answers.clips[0], PART_FRAMES)
    request = {
        "what": "parts",
        "clips": clips,
        "image_size": config.image_size,
        "names": {ours: theirs for ours, theirs in found.names.items() if ours in ROOTS},
        "reading": _reading(config),
    }
    video = seeded_clips(*clips, config.image_size)
    try:
        result, arrays = proving.run_in_child(found.source.path, request, timeout)
    except proving.NotRun as error:
        yield Part("parts", None, BAR, str(error))
    else:
        theirs = {name: arrays[f"part_{i}"] for i, name in enumerate(result["parts"])}
        ours = _run_parts(loaded.model.module, video)
        in_its_precision = run_parts(rounded, {}, _reading(config), video)
        yield from _parts(ours, theirs, in_its_precision, in_float64, config, video)
    exact, rounding = (proving.run_oracle(side, answers.video)[0] for side in (in_float64, rounded))
    yield _logits(loaded, answers.video, answers.logits, relative_error(rounding, exact))


def _reading(config: ConfigDict) -> dict[str, str | bool]:
    """What of `config.model` the parts alone do not say."""
    keys = ("readout", "state_keeps_positions", "learned_hidden_token")
    return {key: config[key] for key in keys}


def _parts(
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    rounded: dict[str, np.ndarray],
    in_float64: TorchRViT,
    config: ConfigDict,
    video: np.ndarray,
) -> Iterator[Part]:
    """Part by part; where PyTorch's own rounding does more than `BAR`, the bar is that."""
    exact = run_parts(in_float64, {}, _reading(config), video.astype(np.float64))
    for name, array in theirs.items():
        rounding = relative_error(rounded[name], exact[name])
        yield Part(name, relative_error(ours[name], array), _bar(rounding))


def _logits(loaded: LoadedModel, video: np.ndarray, theirs: np.ndarray, rounding: float) -> Part:
    ours = np.asarray(loaded.model(video)[0])
    return Part(f"logits, {video.shape[1]} frames", relative_error(ours, theirs), _bar(rounding))


def _bar(rounding: float) -> float:
    return max(BAR, proving.ROUNDING_FACTOR * rounding) if np.isfinite(rounding) else BAR


def _run_parts(model: rvit_jax.RViT, video: np.ndarray) -> dict[str, np.ndarray]:
    """As `run_archive.run_parts`, of the Flax model."""

    @nnx.jit
    def read_frame(
        model: rvit_jax.RViT, frame: jax.Array | np.ndarray, hidden: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        x = model.embed(frame)
        positions = model.pos_embedding[...]
        parts, new_hidden = {"embedding": x[:, 1:]}, []
        for index, layer in enumerate(model.layers):
            g = hidden[index] + positions
            x, gate = layer(x + positions, g)
            state = model.next_state(gate, hidden[index], g)
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
