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
        mask = np.asarray(mask, bool)
        logits, loss, label = np.asarray(logits)[mask], np.asarray(loss)[mask], label[mask]
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits).all(axis=-1)).sum())
            raise ValueError(
                f"{bad} of {len(logits)} clips of a batch have logits that are not finite: the "
                "weights are damaged or training diverged; try an earlier checkpoint"
            )
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
