"""Proves which function a TorchScript file computes, by running it beside every candidate.

The file runs in a child process under a time limit. The candidates are our own PyTorch RViT with
the file's weights; whichever computes the file's answers is then held against the Flax model.
"""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import Tensor

import rvit_jax
from configs import base
from weights_converter import mapping
from weights_converter.recognise import Recognised
from weights_converter.run_archive import for_torch, seeded_clips
from weights_converter.torch_rvit import TorchRViT

# Relative to the largest absolute logit.
SCREEN_BAR = 1e-3  # a candidate that comes no nearer is another function
PROOF_BAR = 1e-5  # the Flax model against the file
# What rounding alone does may be more (sharp attention); then this many times as much.
ROUNDING_FACTOR = 3.0

# What a traced file may have baked in, where its code does not tell.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_TRIES = 3  # batches that the file accepts and no candidate explains


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
        state: the same for the state; None where the file returns none.
        rounding: what PyTorch's own rounding does to the logits, against float64.
        trials: every candidate.
    """

    candidate: Candidate
    clips: tuple[int, int]
    logits: float
    state: float | None
    rounding: float
    trials: tuple[Trial, ...]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest absolute value of `theirs`.

    Infinite where shapes differ or a value is not finite.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    error = float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))
    return error if np.isfinite(error) else float("inf")


def run_in_child(file: Path, request: dict[str, Any], timeout: float) -> tuple[dict, dict]:
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
    if not found.source.code:
        raise NotRun(f"a {found.source.kind} holds weights and no code to run")
    pending = list(_attempts(found))
    trials: list[Trial] = []
    for _ in range(MOST_TRIES):
        result, arrays = run_in_child(
            found.source.path, {"what": "whole", **_request(found, pending)}, timeout
        )
        if result["accepted"] is None:
            break
        clips, dtype = tuple(result["accepted"]), getattr(torch, result["dtype"])
        video = seeded_clips(*clips, found.sizes["image_size"])
        tried = list(_try_candidates(found, video, arrays, dtype))
        trials += tried
        best = min(tried, key=lambda trial: (trial.logits, trial.state or 0.0))
        rounding = _rounding(found, best.candidate, video, dtype)
        bar = max(SCREEN_BAR, ROUNDING_FACTOR * rounding)
        if best.logits <= bar and (best.state or 0.0) <= bar:
            return _hold_against_flax(found, best, clips, video, arrays, rounding, tuple(trials))
        pending = pending[pending.index(list(clips)) + 1 :]
    if not trials:
        refused = result["refused"]
        raise NotRun(
            f"it accepted none of {len(refused)} batches; the last, {refused[-1][0]} clips of "
            f"{refused[-1][1]} frames: {refused[-1][2]}"
            if refused
            else "there was no batch to try"
        )
    closest = sorted(trials, key=lambda trial: trial.logits)[:5]
    raise NotProven(
        f"{found.source.path} runs, but computes what no candidate does; the closest: "
        + "; ".join(f"{t.candidate}: logits differ by {t.logits:.1e}" for t in closest)
    )


def _attempts(found: Recognised) -> Iterator[list[int]]:
    """Batches to offer, likely ones first."""
    frames = base.get_config().dataset.num_frames
    for text in found.source.code.values():
        # A traced block has a method per frame: forward, forward1, ...
        if "layer_norm_hidden : " in text and (calls := re.findall(r"def forward(\d+)\(", text)):
            frames = max(map(int, calls)) + 1
    default = base.get_config().dataset.num_frames
    for frames_tried in dict.fromkeys((frames, default, 32, 16, 8)):
        for batch in BATCHES:
            yield [batch, frames_tried]


def _request(found: Recognised, attempts: list[list[int]]) -> dict[str, Any]:
    sizes = found.sizes
    patches = (sizes["image_size"] // sizes["patch_size"]) ** 2
    return {
        "attempts": attempts,
        "image_size": sizes["image_size"],
        "state": [sizes["num_layers"], patches, sizes["hidden_size"]],
    }


class _PositionsTakenOff(torch.nn.Module):
    """An encoder whose new state is a + h: the positions in it are taken off again."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(
        self, x: Tensor, hidden: list[Tensor], positions: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """As the encoder."""
        x, new_hidden = self.encoder(x, hidden, positions)
        return x, [state - positions for state in new_hidden]


