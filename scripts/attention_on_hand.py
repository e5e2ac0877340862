"""Does a model look at the hand? Its attention against the hand's true place in generated gestures.

python scripts/attention_on_hand.py --config=configs/gestures.py --checkpoint=results/gestures

For each way to look that `--mode=visualize` draws, and the best single head: the share of a clip's
weight on patches that lies on arm and hand (a patch's weight times the share of it that they
cover), over their share of the picture. Blind weights give 1. Means over heads are those of
`rvit_jax.visualize`; of gradient x attention, what speaks for the answer counts.
"""

import contextlib
import itertools
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.command_line import check_output_file, leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import cv2
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

import input_pipeline
from configs import base
from input_pipeline import gestures, jester
from input_pipeline.files import write_json
from rvit_jax import checkpoint, visualize
from rvit_jax.command import ArgumentError, parse, run, start
from rvit_jax.config import check_config
from rvit_jax.evaluate import use_checkpoint_config

SHOWN = 0.03  # of a picture: with less of arm and hand in it, a frame shows none


def weights_of(look: visualize.Look, kind: str) -> dict[str, np.ndarray]:
    """Way to look -> weights on the patches, [T, N], none negative.

    Args:
        look: at one clip, T frames.
        kind: the model's attention.
    """
    ways = {}
    for name, maps in (("class token", look.query), ("state's token", look.state)):
        for layer, mean in enumerate(np.moveaxis(visualize.mean_of_heads(maps, kind), 1, 0)):
            ways[f"layer {layer}, {name}"] = mean
    ways["rollout"] = look.rollout
    ways["gradient x attention"] = np.maximum(look.gradient.sum((1, 2)), 0.0)
    heads = np.abs(visualize.per_head(look.query, kind))  # [T, L, A, S]
    for layer, head in np.ndindex(heads.shape[1:3]):
        ways[f"layer {layer}, head {head}"] = heads[:, layer, head]
    return {name: np.asarray(weights, np.float64)[:, 1:] for name, weights in ways.items()}


def covered(masks: np.ndarray, num_patches: int) -> np.ndarray:
    """The share of each patch that bool [T, H, W] masks cover, [T, N]."""
    side = math.isqrt(num_patches)
    shares = [
        cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
        for mask in masks
    ]
    return np.reshape(shares, (len(masks), num_patches))


def measure(config: ConfigDict, loaded: checkpoint.LoadedModel, split: str, num_clips: int) -> dict:
    """What the table shows.

    Args:
        config: of the data set, as the model was trained; its name is "gestures".
        loaded: the model.
        split: "train", "validation" or "test".
        num_clips: the first so many of it.

    Raises:
        FileNotFoundError: no data.
        ValueError: it has fewer clips, or a model of other classes.
    """
    config.batch_size, config.dataset.num_workers, config.dataset.cache = 1, 0, False
    config.views.temporal = config.views.spatial = 1
    dataset = input_pipeline.get_dataset(config, split, training=False, with_frame_indices=True)
    lens, kind = visualize.Lens(loaded.model.module), config.model.attention
    num_patches = loaded.model.module.num_patches
    seen = {}  # id -> way to look -> weights; and which frames of the file they are of
    with contextlib.closing(dataset):
        if dataset.num_clips < num_clips:
            raise ValueError(f"--clips={num_clips}: the split {split} has {dataset.num_clips}")
        for batch in itertools.islice(dataset, num_clips):
            num_frames = int(batch["num_frames"][0])
            look = jax.device_get(lens(batch["video"], batch["num_frames"]))
            look = jax.tree.map(lambda array, n=num_frames: array[0, :n], look)
            frames = batch["frame_indices"][0, :num_frames]
            seen[str(batch["id"][0])] = weights_of(look, kind), frames

    shares: dict[str, list[float]] = {}
    hits: dict[str, list[float]] = {}
    areas, chances = [], []
    for clip_id, masks in gestures.hand_masks(config.dataset.data_dir, seen):
        ways, frames = seen[clip_id]
        area = covered(masks[frames], num_patches)
        areas.append(area.mean())
        shown = area.mean(1) > SHOWN  # [T]
        on_hand = area > area.mean(1, keepdims=True)  # [T, N]
        chances.extend(on_hand[shown].mean(1))
        for name, weights in ways.items():
            shares.setdefault(name, []).append((weights * area).sum() / weights.sum())
            at_brightest = on_hand[np.arange(len(area)), weights.argmax(1)]
            hits.setdefault(name, []).extend(at_brightest[shown])
    return {
        "num_clips": len(areas),
        "area": float(np.mean(areas)),
        "chance": float(np.mean(chances)),
        "ways": [
            {
                "way": name,
                "lift": float(np.mean(values) / np.mean(areas)),
                "brightest_on_hand": float(np.mean(hits[name])),
            }
            for name, values in shares.items()
        ],
    }


def table(summary: dict[str, Any]) -> str:
    """The summary to read; the best single head comes last."""
    heads = [row for row in summary["ways"] if ", head " in row["way"]]
    best = max(heads, key=lambda row: row["lift"])
    rows = [row for row in summary["ways"] if row not in heads]
    lines = [
        f"{summary['num_clips']} clips; arm and hand cover {summary['area']:.1%} of the picture",
        f"{'':28} {'weight there':>12}   brightest patch on it (by chance {summary['chance']:.0%})",
    ]
    lines += [
        f"{row['way']:28} {row['lift']:>10.2f} x   {row['brightest_on_hand']:.0%}"
        for row in (*rows, {**best, "way": f"best: {best['way']}"})
    ]
    return "\n".join(lines)


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(argv, "Config file of the data, and a variant.")
    for name, default, what in (
        ("checkpoint", None, "Workdir or checkpoint folder."),
        ("output", None, "JSON file to write all of it to, each head included."),
    ):
        flags.DEFINE_string(name, default, what, flag_values=values)
    flags.DEFINE_enum(
        "split", "test", jester.SPLITS, "Split that the clips come from.", flag_values=values
    )
    flags.DEFINE_integer("clips", 64, "Clips to look at.", 1, flag_values=values)
    return values


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """The flags' values; raises ArgumentError where one is unknown, missing or does not fit."""
    values = define_flags(argv)
    parse(values, argv, __doc__)
    require(values, config="configs/gestures.py", checkpoint="results/gestures")
    return values


def _work(argv: list[str]) -> None:
    values = parse_flags(argv)
    config = values.config
    try:
        check_config(config, base.get_config(), training=False)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    if config.dataset.name != "gestures":
        raise ArgumentError(
            f"config.dataset.name={config.dataset.name!r}: where the hand is, is known of "
            "'gestures' alone"
        )
    output = Path(values.output).expanduser() if values.output else None
    if output is not None:
        check_output_file(output)
    loaded = checkpoint.load(values.checkpoint)
    overrides = list(config_flags.get_override_values(values["config"]))
    config = use_checkpoint_config(config, loaded.config, overrides)
    summary = measure(config, loaded, values.split, values.clips)
    print(table(summary))
    if output is not None:
        write_json(output, summary)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_work, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
