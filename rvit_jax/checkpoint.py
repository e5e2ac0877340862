"""Checkpoints: written by training, read by everything.

    WORKDIR/model.json                    what the model is: config, class names, preprocessing
    WORKDIR/checkpoints/STEP/params/      the model's variables            (Orbax)
    WORKDIR/checkpoints/STEP/optimizer/   optimizer state and step         (Orbax; not if converted)
    WORKDIR/checkpoints/STEP/data/        position in the training data    (JSON; not if converted)
    WORKDIR/checkpoints/STEP/meta/model.json   model.json of that step, and its metrics

Orbax writes a step aside and renames it when it is whole. A checkpoint folder is complete in
itself: it may be moved or copied.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from configs import base
from input_pipeline.transforms import pack_channel_planes, resize_array
from rvit_jax.config import leaf_keys, lookup
from rvit_jax.model import CompiledRViT, RViT, normalise
from rvit_jax.steps import TrainState
from rvit_jax.version import __version__

FORMAT = 1  # of model.json
# Keys that a resumed run may change: how long it goes on, what it keeps, where and how it reads.
FREE_KEYS = (
    "num_epochs",
    "evaluate_every_epochs",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "test_after_training",
    "model.remat",
    "dataset.data_dir",
    "dataset.num_workers",
    "dataset.cache",
    "dataset.on_error",
    "views.temporal",
    "views.spatial",
)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON aside, then renames: the file is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def check_writable(workdir: Path) -> None:
    """Raises OSError unless `workdir` can be made or written; makes nothing itself."""
    workdir = Path(workdir)
    existing = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    reason = "may not be written" if existing.is_dir() else "is a file, not a folder"
    raise OSError(f"the workdir {workdir} cannot be used: {existing} {reason}; choose --workdir")


def describe_model(config: ConfigDict, class_names: Sequence[str]) -> dict[str, Any]:
    """The content of `model.json`."""
    dataset = config.dataset
    return {
        "format": FORMAT,
        "config": json.loads(config.to_json_best_effort()),
        "class_names": list(class_names),
        "preprocessing": {
            "image_size": config.model.image_size,
            "filter": "bicubic (Pillow)",
            "normalise": "(x / 255 - 0.5) / 0.5",
            **{key: dataset[key] for key in PREPROCESSING_KEYS},
        },
        "made_by": {
            "rvit_jax": __version__,
            **{module.__name__: module.__version__ for module in (jax, np)},
        },
    }


# Keys of config.dataset that belong to a trained model.
PREPROCESSING_KEYS = (
    "num_frames",
    "frame_stride",
    "frame_rate",
    "sampling",
    "resize",
    "short_clips",
    "frame_packing",
)


class _KeepLatestAndBest(policies.PreservationPolicy):
    """Keeps the latest `keep` checkpoints and the best one; of equals the later is the best.

    Args:
        keep: how many of the latest.
        metrics_of: step -> its validation metrics, None where it was not evaluated.
    """

    def __init__(self, keep: int, metrics_of: Callable[[int], dict[str, Any] | None]):
        self._keep, self._metrics_of = keep, metrics_of

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Whether each checkpoint stays; they come in the order of their steps."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max(steps, key=lambda step: _rank(self._metrics_of(step), step), default=None)
        return [step in steps[-self._keep :] or step == best for step in steps]


def _rank(metrics: dict[str, Any] | None, step: int) -> tuple[float, int]:
    """The greatest is the best checkpoint: highest top1 or mAP, of equals the later."""
    if not metrics:
        return (-1.0, step)
    return (metrics.get("mean_average_precision", metrics.get("top1")), step)


class Checkpoints:
    """The checkpoints of one run; a context manager, since leaving finishes the last save.

    Args:
        workdir: of the run; made if absent.
        description: `describe_model` of the run.
        keep: how many of the latest stay; the best one always does.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, workdir: Path, description: dict[str, Any], *, keep: int):
        self.workdir = Path(workdir).absolute()
        self._description = description
        self._metrics: dict[int, dict[str, Any] | None] = {}  # of steps saved by this process
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_KeepLatestAndBest(keep, self._metrics_of),
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(filename="model.json"),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(
        self, state: TrainState, data_position: dict[str, Any], metrics: dict[str, Any] | None
    ) -> None:
        """Saves in the background what a step needs to go on.

        A step that is there already gets the metrics that it lacked, and is left as it is.
        """
        self._manager.check_for_errors()  # of the save before
        step = int(state.step)
        meta = {**self._description, "step": step, "metrics": metrics}
        if step in self._manager.all_steps():
            if metrics is not None and self._metrics_of(step) is None:
                self.wait()
                write_json(_meta_file(self._folder(step)), meta)
                self._metrics[step] = metrics
            return
        self._metrics[step] = metrics
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(_variables(state)),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                data=ocp.args.JsonSave(data_position),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        if not saved:
            raise RuntimeError(f"{self.workdir}: the checkpoint of step {step} was not written")

    def restore_latest(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state and data position of the latest checkpoint; None when there is none.

        Writes `model.json` for the run that begins here or goes on.

        Args:
            state: of step 0, for shapes and types.

        Raises:
            ValueError: the checkpoint belongs to another config.
        """
        step = self._manager.latest_step()
        if step is not None:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            self._check_same_run(meta.meta, step)
        # Only now: a config that is refused leaves no trace.
        write_json(self.workdir / "model.json", self._description)
        if step is None:
            return None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_shapes(_variables(state))),
                optimizer=ocp.args.StandardRestore(_shapes(_optimizer_item(state))),
                data=ocp.args.JsonRestore(),
            ),
        )
        state = with_variables(state, restored.params)
        optimizer = restored.optimizer
        state = state.replace(step=optimizer["step"], opt_state=optimizer["state"])
        return state, restored.data

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _folder(self, step: int) -> Path:
        return self.workdir / "checkpoints" / str(step)

    def _metrics_of(self, step: int) -> dict[str, Any] | None:
        """A step's validation metrics: Orbax's own record of them does not outlive the process."""
        if step not in self._metrics:
            file = _meta_file(self._folder(step))
            self._metrics[step] = json.loads(file.read_text())["metrics"] if file.exists() else None
        return self._metrics[step]

    def _check_same_run(self, meta: dict[str, Any], step: int) -> None:
        """Refuses to go on with a config that gives another run."""
        old = with_defaults(ConfigDict(meta["config"]))
        new = with_defaults(ConfigDict(self._description["config"]))
        keys = sorted(set(leaf_keys(old)) | set(leaf_keys(new)))
        changed = []
        for key in keys:
            was, now = lookup(old, key), lookup(new, key)
            if was == now:
                continue
            if key in FREE_KEYS:
                logging.warning("resuming with config.%s=%s (was %s)", key, now, was)
                if key == "num_epochs" and new.optimizer.schedule == "cosine":
                    logging.warning("the learning rate goes on along the new run's cosine")
            else:
                changed.append(f"config.{key}: {was!r} there, {now!r} now")
        if changed:
            raise ValueError(
                f"{self.workdir} holds a run of another config (step {step}): "
                f"{'; '.join(changed)}. Set the values back to go on, or start anew with another "
                "--workdir"
            )


def _variables(state: TrainState) -> dict[str, Any]:
    """The model's variables, trained and fixed, as nested dicts."""
    return nnx.to_pure_dict(nnx.merge_state(state.params, state.fixed))


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "state": state.opt_state}