def make_oracle(found: Recognised, candidate: Candidate) -> TorchRViT:
    """Our PyTorch RViT, reading the file's weights as the candidate does."""
    oracle = TorchRViT(found.model_config(candidate.attention, candidate.num_heads))
    oracle.load_state_dict({name: torch.from_numpy(w) for name, w in found.weights.items()})
    if not candidate.learned_token:
        torch.nn.init.zeros_(oracle._seq)
    if not candidate.keeps_positions:
        oracle.transformer = _PositionsTakenOff(oracle.transformer)
    return oracle.eval()


def run_oracle(oracle: TorchRViT, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, K] and state [L, B, S, D] in the oracle's dtype."""
    frames = for_torch(video).to(oracle._cls.dtype)
    with torch.no_grad():
        logits, state = oracle(frames, oracle.initial_state(len(video)))
    return logits.double().numpy(), state.double().numpy()


def _rounding(
    found: Recognised, candidate: Candidate, video: np.ndarray, dtype: torch.dtype
) -> float:
    """What computing in the file's precision does to the logits, against float64."""
    exact, _ = run_oracle(make_oracle(found, candidate).double(), video)
    return relative_error(run_oracle(make_oracle(found, candidate).to(dtype), video)[0], exact)


def _try_candidates(
    found: Recognised, video: np.ndarray, arrays: dict[str, np.ndarray], dtype: torch.dtype
) -> Iterator[Trial]:
    """Every candidate; of several numbers of heads, up to the first one that matches."""
    for num_heads in found.possible_heads():
        matched = False
        choices = itertools.product((True, False), (True, False), found.possible_attentions())
        for keeps, learned, attention in choices:
            candidate = Candidate(attention, num_heads, keeps, learned)
            logits, state = run_oracle(make_oracle(found, candidate).to(dtype), video)
            trial = Trial(
                candidate,
                relative_error(logits, arrays["logits"]),
                relative_error(state, arrays["state"]) if "state" in arrays else None,
            )
            matched |= trial.logits <= SCREEN_BAR
            yield trial
        if matched:
            return


def _hold_against_flax(
    found: Recognised,
    best: Trial,
    clips: tuple[int, int],
    video: np.ndarray,
    arrays: dict[str, np.ndarray],
    rounding: float,
    trials: tuple[Trial, ...],
) -> Proof:
    candidate = best.candidate
    if not (candidate.keeps_positions and candidate.learned_token):
        raise NotProven(
            f"{found.source.path} computes {candidate} (logits differ by {best.logits:.1e}), "
            "which the Flax model does not: its state is a + g, its token 0 learned"
        )
    logits, state = run_flax(found, candidate, video)
    proof = Proof(
        candidate,
        clips,
        relative_error(logits, arrays["logits"]),
        relative_error(state, arrays["state"]) if "state" in arrays else None,
        rounding,
        trials,
    )
    bar = max(PROOF_BAR, ROUNDING_FACTOR * rounding)
    if proof.logits > bar or (proof.state or 0.0) > bar:
        raise NotProven(
            f"{found.source.path} is closest to {candidate}, but the logits differ by "
            f"{proof.logits:.1e} and the state by {proof.state or 0.0:.1e} where {bar:.1e} would "
            "be rounding: it computes something a little different"
        )
    return proof


def run_flax(
    found: Recognised, candidate: Candidate, video: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, K] and state [L, B, S, D] of the Flax model with the file's weights."""
    config = found.model_config(candidate.attention, candidate.num_heads)
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
