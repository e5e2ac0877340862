"""Endless streams: frames go in one at a time, an answer comes out after each, memory is constant.

The recurrence adds to its state at every frame, so that after t frames a new one weighs about 1/t:
left alone, it stops listening. A model also knows clips of the lengths that it was trained on and
no longer ones. `Streams` therefore can keep several states of one stream that start at different
frames and begin anew in turn, and answers with those whose age is that of a training clip.
"""

import copy
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from input_pipeline.files import written_aside
from rvit_jax.model import CompiledRViT, RViT

STATE_FORMAT = 1
MOST_STATES = 16  # kept by default for one stream
# States from this fraction of the window on are asked: training clips differ in length.
YOUNGEST_ASKED = 2.0 / 3.0
CONFIDENCE_POWER = 2.0
_Advanced = tuple[jax.Array, jax.Array]  # logits [R, B, K], hidden [L, R, B, S, D]


class Streams:
    """B streams through one model, one frame of each at a time, as one compiled program.

    Args:
        model: from `rvit_jax.load(...).model`.
        num_streams: B.
        window: frames that a state may see before it begins anew; 0: one state, never.
        num_states: most states of each stream, that begin in turn every k frames, the smallest
            whole k that allows it; by default 16. A state then lives for the next multiple of k
            from the window on. Used with a window only.
        decay: the state's distance from the initial one is multiplied by this before each frame;
            1: not. Another remedy against a state that stops listening.
        multi_label: the model was trained for several labels per clip, each class for itself.

    Attributes:
        num_frames: frames that each stream has seen, int64 [B].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: CompiledRViT,
        num_streams: int = 1,
        *,
        window: int = 0,
        num_states: int | None = None,
        decay: float = 1.0,
        multi_label: bool = False,
    ):
        if num_streams < 1 or window < 0:
            raise ValueError(f"num_streams={num_streams}, window={window}: from 1, and from 0")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay={decay}: expected a factor above 0, at most 1")
        if num_states is not None and not 1 <= num_states <= max(window, 1):
            raise ValueError(
                f"num_states={num_states}: expected 1 to the window, which is {window} frames"
            )
        wanted = 1 if window == 0 else num_states or min(window, MOST_STATES)
        self._spacing = math.ceil(window / wanted)
        self._num_states = math.ceil(window / self._spacing) if window else 1
        self._lifetime = self._num_states * self._spacing  # the window, or a few frames more
        self._decay, self._multi_label = decay, multi_label
        self.num_frames = np.zeros(num_streams, np.int64)
        initial = model.initial_hidden(1)[:, None]  # [L, 1, 1, S, D]
        self._hidden = jnp.tile(initial, (1, self._num_states, num_streams, 1, 1))
        self._graphdef, self._variables = nnx.split(model.module)
        self._advance = jax.jit(_make_advance(self._graphdef, decay), donate_argnums=1)

    @property
    def num_states(self) -> int:
        """R."""
        return self._num_states

    def compile(self, frame_shape: tuple[int, int], dtype: Any = np.uint8) -> None:
        """Compiles the step now, so that the first frame is answered as fast as the others.

        Args:
            frame_shape: H and W of the frames to come.
            dtype: of the frames to come.
        """
        num_streams = len(self.num_frames)
        frames = np.zeros((num_streams, *frame_shape, 3), dtype)
        nothing = np.zeros((self._num_states, num_streams), bool)
        hidden = jnp.copy(self._hidden)  # given away
        self._advance(self._variables, hidden, nothing, frames, nothing[0])

    def ages(self) -> np.ndarray:
        """Frames that each state has seen, int64 [R, B]; 0 for one that has not begun."""
        since = self.num_frames - self._spacing * np.arange(self._num_states)[:, None]
        if not self._lifetime:
            return since
        return np.where(since > 0, (since - 1) % self._lifetime + 1, 0)

    def step(self, frames: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        """Reads one frame of each stream and answers.

        Args:
            frames: [B, H, W, 3] as the model sees them: uint8, or float in [-1, 1].
            active: bool [B]; a stream that is not keeps its state. All by default.

        Returns:
            Class probabilities, float32 [B, K]; NaN for a stream that is not active.

        Raises:
            ValueError: a shape does not fit.
        """
        return combine(self.advance(frames, active), self.asked(), self._multi_label)

    def advance(self, frames: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        """As `step`, but returns the logits of every state, float32 [R, B, K]."""
        num_streams = len(self.num_frames)
        active = np.ones(num_streams, bool) if active is None else np.asarray(active, bool)
        if len(frames) != num_streams or active.shape != (num_streams,):
            raise ValueError(
                f"{len(frames)} frames and a mask of shape {active.shape}, but there are "
                f"{num_streams} streams"
            )
        before, self.num_frames = self.num_frames, self.num_frames + active
        restart = (self.ages() == 1) & active
        try:
            logits, self._hidden = self._advance(
                self._variables, self._hidden, restart, np.asarray(frames), active
            )
        except BaseException:
            self.num_frames = before  # a frame that does not fit was not seen
            raise
        return np.asarray(logits)

    def asked(self) -> np.ndarray:
        """Which states answer, bool [R, B]: those as old as a training clip, else the oldest."""
        ages = self.ages()
        old_enough = ages >= math.ceil(YOUNGEST_ASKED * self._lifetime)
        return np.where(old_enough.any(axis=0), old_enough, ages == ages.max(axis=0))

    def select(self, rows: Sequence[int] | np.ndarray) -> "Streams":
        """Streams that go on where some of these are now.

        Args:
            rows: which; one may be named several times, and then goes on in as many ways.
        """
        chosen = copy.copy(self)
        chosen.num_frames = self.num_frames[list(rows)]
        chosen._hidden = self._hidden[:, :, jnp.asarray(rows)]
        return chosen

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state of all streams, aside and renamed, to a NumPy archive.

        Raises:
            OSError: the file cannot be written.
        """
        with written_aside(Path(path).expanduser()) as aside, aside.open("wb") as file:
            np.savez(file, **self._identity(), hidden=self._hidden, num_frames=self.num_frames)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Goes on where `save` was called.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, or of another model or other settings.
        """
        path = Path(path).expanduser()
        try:
            with np.load(path, allow_pickle=False) as archive:
                saved = dict(archive)
        except OSError:
            raise
        except Exception as error:  # a damaged zip or header gives many kinds
            raise ValueError(
                f"{path} is no state that was saved by rvit_jax.predict, or is damaged; choose "
                "another --state"
            ) from error
        for key, value in self._identity().items():
            if key not in saved or saved[key].shape != () or saved[key] != value:
                was = saved.get(key, "nothing")
                raise ValueError(
                    f"{path} is a state of other streams: {key} is {was} there, {value} here; "
                    "use the same checkpoint, inputs and settings, or another file"
                )
        for key, like in (("hidden", self._hidden), ("num_frames", self.num_frames)):
            there = saved.get(key)
            if there is None or there.shape != like.shape or there.dtype != like.dtype:
                raise ValueError(f"{path} is no saved state: its {key} does not fit")
        self._hidden = jnp.asarray(saved["hidden"])
        self.num_frames = saved["num_frames"]

    def _identity(self) -> dict[str, Any]:
        """What a saved state must have in common with the streams that go on from it."""
        digest = hashlib.sha256(repr(self._graphdef).encode())  # heads, for one, are no array
        for leaf in jax.tree.leaves(self._variables):
            digest.update(np.asarray(leaf).tobytes())
        return {
            "format": STATE_FORMAT,
            "model": digest.hexdigest(),
            "num_streams": len(self.num_frames),
            "num_states": self._num_states,
            "window": self._lifetime,
            "decay": self._decay,
        }


def _make_advance(graphdef: nnx.GraphDef[RViT], decay: float) -> Callable[..., _Advanced]:
    """The function (variables, hidden [L, R, B, S, D], restart, frames, active) for `jax.jit`."""

    def advance(
        variables: nnx.State[Any, Any],
        hidden: jax.Array,
        restart: jax.Array,
        frames: jax.Array,
        active: jax.Array,
    ) -> _Advanced:
        model = nnx.merge(graphdef, variables)
        num_layers, num_states, num_streams, *token_shape = hidden.shape
        initial = model.initial_hidden(1)[:, None]
        hidden = jnp.where(restart[..., None, None], initial, hidden)
        if decay != 1.0:
            hidden = jnp.where(active[:, None, None], initial + decay * (hidden - initial), hidden)
        logits, hidden = model.step(
            jnp.tile(frames, (num_states, 1, 1, 1)),
            hidden.reshape(num_layers, num_states * num_streams, *token_shape),
            jnp.tile(active, num_states),
        )
        return (
            logits.reshape(num_states, num_streams, -1),
            hidden.reshape(num_layers, num_states, num_streams, *token_shape),
        )

    return advance


def combine(logits: np.ndarray, asked: np.ndarray, multi_label: bool = False) -> np.ndarray:
    """One answer from several: a mean weighted by the square of each one's confidence.

    Args:
        logits: [R, B, K].
        asked: bool [R, B]; at least one of each stream.
        multi_label: each class is for itself; probabilities need not sum to 1.

    Returns:
        Probabilities, float32 [B, K].
    """
    if multi_label:
        probabilities = np.exp(-np.logaddexp(0.0, -logits))
    else:
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    weights = np.where(asked, probabilities.max(axis=-1) ** CONFIDENCE_POWER, 0.0)
    weights = weights / weights.sum(axis=0)
    return np.einsum("rb,rbk->bk", weights, probabilities).astype(np.float32)
