"""Proves which function a TorchScript file computes, by running it beside every candidate.

The file runs in a child process under a time limit. The candidates are our own PyTorch RViT with
the file's weights; whichever computes the file's answers is then held against the Flax model.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import rvit_jax
from configs import base
from weights_converter import mapping
from weights_converter.recognise import Recognised, baked_frames
from weights_converter.run_archive import for_torch, seeded_clips
from weights_converter.torch_rvit import TorchRViT

# Relative to the largest absolute value.
SCREEN_BAR = 1e-3  # a candidate that comes no nearer is another function
PROOF_BAR = 1e-5  # the Flax model against the file
# What rounding alone does may be more (sharp attention, half precision); then so many times it.
ROUNDING_FACTOR = 3.0

# What a traced file may have baked in, where its code does not tell.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 3, 5, 6, 10, 12, 20, 24, 48)
COMPARED_CLIPS = 2  # of an accepted batch


class NotRun(Exception):  # noqa: N818 - says what happened
    """The file could not be run here; the message says why."""


class NotProven(ValueError):  # noqa: N818 - says what happened
    """The file ran, and computes what no candidate does; the message shows the closest."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One reading of the file.

    Attributes:
        attention: kind.
        num_heads: of it.
        keeps_positions: the new state is a + g, positions kept (the reference's source), or a + h.
        learned_token: token 0 of the first state is the learned one, or zeros.
    """

    attention: str
    num_heads: int
    keeps_positions: bool = True
    learned_token: bool = True

    def model_config(self, found: Recognised) -> ConfigDict:
        """`config.model` of the file, read like this."""
        return found.model_config(
            self.attention,
            self.num_heads,
            state_keeps_positions=self.keeps_positions,
            learned_hidden_token=self.learned_token,
        )

    def __str__(self) -> str:
        return (
            f"{self.attention}, {self.num_heads} heads, state "
            f"{'a + g' if self.keeps_positions else 'a + h'}, token 0 "
            f"{'learned' if self.learned_token else 'zeros'}"
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate beside the file; errors relative to the largest absolute value.

    Attributes:
        candidate: what was tried.
        logits: largest error.
        state: largest error; None where the file returns no state.
    """

    candidate: Candidate
    logits: float
    state: float | None


@dataclasses.dataclass(frozen=True)
class Proof:
    """What running the file proved.

    Attributes:
        candidate: the reading that holds.
        clips: batch and frames of the trial, [B, T].
        logits: error of the Flax model against the file.
        state: the same for the state; None where the file returns none that can be compared.
        rounding: what PyTorch's own rounding in the file's precision does to the logits, against
            float64: no proof can be finer.
        dtype: the file's precision.
        trials: every candidate.
        notes: what was not compared.
    """

    candidate: Candidate
    clips: tuple[int, int]
    logits: float
    state: float | None
    rounding: float
    dtype: str
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a file answered to `seeded_clips`.

    Attributes:
        clips: batch and frames, [B, T].
        video: the first clips of the batch, [B', T, H, W, 3].
        logits: of those, [B', K].
        state: of those, [L, B', S, D], or without token 0; None where there is none.
        dtype: the file's precision.
        notes: what came that is none of these.
    """

    clips: tuple[int, int]
    video: np.ndarray
    logits: np.ndarray
    state: np.ndarray | None
    dtype: torch.dtype
    notes: tuple[str, ...]

    def errors(self, logits: np.ndarray, state: np.ndarray) -> tuple[float, float | None]:
        """Of a model's logits and whole state, against the file's."""
        if self.state is None:
            return relative_error(logits, self.logits), None
        tokens = self.state.shape[2]  # all, or all but the first
        return relative_error(logits, self.logits), relative_error(
            state[:, :, -tokens:], self.state
        )


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest absolute value of `theirs`.

    Infinite where shapes differ or a value is not finite.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    error = float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))
    return error if np.isfinite(error) else float("inf")


def run_in_child(
    file: Path, request: dict[str, Any], timeout: float
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs the file; returns `run_archive`'s result and its arrays by file name.

    Raises:
        NotRun: it took too long, or the process died.
    """
    with tempfile.TemporaryDirectory(prefix="rvit_jax_") as folder:
        request_file = Path(folder) / "request.json"
        request_file.write_text(json.dumps(request))
        command = [sys.executable, "-m", "weights_converter.run_archive"]
        try:
            done = subprocess.run(
                [*command, str(Path(file).resolve()), str(request_file), folder],
                cwd=Path(__file__).resolve().parents[1],
                timeout=timeout,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NotRun(f"it did not end within {timeout:g} s (--timeout)") from error
        result_file = Path(folder) / "result.json"
        if not result_file.exists():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise NotRun(f"its process ended with status {done.returncode}: {lines[-1]}")
        result = json.loads(result_file.read_text())
        if "failed" in result:
            raise NotRun(result["failed"])
        arrays = {f.stem: np.load(f, allow_pickle=False) for f in Path(folder).glob("*.npy")}
    return result, arrays


def prove(found: Recognised, *, timeout: float = 120.0) -> Proof:
    """Runs the file and finds the candidate that computes the same.

    Args:
        found: the recognised file.
        timeout: of each run of the file, in seconds.

    Raises:
        NotRun: the file has no code, or cannot be run here.
        NotProven: it runs, and nothing matches.
    """
    trials: dict[Candidate, Trial] = {}
    for answers in run_whole(found, timeout=timeout):
        if not np.isfinite(answers.logits).all():
            raise NotProven(f"{found.source.path} answers with NaN or infinite logits")
        tried = list(_try_candidates(found, answers))
        trials |= {trial.candidate: trial for trial in tried}
        best = min(tried, key=lambda trial: (trial.logits, trial.state or 0.0))
        rounding = _rounding(found, best.candidate, answers)
        if _within((best.logits, best.state), rounding, SCREEN_BAR):
            return _hold_against_flax(found, best.candidate, answers, rounding, tuple(tried))
    closest = sorted(trials.values(), key=lambda trial: trial.logits)[:5]
    raise NotProven(
        f"{found.source.path} runs, but computes what no candidate does; the closest: "
        + "; ".join(f"{t.candidate}: {_errors_text(t.logits, t.state)}" for t in closest)
    )


def run_whole(found: Recognised, *, timeout: float) -> Iterator[Answers]:
    """The file's answers, for one batch size of each number of frames that it accepts.

    Raises:
        NotRun: the file has no code, or accepts no batch here.
    """
    if not found.source.code:
        raise NotRun(f"a {found.source.kind} holds weights and no code to run")
    sizes = found.sizes
    default = base.get_config().dataset.num_frames
    frames = dict.fromkeys((baked_frames(found.source) or default, default, 32, 16, 12, 8))
    pending = [[batch, count] for count in frames for batch in BATCHES]
    answered = False
    while pending:
        request = {
            "what": "whole",
            "attempts": pending,
            "image_size": sizes["image_size"],
            "state": [sizes["num_layers"], found.num_patches, sizes["hidden_size"]],
        }
        result, arrays = run_in_child(found.source.path, request, timeout)
        if result["accepted"] is None:
            break
        yield _answers(found, result, arrays)
        answered = True
        # Another batch size of as many frames would tell nothing new.
        later = pending[pending.index(result["accepted"]) + 1 :]
        pending = [entry for entry in later if entry[1] != result["accepted"][1]]
    if not answered:
        batch, count, reason = result["refused"][0]
        raise NotRun(
            f"it accepted none of {len(result['refused'])} batches; the first, {batch} clips of "
            f"{count} frames: {reason}"
        )


def _answers(found: Recognised, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> Answers:
    batch, frames = result["accepted"]
    clips = (batch, frames)
    sizes = found.sizes
    layers, hidden_size = sizes["num_layers"], sizes["hidden_size"]
    second = arrays.get("second")
    notes: tuple[str, ...] = ()
    whole, without_token = (
        (layers, clips[0], found.num_patches + more, hidden_size) for more in (1, 0)
    )
    if second is not None and second.shape not in (whole, without_token):
        notes = (f"its second output has shape {list(second.shape)}, which is no state of it",)
        second = None
    logits = arrays["logits"]
    if logits.shape != (clips[0], sizes["num_classes"]):
        raise NotProven(
            f"{found.source.path} answers {clips[0]} clips with a tensor of shape "
            f"{list(logits.shape)}, expected logits {[clips[0], sizes['num_classes']]}"
        )
    return Answers(
        clips,
        seeded_clips(batch, frames, int(sizes["image_size"]))[:COMPARED_CLIPS],
        logits[:COMPARED_CLIPS],
        None if second is None else second[:, :COMPARED_CLIPS],
        getattr(torch, result["dtype"]),
        notes,
    )


def make_oracle(found: Recognised, candidate: Candidate) -> TorchRViT:
    """Our PyTorch RViT, reading the file's weights as the candidate does."""
    oracle = TorchRViT(candidate.model_config(found))
    oracle.load_state_dict({name: torch.from_numpy(w) for name, w in found.weights.items()})
    return oracle.eval()


def run_oracle(oracle: TorchRViT, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, K] and state [L, B, S, D] in the oracle's dtype."""
    frames = for_torch(video).to(oracle._cls.dtype)
    with torch.no_grad():
        logits, state = oracle(frames, oracle.initial_state(len(video)))
    return logits.double().numpy(), state.double().numpy()


def _rounding(found: Recognised, candidate: Candidate, answers: Answers) -> tuple[float, float]:
    """What computing in the file's precision does to logits and state, against float64."""
    exact = run_oracle(make_oracle(found, candidate).double(), answers.video)
    rounded = run_oracle(make_oracle(found, candidate).to(answers.dtype), answers.video)
    logits, state = map(relative_error, rounded, exact)
    return logits, state


def _within(errors: tuple[float, float | None], rounding: tuple[float, float], bar: float) -> bool:
    """Whether errors of logits and state are below the bar, or below what rounding does."""
    return all(
        error is None
        or (np.isfinite(error) and np.isfinite(r) and error <= max(bar, ROUNDING_FACTOR * r))
        for error, r in zip(errors, rounding, strict=True)
    )


def _errors_text(logits: float, state: float | None) -> str:
    return f"logits differ by {logits:.1e}" + (
        "" if state is None else f", the state by {state:.1e}"
    )


def _try_candidates(found: Recognised, answers: Answers) -> Iterator[Trial]:
    """Every candidate; of several numbers of heads, up to the first one that matches."""
    choices = list(itertools.product((True, False), (True, False), found.possible_attentions()))
    heads = found.possible_heads()
    with tqdm(total=len(choices) * len(heads), desc="candidates", leave=False) as bar:
        for num_heads in heads:
            matched = False
            for keeps, learned, attention in choices:
                candidate = Candidate(attention, num_heads, keeps, learned)
                oracle = make_oracle(found, candidate).to(answers.dtype)
                trial = Trial(candidate, *answers.errors(*run_oracle(oracle, answers.video)))
                matched |= trial.logits <= SCREEN_BAR
                bar.update()
                yield trial
            if matched:
                return


def _hold_against_flax(
    found: Recognised,
    candidate: Candidate,
    answers: Answers,
    rounding: tuple[float, float],
    trials: tuple[Trial, ...],
) -> Proof:
    logits, state = answers.errors(*run_flax(found, candidate, answers.video))
    if not _within((logits, state), rounding, PROOF_BAR):
        raise NotProven(
            f"{found.source.path} is closest to {candidate}, but {_errors_text(logits, state)}, "
            f"where rounding does {rounding[0]:.1e} and {rounding[1]:.1e}: it computes something "
            "a little different"
        )
    dtype = str(answers.dtype).removeprefix("torch.")
    return Proof(candidate, answers.clips, logits, state, rounding[0], dtype, trials, answers.notes)


def run_flax(
    found: Recognised, candidate: Candidate, video: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, K] and state [L, B, S, D] of the Flax model with the file's weights."""
    config = candidate.model_config(found)
    model = rvit_jax.RViT(config, rngs=nnx.Rngs(0))
    model.eval()
    mapping.load_into(model, mapping.to_flax(found.weights, config))
    logits, state = nnx.jit(lambda model, video: model(video))(model, video)
    return np.asarray(logits), np.asarray(state)


def table(proof: Proof) -> str:
    """Every candidate with its errors, the one that holds marked."""
    lines = [f"{'':2}{'logits':>9} {'state':>9}  candidate"]
    for trial in sorted(proof.trials, key=lambda trial: trial.logits):
        state = f"{trial.state:9.1e}" if trial.state is not None else f"{'-':>9}"
        mark = "*" if trial.candidate == proof.candidate else " "
        lines.append(f"{mark:2}{trial.logits:9.1e} {state}  {trial.candidate}")
    return "\n".join(lines)
