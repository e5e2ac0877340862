"""Exact metrics: per-clip results are counted, combined once, divided once.

Counting happens on the host in integers and float64, so that neither the batch size nor the
padding of the last batch can change a number.
"""

import math

import numpy as np


class ClassificationMetrics:
    """Counts of a split; `update` per batch, `result` at the end.

    Args:
        num_classes: K.

    Attributes:
        confusion: [K, K] clips, true class by predicted class.
    """

    def __init__(self, num_classes: int):
        self.num_clips = 0
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self._top5 = 0
        self._losses: list[np.ndarray] = []

    def update(
        self, logits: np.ndarray, loss: np.ndarray, label: np.ndarray, mask: np.ndarray
    ) -> None:
        """Counts a batch.

        Args:
            logits: [B, K].
            loss: [B], nats.
            label: [B] class indices.
            mask: [B], False on padding, which is not counted.

        Raises:
            ValueError: the logits of a real clip are not finite; such an answer is neither right
                nor wrong.
        """
        logits, loss, label = _real(logits, loss, label, mask)
        # Descending and stable: of equal logits the lower class index ranks first.
        ranking = np.argsort(-logits, axis=-1, kind="stable")
        np.add.at(self.confusion, (label, ranking[:, 0]), 1)
        self._top5 += int((ranking[:, :5] == label[:, None]).any(axis=-1).sum())
        self._losses.append(loss.astype(np.float64))
        self.num_clips += len(label)

    def result(self) -> dict[str, float | int]:
        """`num_clips`, `top1`, `top5`, `loss`, `mean_class_accuracy`; fractions, and nats.

        The mean over classes leaves out classes without a clip.

        Raises:
            ValueError: no clip was counted.
        """
        if not self.num_clips:
            raise ValueError("no clip to evaluate: the split is empty")
        right, clips = np.diag(self.confusion), self.confusion.sum(axis=1)
        per_class = right[clips > 0] / clips[clips > 0]
        return {
            "num_clips": self.num_clips,
            "top1": int(right.sum()) / self.num_clips,
            "top5": self._top5 / self.num_clips,
            "loss": math.fsum(np.concatenate(self._losses)) / self.num_clips,
            "mean_class_accuracy": float(per_class.mean()),
        }


class MultiLabelMetrics:
    """Metrics of clips that may have several labels, or none; `update` per batch.

    Holds all scores: a clip's place among all clips is what counts.
    """

    def __init__(self) -> None:
        self._logits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []

    def update(
        self, logits: np.ndarray, loss: np.ndarray, label: np.ndarray, mask: np.ndarray
    ) -> None:
        """Takes a batch: as `ClassificationMetrics.update`, with labels [B, K] of 0 and 1."""
        logits, loss, label = _real(logits, loss, label, mask)
        self._logits.append(logits)
        self._labels.append(label > 0)
        self._losses.append(loss.astype(np.float64))

    def result(self) -> dict[str, float | int]:
        """`num_clips`, `mean_average_precision`, `loss`; fractions, and nats.

        The mean over classes leaves out classes without a clip.

        Raises:
            ValueError: no clip was counted, or none has a label.
        """
        if not self._logits:
            raise ValueError("no clip to evaluate: the split is empty")
        logits, labels = np.concatenate(self._logits), np.concatenate(self._labels)
        each = [
            average_precision(logits[:, k], labels[:, k])
            for k in range(labels.shape[1])
            if labels[:, k].any()
        ]
        if not each:
            raise ValueError("no clip of the split has any label: there is nothing to measure")
        return {
            "num_clips": len(logits),
            "mean_average_precision": math.fsum(each) / len(each),
            "loss": math.fsum(np.concatenate(self._losses)) / len(logits),
        }


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """The mean, over the positives, of the precision at each one's score.

    Equal scores stand in one place: the order of the clips decides nothing. Without equal scores
    this is the sum over ranks of precision times gain in recall, as for Charades.

    Args:
        scores: [clips].
        positive: bool [clips], at least one True.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    # Of each score its last clip: all that score as high are above.
    last = np.searchsorted(-scores, -scores, side="right") - 1
    precision = np.cumsum(positive)[last] / (last + 1)
    return float(precision[positive].mean())


def _real(
    logits: np.ndarray, loss: np.ndarray, label: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of real clips; raises ValueError where their logits are not finite."""
    mask = np.asarray(mask, bool)
    logits, loss, label = np.asarray(logits)[mask], np.asarray(loss)[mask], label[mask]
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits).all(axis=-1)).sum())
        raise ValueError(
            f"{bad} of {len(logits)} clips of a batch have logits that are not finite: the "
            "weights are damaged or training diverged; try an earlier checkpoint"
        )
    return logits, loss, label
