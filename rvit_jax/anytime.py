"""What a recurrent model's answers are worth before the clip is over.

One pass over a split gives the answer after every frame. From it: top-1 against frames seen and its
area, when the answer settles, what rules for stopping early cost, and how far confidence can be
trusted (expected calibration error: Naeini et al. 2015, Guo et al. 2017).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

FRACTIONS = tuple(tenth / 10 for tenth in range(1, 11))  # of a clip's frames
# Early exit: the first frame at which the likeliest class reaches this probability ...
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
PATIENCES = (2, 3, 4, 6, 8, 12, 16)  # ... or has been the same for this many frames.
CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of labelled clips after each of their frames.

    Attributes:
        predicted: int [clips, T], the likeliest class; after a clip's end, its last answer.
        confidence: float [clips, T], that class's probability, 0 to 1; held in the same way.
        num_frames: int [clips], 1 to T, the real frames of each clip.
        label: int [clips].
    """

    predicted: np.ndarray
    confidence: np.ndarray
    num_frames: np.ndarray
    label: np.ndarray

    @classmethod
    def from_probabilities(
        cls, probabilities: np.ndarray, num_frames: np.ndarray, label: np.ndarray
    ) -> "Answers":
        """From probabilities [clips, T, K], of which those after `num_frames` are not read."""
        frames = np.arange(probabilities.shape[1])
        read = np.minimum(frames, num_frames[:, None] - 1)  # [clips, T]
        predicted = np.take_along_axis(probabilities.argmax(-1), read, axis=1)
        confidence = np.take_along_axis(probabilities.max(-1), read, axis=1)
        return cls(predicted.astype(np.int32), confidence, num_frames, label)

    @classmethod
    def concatenate(cls, parts: "list[Answers]") -> "Answers":
        """All clips of several."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def right(self) -> np.ndarray:
        """bool [clips, T]."""
        return self.predicted == self.label[:, None]

    def after(self, frames: np.ndarray) -> "tuple[np.ndarray, np.ndarray]":
        """Right or not, and confidence, [clips] each, when clip i has seen `frames[i]` frames."""
        rows = np.arange(len(self.label))
        return self.right[rows, frames - 1], self.confidence[rows, frames - 1]


def measure(answers: Answers, seconds_per_frame: float | None) -> dict[str, Any]:
    """All figures, as JSON can hold them; accuracies and shares are fractions.

    Args:
        answers: of a split.
        seconds_per_frame: from one frame that the model reads to the next; None: clips differ.

    Returns:
        num_clips, seconds_per_frame
        by_frame: {frames: [1, ..., T], mean_frames: [...], top1: [...]}; a clip that is over keeps
            its last answer, and `mean_frames` does not count what it has not.
        area: the share of its frames after which a clip's answer is right, mean over the clips.
            Where all clips are equally long, the area under `by_frame`.
        by_fraction: {fraction: [...], top1: [...], expected_calibration_error: [...]}
        stable: the first frame (from 1) from which the answer stays to the clip's end, over all
            clips, and over those whose last answer is right (None where there is none).
        early_exit: a list of {rule, value, top1, mean_frames, mean_fraction, stopped_early}.
        calibration: the answer after the last frame by confidence, bin by bin.
    """
    right, confidence = answers.after(answers.num_frames)
    settled = settled_at(answers)
    frames = np.arange(answers.right.shape[1])
    seen = frames < answers.num_frames[:, None]  # [clips, T]
    return {
        "num_clips": len(answers.label),
        "seconds_per_frame": seconds_per_frame,
        "by_frame": {
            "frames": (frames + 1).tolist(),
            "mean_frames": np.minimum(frames + 1, answers.num_frames[:, None]).mean(0).tolist(),
            "top1": answers.right.mean(0).tolist(),
        },
        "area": float(((answers.right & seen).sum(1) / answers.num_frames).mean()),
        "by_fraction": _by_fraction(answers),
        "stable": {
            "all": _distribution(settled, answers.num_frames),
            "right": _distribution(settled[right], answers.num_frames[right]),
        },
        "early_exit": [
            {"rule": rule, "value": value, **_exit_at(answers, first)}
            for rule, value, first in _exits(answers)
        ],
        "calibration": calibration_bins(confidence, right),
    }


def settled_at(answers: Answers) -> np.ndarray:
    """The first frame, [clips] from 1, from which the answer never changes again."""
    # Held after the clip's end, the answer does not change there.
    changes = answers.predicted[:, 1:] != answers.predicted[:, :-1]  # [clips, T - 1]
    num_frames = answers.predicted.shape[1]
    from_the_end = np.argmax(changes[:, ::-1], axis=1) if changes.size else 0
    last = np.where(changes.any(1), num_frames - 1 - from_the_end, 0)
    return last + 1


def confident_at(answers: Answers, least: float) -> np.ndarray:
    """The first frame, [clips] from 1, with a confidence of `least`; else the clip's last."""
    return _first(answers.confidence >= least, answers.num_frames)


