"""From a stream of probabilities to events: what happened, from when to when, how surely."""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Jester's classes for "nothing to report": no event of their own.
BACKGROUND_CLASSES = ("No gesture", "Doing other things")


@dataclasses.dataclass(frozen=True)
class Event:
    """A class that was seen for a while.

    Attributes:
        class_name: which.
        start_s: time of the first frame whose answer it was, in seconds.
        end_s: time of the last one.
        confidence: its greatest probability between them.
    """

    class_name: str
    start_s: float
    end_s: float
    confidence: float


class EventDetector:
    """Finds events in one stream, as its answers come.

    An event begins when one class's probability has been at least `begin` for `patience` answers
    in a row, and ends when it has been below `end` for as many, when another class is believed, or
    when the stream is over. Two thresholds, so that an answer that wavers about one of them is one
    event.

    Args:
        class_names: K names, in index order.
        begin: probability from which a class is believed.
        end: probability below which it is over.
        patience: answers in a row that either takes.
        background: names that make no events.

    Raises:
        ValueError: the thresholds are out of order or range.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        begin: float = 0.5,
        end: float = 0.3,
        patience: int = 2,
        background: Sequence[str] = BACKGROUND_CLASSES,
    ):
        if not 0.0 < end <= begin <= 1.0 or patience < 1:
            raise ValueError(
                f"begin={begin}, end={end}, patience={patience}: expected 0 < end <= begin <= 1, "
                "and a patience of at least one answer"
            )
        self._class_names = tuple(class_names)
        self._begin, self._end, self._patience = begin, end, patience
        self._background = frozenset(background)
        # What may be beginning: a class, since when, for how many answers, how surely at most.
        self._candidate: int | None = None
        self._since_s, self._count, self._surest = 0.0, 0, 0.0
        self._open: int | None = None
        self._start_s, self._last_s, self._confidence = 0.0, 0.0, 0.0
        self._against = 0  # answers in a row that contradict the open event

    def update(self, time_s: float, probabilities: np.ndarray) -> Event | None:
        """Takes the answer [K] after a frame; returns the event that it ended, if any."""
        self._follow_candidate(time_s, probabilities)
        ended = None
        if self._open is not None:
            probability = float(probabilities[self._open])
            if probability >= self._end:
                self._against, self._last_s = 0, time_s
                self._confidence = max(self._confidence, probability)
            else:
                self._against += 1
            another = self._count >= self._patience and self._candidate not in (None, self._open)
            if another:
                self._last_s = min(self._last_s, self._since_s)
            if another or self._against >= self._patience:
                ended = self.finish()
        if self._open is None and self._candidate is not None and self._count >= self._patience:
            self._open, self._against = self._candidate, 0
            self._start_s, self._last_s = self._since_s, time_s
            self._confidence = self._surest
        return ended

    def finish(self) -> Event | None:
        """The event that is still open, at the stream's end."""
        if self._open is None:
            return None
        name, self._open = self._class_names[self._open], None
        return Event(name, self._start_s, self._last_s, self._confidence)

    def _follow_candidate(self, time_s: float, probabilities: np.ndarray) -> None:
        best = int(probabilities.argmax())
        probability = float(probabilities[best])
        if probability < self._begin or self._class_names[best] in self._background:
            self._candidate = None
            return
        if best != self._candidate:
            self._candidate, self._since_s, self._count, self._surest = best, time_s, 0, 0.0
        self._count += 1
        self._surest = max(self._surest, probability)