def _shapes(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def with_variables(state: TrainState, variables: dict[str, Any]) -> TrainState:
    """A training state with a model's variables, trained and fixed, from nested dicts."""
    params, fixed = state.params, state.fixed
    nnx.replace_by_pure_dict(params, _select(variables, nnx.to_pure_dict(params)))
    nnx.replace_by_pure_dict(fixed, _select(variables, nnx.to_pure_dict(fixed)))
    return state.replace(params=params, fixed=fixed)


def _select(tree: dict[Any, Any], like: dict[Any, Any]) -> dict[Any, Any]:
    """The part of nested dicts that `like` has."""
    return {
        key: _select(tree[key], value) if isinstance(value, dict) else tree[key]
        for key, value in like.items()
    }


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained or converted model, ready to use.

    Attributes:
        model: in evaluation mode; its calls are compiled.
        config: the config that it was trained with.
        class_names: K names, in index order.
        path: the checkpoint folder that it came from.
        step: updates made in training; 0 for a converted model.
    """

    model: CompiledRViT
    config: ConfigDict
    class_names: tuple[str, ...]
    path: Path
    step: int

    def preprocess(self, frames: np.ndarray) -> np.ndarray:
        """Frames as the model was trained on them.

        Args:
            frames: uint8 [T, H, W, 3], RGB, of any size.

        Returns:
            float32 [T, image_size, image_size, 3] in [-1, 1].

        Raises:
            ValueError: another shape or type.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
            raise ValueError(
                f"frames: got {frames.dtype} {frames.shape}, expected uint8 [T, H, W, 3], RGB"
            )
        side, how = self.config.model.image_size, self.config.dataset.resize
        video = np.stack([resize_array(frame, side, how) for frame in frames])
        if self.config.dataset.frame_packing == "channel_planes":
            video = pack_channel_planes(video)
        return np.asarray(normalise(video))


def load(path: str | os.PathLike) -> LoadedModel:
    """Loads a model.

    Args:
        path: a workdir (its best checkpoint: highest validation top1, of equals the later; the
            latest when none was evaluated), one checkpoint folder, or a converted model.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it cannot be read, or does not fit its own `model.json`.
    """
    folder = resolve_checkpoint(path)
    description = _read_description(folder)
    config = with_defaults(ConfigDict(description["config"]))
    model = RViT(config.model, rngs=nnx.Rngs(0))
    model.eval()
    state = nnx.state(model)
    template = _shapes(nnx.to_pure_dict(state))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(folder.absolute() / "params", template)
    except Exception as error:  # Orbax raises many kinds, bare Exception among them
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{folder}: the checkpoint cannot be read, or its shapes are not those of its "
            f"model.json: {first_line}"
        ) from error
    nnx.replace_by_pure_dict(state, variables)
    nnx.update(model, state)
    return LoadedModel(
        model=CompiledRViT(model),
        config=config,
        class_names=tuple(description["class_names"]),
        path=folder,
        step=int(description.get("step", 0)),
    )