def patient_at(answers: Answers, patience: int) -> np.ndarray:
    """The first frame, [clips] from 1, after `patience` equal answers; else the clip's last."""
    equal = np.ones(answers.predicted.shape, bool)
    equal[:, : patience - 1] = False
    for back in range(1, patience):
        equal[:, back:] &= answers.predicted[:, back:] == answers.predicted[:, :-back]
    return _first(equal, answers.num_frames)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean distance between confidence and accuracy, bin by bin, weighted by clips."""
    gaps = np.bincount(_bins(confidence), weights=confidence - right.astype(np.float64))
    return float(np.abs(gaps).sum() / len(confidence))


def calibration_bins(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[Any]]:
    """Clips, mean confidence and accuracy of equally wide bins; None for an empty one's means."""
    index = _bins(confidence)
    clips = np.bincount(index, minlength=CALIBRATION_BINS)

    def means(values: np.ndarray) -> list[float | None]:
        sums = np.bincount(index, weights=values, minlength=CALIBRATION_BINS)
        return [float(s / n) if n else None for s, n in zip(sums, clips, strict=True)]

    return {"clips": clips.tolist(), "confidence": means(confidence), "accuracy": means(right)}


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def _by_fraction(answers: Answers) -> dict[str, list[float]]:
    top1, errors = [], []
    for fraction in FRACTIONS:
        # Rounded first: 0.7 x 10 is a little more than 7 in floating point.
        frames = np.ceil(np.round(fraction * answers.num_frames, 6)).astype(int)
        right, confidence = answers.after(frames)
        top1.append(float(right.mean()))
        errors.append(expected_calibration_error(confidence, right))
    return {"fraction": list(FRACTIONS), "top1": top1, "expected_calibration_error": errors}


def _first(wanted: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """The first frame [clips], from 1, that is `wanted` [clips, T]; else the clip's last."""
    first = np.where(wanted.any(1), wanted.argmax(1) + 1, num_frames)
    return np.minimum(first, num_frames)


def _exits(answers: Answers) -> Iterator[tuple[str, float | int, np.ndarray]]:
    """Each rule, its value, and when it stops each clip."""
    for confidence in CONFIDENCES:
        yield "confidence", confidence, confident_at(answers, confidence)
    for patience in PATIENCES:
        if patience <= answers.predicted.shape[1]:
            yield "patience", patience, patient_at(answers, patience)


def _exit_at(answers: Answers, frames: np.ndarray) -> dict[str, float]:
    right, _ = answers.after(frames)
    return {
        "top1": float(right.mean()),
        "mean_frames": float(frames.mean()),
        "mean_fraction": float((frames / answers.num_frames).mean()),
        "stopped_early": float((frames < answers.num_frames).mean()),
    }


def _distribution(frames: np.ndarray, num_frames: np.ndarray) -> dict[str, float] | None:
    if not len(frames):
        return None
    return {
        "mean_frames": float(frames.mean()),
        "median_frames": float(np.median(frames)),
        "p90_frames": float(np.percentile(frames, 90)),
        "mean_fraction": float((frames / num_frames).mean()),
    }
