"""From a config to batches of clips: sources, sampling, decoding, order, position.

`get_dataset` is the one public name. This room knows nothing of `rvit_jax`, and importing it costs
nothing: Grain is imported by the first call.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from input_pipeline.loader import BatchIterator
    from input_pipeline.source import Source

VIDEO_NAMES = ("video_folder", "video_list", "ssv2", "kinetics400", "charades")
NAMES = ("jester", "jester_tfds", "gestures", *VIDEO_NAMES)  # of dataset.name
_GENERATION_LIMIT_S = 3600.0  # how long other processes wait for the one that draws the set


def get_dataset(
    config: ConfigDict,
    split: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    ids: Sequence[str] = (),
    training: bool | None = None,
    with_frame_indices: bool = False,
) -> BatchIterator:
    """Opens one split as an iterator of batches of clips.

    Train is endless, each epoch shuffled anew from `config.seed`; the other splits are one pass in
    the order of their CSV. A batch is a dict of NumPy arrays: `video` uint8 [B, T, H, W, 3],
    `label` int32 [B] (-1 where the split has no labels, and on padding), `num_frames` int32 [B],
    `mask` bool [B] (False on the rows that fill up an epoch's last batch), `id` str [B].

    Args:
        config: the whole config; `seed`, `batch_size`, `model.image_size` and `dataset.*` are read.
        split: "train", "validation" or "test".
        process_index: which process this is; it gets rows [p * B/P, (p + 1) * B/P) of each batch.
        process_count: P, the number of processes; divides `config.batch_size`.
        ids: these clips of the split alone, in this order; () means all.
        training: whether batches are endless, shuffled and changed at random; by default for train
            alone. Evaluation reads train with False: one pass in order, nothing drawn.
        with_frame_indices: batches have `frame_indices` int32 [B, T] too: which frames of the
            source a clip's frames are, -1 behind its last.

    Returns:
        The iterator; see `loader.BatchIterator` for its state, its properties and `close`.

    Raises:
        ValueError: a key has a value that cannot be, the CSV files and folders do not fit, or the
            split has no clip of one of the `ids`.
        FileNotFoundError: the data, a CSV file or the folder of a clip is missing.
    """
    from input_pipeline import clips, loader  # brings Grain, and Grain brings jax

    # Its checks come before any drawing.
    if training is None:
        training = split == "train"
    options = clips.ClipOptions.from_config(config, training=training)
    source = open_source(config, split, process_index=process_index)
    return loader.BatchIterator(
        source.select(ids) if ids else source,
        options,
        batch_size=config.batch_size,
        process_index=process_index,
        process_count=process_count,
        num_workers=config.dataset.num_workers,
        timeout_s=config.dataset.timeout_s,
        cache=config.dataset.cache,
        with_frame_indices=with_frame_indices,
    )


def open_source(config: ConfigDict, split: str, *, process_index: int = 0) -> Source:
    """Opens one split of the config's data set, clip by clip; draws gestures that are not there.

    Raises:
        ValueError: as `get_dataset`.
        FileNotFoundError: as `get_dataset`.
    """
    from input_pipeline import jester

    name, classes = config.dataset.name, tuple(config.dataset.classes)
    _check_choice("split", split, jester.SPLITS)
    _check_choice("dataset.name", name, NAMES)
    data_dir = os.path.expanduser(config.dataset.data_dir)
    if name == "gestures":
        _provide_gestures(config, data_dir, process_index)
    if name in VIDEO_NAMES:
        from input_pipeline import video_files

        return video_files.read_split(
            name, data_dir, split, classes, config.dataset.labels, config.dataset.missing
        )
    if name == "jester_tfds":
        from input_pipeline import jester_tfds

        return jester_tfds.read_split(data_dir, split, classes, name)
    return jester.read_split(data_dir, split, classes, name)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; choose one of: {', '.join(choices)}")


def _provide_gestures(config: ConfigDict, data_dir: str, process_index: int) -> None:
    """Draws the gestures if data_dir does not hold them, and checks that all the classes are there.

    Of several processes the first one draws; the others wait until the set is finished.
    """
    from input_pipeline import gestures, jester  # gestures brings OpenCV
    from input_pipeline.source import few

    classes = tuple(config.dataset.classes) or jester.CLASS_NAMES
    deadline = time.monotonic() + _GENERATION_LIMIT_S
    while True:
        try:
            drawn = gestures.read_manifest(data_dir)
            break
        except (FileNotFoundError, NotADirectoryError):
            if process_index == 0:
                logging.info("drawing gestures into %s", data_dir)
                gestures.generate(data_dir, classes=classes, **config.dataset.generate)
            elif time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"process 0 did not finish drawing {data_dir} in {_GENERATION_LIMIT_S:.0f} s: "
                    "draw it beforehand (python -m input_pipeline.gestures), on a disk that every "
                    "process reads"
                ) from None
            else:
                time.sleep(1.0)
    missing = [name for name in classes if name not in drawn["classes"]]
    if missing:
        raise ValueError(
            f"the gestures in {data_dir} do not include {few(missing, 3)}: set "
            "--config.dataset.data_dir to a new folder to draw them, or "
            f"--config.dataset.classes to some of: {few(drawn['classes'], 8)}"
        )
    _warn_of_other_gestures(config, drawn, gestures.VERSION)


def how_to_draw(config: ConfigDict) -> str:
    """What a command that draws none says where the gestures of a config are not there."""
    from input_pipeline import gestures, jester  # gestures brings OpenCV

    dataset = config.dataset
    chosen = {(): "all", jester.CLASS_NAMES: "all", gestures.TIME_CLASSES: "time"}
    classes = chosen.get(tuple(dataset.classes), ",".join(dataset.classes))
    command = [f"--output={dataset.data_dir}", f"--classes={classes}"]
    command += [f"--{key}={dataset.generate[key]}" for key in (*jester.SPLITS, "seed")]
    return (
        f"dataset.data_dir: there is no folder {dataset.data_dir}; the gestures are drawn when "
        "training begins, or now: python -m input_pipeline.gestures "
        f"{' '.join(map(shlex.quote, command))}"
    )


def _warn_of_other_gestures(config: ConfigDict, drawn: dict[str, Any], version: int) -> None:
    """Says where a set that lies there is not the one that the config would draw."""
    wanted = config.dataset.generate
    differing = []
    if drawn["version"] != version:
        differing.append(f"version {drawn['version']} of the drawing (now {version})")
    if drawn["seed"] != wanted.seed:
        differing.append(f"seed {drawn['seed']} (the config's: {wanted.seed})")
    num_classes = len(config.dataset.classes)
    if num_classes and num_classes < len(drawn["classes"]):
        differing.append(f"{len(drawn['classes'])} classes (the config's: {num_classes} of them)")
    for split, count in drawn["num_clips"].items():
        if count != wanted[split]:
            differing.append(f"{count} {split} clips (the config's: {wanted[split]})")
    if differing:
        logging.warning(
            "the gestures in %s were drawn with %s; they are used as they are",
            config.dataset.data_dir,
            ", ".join(differing),
        )