def with_defaults(config: ConfigDict) -> ConfigDict:
    """A config of an earlier version, with the keys that came later at what they were then.

    A new key's default is what the code did before there was the key.
    """
    completed = base.get_config()
    known = leaf_keys(completed)
    for key in leaf_keys(config):
        section, _, name = key.rpartition(".")
        if key in known:
            parent = lookup(completed, section) if section else completed
            with parent.unlocked():
                parent[name] = lookup(config, key)
    return completed


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint folder that `path` means; see `load`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path).expanduser()
    if (path / "params").is_dir():
        return path
    steps_folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [
        folder
        for folder in steps_folder.glob("[0-9]*")
        if folder.name.isdigit() and (folder / "params").is_dir() and _meta_file(folder).is_file()
    ]
    if not steps:
        exists = "holds no checkpoint" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path} {exists}: expected a workdir of a training run, one of its checkpoints/STEP "
            "folders, or a converted model; train one with python -m rvit_jax.main "
            "--config=configs/gestures.py"
        )
    return max(steps, key=lambda f: _rank(_read_description(f).get("metrics"), int(f.name)))


def _meta_file(folder: Path) -> Path:
    """`model.json` of a checkpoint of training."""
    return folder / "meta" / "model.json"


def _read_description(folder: Path) -> dict[str, Any]:
    for file in (_meta_file(folder), folder / "model.json"):
        if file.is_file():
            try:
                description = json.loads(file.read_text())
            except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            if not isinstance(description, dict) or description.get("format") != FORMAT:
                raise ValueError(
                    f"{file} is not a model description of format {FORMAT}; it was made by another "
                    "version of rvit_jax, or by something else"
                )
            return description
    raise FileNotFoundError(
        f"{folder} has no model.json: it is not a checkpoint of rvit_jax, or was copied in part"
    )
