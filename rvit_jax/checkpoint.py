"""Checkpoints: written by training, read by everything.

    WORKDIR/model.json                    what the model is: config, class names, preprocessing
    WORKDIR/checkpoints/STEP/params/      the model's variables            (Orbax)
    WORKDIR/checkpoints/STEP/ema/         the same, averaged over steps    (Orbax; with `ema_decay`)
    WORKDIR/checkpoints/STEP/optimizer/   optimizer state and step         (Orbax; not if converted)
    WORKDIR/checkpoints/STEP/data/        position in the training data    (JSON; not if converted)
    WORKDIR/checkpoints/STEP/meta/model.json   model.json of that step, its metrics, checksums
    WORKDIR/damaged/STEP/                 a step that was found damaged when the run went on

Orbax writes a step aside and renames it when it is whole and on the disk. `meta/model.json` holds
the checksum of every array, of the data position and of itself: see `rvit_jax/seal.py`. A
checkpoint folder is complete in itself: it may be moved or copied.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging as python_logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from configs import base
from input_pipeline.command_line import check_output_folder, leaf_keys
from input_pipeline.files import exclusively, flush, flush_tree, folder_written_aside, write_json
from input_pipeline.transforms import pack_channel_planes, resize_array
from rvit_jax import precision, seal
from rvit_jax.config import lookup
from rvit_jax.layers import in_float32
from rvit_jax.model import CompiledRViT, normalise
from rvit_jax.seal import DamagedError
from rvit_jax.steps import TrainState
from rvit_jax.version import __version__

FORMAT = 1  # of model.json
_PYTORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
# Keys that a resumed run may change: how long it goes on, what it keeps, where and how it reads.
FREE_KEYS = (
    "num_epochs",
    "evaluate_every_epochs",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "test_after_training",
    "optimizer.accumulation_steps",
    "on_nonfinite",
    "mesh.data",
    "mesh.fsdp",
    "model.remat",
    "model.schedule",
    "model.segment_frames",
    "dataset.data_dir",
    "dataset.num_workers",
    "dataset.timeout_s",
    "dataset.cache",
    "dataset.on_error",
    "views.temporal",
    "views.spatial",
)
# Keys of config.dataset that belong to a trained model.
PREPROCESSING_KEYS = (
    "num_frames",
    "frame_stride",
    "frame_rate",
    "sampling",
    "resize",
    "decoder",
    "short_clips",
    "frame_packing",
)


def write_model(folder: Path, arrays: Mapping[str, Any], description: dict[str, Any]) -> None:
    """Writes a model that no run has trained, sealed, as `load` reads it; whole or not at all.

    Args:
        folder: new, or empty.
        arrays: "params", and what else belongs to the model.
        description: of `describe_model`, with what else is known of it.

    Raises:
        OSError: it cannot be written; the message names `folder`.
    """
    _keep_tracebacks_back()
    try:
        with folder_written_aside(folder) as aside, ocp.StandardCheckpointer() as checkpointer:
            for name, tree in arrays.items():
                checkpointer.save(aside.absolute() / name, tree)
            checkpointer.wait_until_finished()
            write_json(aside / "model.json", sealed(description, arrays))
    except OSError:
        raise
    except Exception as error:  # Orbax raises many kinds
        full = "No space left on device"
        reason = f"{full}: make room there" if full in str(error) else _first_line(error)
        raise OSError(f"{folder} cannot be written: {reason}") from error


def check_writable(workdir: Path, inside: str = "") -> None:
    """Raises OSError unless `workdir`, or a folder in it, can be made or written; makes none."""
    check_output_folder(Path(workdir), "--workdir", inside)


def describe_model(config: ConfigDict, class_names: Sequence[str]) -> dict[str, Any]:
    """The content of `model.json`."""
    dataset = config.dataset
    return {
        "format": FORMAT,
        "config": json.loads(config.to_json_best_effort()),
        "class_names": list(class_names),
        "preprocessing": {
            "image_size": config.model.image_size,
            "filter": {"pillow": "bicubic (Pillow)", "fast": "bilinear (OpenCV)"}[dataset.decoder],
            "normalise": "(x / 255 - 0.5) / 0.5",
            **{key: dataset[key] for key in PREPROCESSING_KEYS},
        },
        "made_by": {
            "rvit_jax": __version__,
            **{module.__name__: module.__version__ for module in (jax, np)},
        },
    }


class _KeepLatestAndBest(policies.PreservationPolicy):  # type: ignore[misc]  # Orbax has no types
    """Keeps the latest `keep` checkpoints and the best one; of equals the later is the best.

    Args:
        keep: how many of the latest.
        metrics_of: step -> its validation metrics, None where it was not evaluated.
    """

    def __init__(self, keep: int, metrics_of: Callable[[int], dict[str, Any] | None]):
        self._keep, self._metrics_of = keep, metrics_of

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint stays; they come in the order of their steps."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max(steps, key=lambda step: _rank(self._metrics_of(step), step), default=None)
        return [step in steps[-self._keep :] or step == best for step in steps]


def _rank(metrics: dict[str, Any] | None, step: int) -> tuple[float, int]:
    """The greatest is the best checkpoint: highest top1 or mAP, of equals the later."""
    if not metrics:
        return (-1.0, step)
    return (metrics.get("mean_average_precision", metrics.get("top1", -1.0)), step)


_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one run, for this process alone; leaving finishes the last save.

    Args:
        workdir: of the run; made if absent.
        description: `describe_model` of the run.
        keep: how many of the latest stay; the best one always does.
        agree: for several processes: takes what this one found wrong (None: nothing) and gives all
            of them the same answer, what one of them found wrong.

    Raises:
        OSError: the folder cannot be written.
        BlockingIOError: another run is at work in it.
    """

    def __init__(
        self,
        workdir: Path,
        description: dict[str, Any],
        *,
        keep: int,
        agree: Callable[[str | None], str | None] = lambda problem: problem,
    ):
        self.workdir = Path(workdir).absolute()
        self._description = description
        self._agree = agree
        self._metrics: dict[int, dict[str, Any] | None] = {}  # of steps saved by this process
        self._root = self.workdir / "checkpoints"
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._held = contextlib.ExitStack()
        self._lock()
        _keep_tracebacks_back()
        # Orbax calls back before a step gets its name, and never flushes by itself.
        flushing = ocp.AsyncOptions(post_finalization_callback=self._flush_unnamed)
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_KeepLatestAndBest(keep, self._metrics_of),
                cleanup_tmp_directories=True,
                async_options=flushing,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "ema": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(filename="model.json"),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._saving():
                self._manager.close()
        except OSError as error:
            if kind is None:
                raise
            logging.warning("%s", error)  # what ended the block counts
        finally:
            self._held.close()

    def save(
        self, state: TrainState, data_position: dict[str, Any], metrics: dict[str, Any] | None
    ) -> None:
        """Saves in the background what a step needs to go on; arguments may change at once.

        A step that is there already gets the metrics that it lacked, and is left as it is.

        Raises:
            OSError: this save or the one before it failed.
        """
        self.check()
        # Orbax writes JSON later, from the object itself: what training has added by then would
        # be in the file, and the checksum of another.
        data_position, metrics = copy.deepcopy((data_position, metrics))
        step = int(state.step)
        meta = {**self._description, "step": step, "metrics": metrics}
        if step in self._manager.all_steps():
            if metrics is not None and self._metrics_of(step) is None:
                self.wait()
                there = _read_description(self._folder(step))
                meta |= {key: there[key] for key in ("seal",) if key in there}
                if jax.process_index() == 0:
                    write_json(_meta_file(self._folder(step)), seal.with_own_seal(meta))
                self._agree(None)  # when it is written
                self._metrics[step] = metrics
            return
        self._metrics[step] = metrics
        arrays = _items(state)
        meta = sealed(meta, arrays, data_position)
        with self._saving():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    data=ocp.args.JsonSave(data_position),
                    meta=ocp.args.JsonSave(meta),
                    **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                ),
            )
        if not saved:
            raise RuntimeError(f"{self.workdir}: the checkpoint of step {step} was not written")

    def restore_latest(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state and data position of the latest whole checkpoint; None when there is none.

        Later ones that are damaged are moved to `WORKDIR/damaged`, with a warning that names the
        cause. Writes `model.json` for the run that begins here or goes on.

        Args:
            state: of step 0, for shapes and types.

        Raises:
            ValueError: the checkpoint belongs to another config, or all are damaged.
            OSError: they cannot be read for a reason that is not theirs.
        """
        metas, damaged = self._read_metas()
        if metas:
            self._check_same_run(metas[max(metas)], max(metas))
        # Only now: a config that is refused leaves no trace.
        if jax.process_index() == 0:
            write_json(self.workdir / "model.json", seal.with_own_seal(self._description))
        template = _items(state)
        for step in sorted(metas, reverse=True):
            folder = self._folder(step)
            restored, problem = self._try(lambda: _read_step(folder, metas[step], template))  # noqa: B023
            if problem is not None:
                damaged[folder] = problem
            elif restored is not None:
                self._set_aside(damaged)
                # Read now: later the first of several processes may just be deleting one.
                self._metrics |= {number: meta.get("metrics") for number, meta in metas.items()}
                return self._replace(state, restored)
        if damaged:
            raise ValueError(
                f"{self._root} holds no whole checkpoint: {'; '.join(damaged.values())}. They are "
                "left as they are: bring one back from a copy, or start anew with another --workdir"
            )
        return None

    def check(self) -> None:
        """Raises OSError if a save in the background has failed."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            flush(self._root)

    def _folder(self, step: int) -> Path:
        return self._root / str(step)

    def _lock(self) -> None:
        """Keeps other runs out of the workdir; of several processes the first one does."""
        problem = None
        if jax.process_index() == 0:
            try:
                self._held.enter_context(locked(self.workdir))
            except OSError as error:
                problem = str(error)
        problem = self._agree(problem)
        if problem is not None:
            self._held.close()
            raise BlockingIOError(problem)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Names what Orbax raises, of whatever kind, when it cannot write."""
        try:
            yield
        except Exception as error:
            whole = [
                step for step in self._step_folders() if _meta_file(self._folder(step)).is_file()
            ]
            rest = f"that of step {max(whole)} is whole" if whole else "there is none yet"
            raise OSError(
                f"{self._root}: a checkpoint cannot be saved: {_first_line(error)}; {rest}. Make "
                "room or mend the disk; then the same command goes on"
            ) from error

    def _flush_unnamed(self) -> None:
        """Puts the step that Orbax has just written on the disk, before it gets its name."""
        if jax.process_index() != 0:  # which gives it the name, and may do so meanwhile
            return
        for folder in self._root.glob("*.orbax-checkpoint-tmp*"):
            flush_tree(folder)

    def _step_folders(self) -> dict[int, Path]:
        """All that Orbax takes for a step, whole or not, the latest first."""
        folders = (f for f in self._root.iterdir() if f.is_dir() and f.name.isdecimal())
        return {int(f.name): f for f in sorted(folders, key=lambda f: int(f.name), reverse=True)}

    def _try(self, read: Callable[[], _T]) -> tuple[_T | None, str | None]:
        """What `read` gives, or what all processes take to be wrong with it."""
        content, problem = None, None
        try:
            content = read()
        except (DamagedError, FileNotFoundError) as error:
            problem = str(error)
        return content, self._agree(problem)

    def _read_metas(self) -> tuple[dict[int, dict[str, Any]], dict[Path, str]]:
        """The description of each step, and of those that have none that can be used, the cause."""
        metas: dict[int, dict[str, Any]] = {}
        damaged: dict[Path, str] = {}
        for step, folder in self._step_folders().items():
            meta, problem = self._try(lambda: _read_step_description(folder))  # noqa: B023
            if problem is not None:
                damaged[folder] = problem
            elif meta is not None:
                metas[step] = meta
        return metas, damaged

    def _set_aside(self, damaged: Mapping[Path, str]) -> None:
        """Moves damaged steps out of the way, where Orbax would count them."""
        if not damaged:
            return
        for folder, problem in damaged.items():
            number, target = 1, self.workdir / "damaged" / folder.name
            while target.exists():
                number += 1
                target = target.with_name(f"{folder.name}-{number}")
            if jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                shutil.move(folder, target)
            logging.warning(
                "damaged checkpoint: %s; it is now %s, and an earlier one is used", problem, target
            )
        self._agree(None)  # when the first process has moved them
        self._manager.reload()
        self._metrics.clear()

    def _replace(
        self, state: TrainState, restored: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """`state` with what was read, where the arrays of `state` lie, and the data position."""
        arrays = jax.tree.map(
            _place, {name: restored[name] for name in _items(state)}, _items(state)
        )
        if state.ema is not None:
            nnx.replace_by_pure_dict(state.ema, _select(arrays["ema"], nnx.to_pure_dict(state.ema)))
        state = with_variables(state, arrays["params"])
        optimizer = arrays["optimizer"]
        state = dataclasses.replace(state, step=optimizer["step"], opt_state=optimizer["state"])
        return state, restored["data"]

    def _metrics_of(self, step: int) -> dict[str, Any] | None:
        """A step's validation metrics: Orbax's own record of them does not outlive the process."""
        if step not in self._metrics:
            there = _meta_file(self._folder(step)).exists()
            self._metrics[step] = (
                _read_description(self._folder(step))["metrics"] if there else None
            )
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


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a checkpoint, by the folder that they lie in."""
    items = {
        "params": _variables(state),
        "optimizer": {"step": state.step, "state": state.opt_state},
    }
    if state.ema is not None:
        items["ema"] = _variables(dataclasses.replace(state, params=state.ema))
    return items


def sealed(
    description: Mapping[str, Any], arrays: Mapping[str, Any], data_position: Any = None
) -> dict[str, Any]:
    """A checkpoint's `model.json`, with the checksums of what lies beside it and of itself.

    Args:
        description: see `describe_model`.
        arrays: folder ("params", "optimizer", "ema") -> tree of arrays.
        data_position: of a checkpoint of training.
    """
    sums: dict[str, Any] = {"arrays": {n: seal.seal_arrays(tree) for n, tree in arrays.items()}}
    if data_position is not None:
        sums["data"] = seal.seal_json(data_position)
    return seal.with_own_seal({**description, "seal": sums})


def read_arrays(folder: Path, item: str, template: Any, description: Mapping[str, Any]) -> Any:
    """The arrays of a checkpoint's folder, as NumPy's, checked against their checksums.

    Args:
        folder: of the checkpoint.
        item: "params", "optimizer" or "ema".
        template: a tree of arrays with the same shapes and types.
        description: the checkpoint's `model.json`; one without checksums is of an earlier version,
            and nothing is checked.

    Raises:
        DamagedError: they cannot be read or are not what was saved.
        ValueError: the program holds other arrays than the checkpoint.
        OSError, MemoryError: they cannot be read for a reason that is not theirs.
    """
    sums = description.get("seal", {}).get("arrays", {}).get(item)
    if sums is not None:
        there, here = seal.kinds_of_seal(sums), seal.kinds(template)
        if other := seal.differing(there, here):
            raise ValueError(
                f"{folder / item} was made by another version or config: {other[0]} is "
                f"{there.get(other[0], 'not there')}, here {here.get(other[0], 'not there')} "
                f"({len(other)} arrays differ)"
            )
    _ignore_late_readers()
    # A number's bytes repeated: a template takes no memory.
    like = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), template)
    try:
        handler = ocp.StandardCheckpointHandler()
        arrays = handler.restore((folder / item).absolute(), args=ocp.args.StandardRestore(like))
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # Orbax raises many kinds, bare Exception among them
        if any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")):
            raise OSError(f"{folder / item} cannot be read: {_first_line(error)}") from error
        raise DamagedError(f"{folder / item} cannot be read: {_first_line(error)}") from error
    there, here = seal.kinds(arrays), seal.kinds(template)
    if other := seal.differing(there, here):  # Orbax does not mind
        raise DamagedError(
            f"{folder / item} cannot be read: {other[0]} is {there.get(other[0], 'not there')}, "
            f"expected {here.get(other[0], 'none')}"
        )
    if sums is not None and (wrong := seal.differing(sums, seal.seal_arrays(arrays))):
        raise DamagedError(
            f"{folder / item}: {wrong[0]} is not what was saved, its checksum differs "
            f"({len(wrong)} of {len(sums)} arrays)"
        )
    return arrays


def _read_step_description(folder: Path) -> dict[str, Any]:
    """`model.json` of a step of training, which knows its own number."""
    description = _read_description(folder)
    if folder.name != str(description.get("step")):
        raise DamagedError(
            f"{folder} is the checkpoint of step {description.get('step')} under another name"
        )
    return description


def _read_step(
    folder: Path, meta: Mapping[str, Any], template: Mapping[str, Any]
) -> dict[str, Any]:
    """All of a step: its arrays by folder, and "data"."""
    if "seal" not in meta:
        logging.warning(
            "%s has no checksums (an earlier version wrote it): damage would go unnoticed", folder
        )
    content = {name: read_arrays(folder, name, tree, meta) for name, tree in template.items()}
    content["data"] = _read_json(folder / "data" / "metadata")
    if "seal" in meta and seal.seal_json(content["data"]) != meta["seal"]["data"]:
        raise DamagedError(f"{folder / 'data' / 'metadata'} is not what was saved")
    return content


def _place(value: np.ndarray, like: jax.Array) -> jax.Array:
    """An array where `like` lies; its memory is its own, for a step may take it over."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda at: value[at].copy())


@functools.cache
def _ignore_late_readers() -> None:
    """Once an array fails, those still being read report to an event loop that is gone.

    Each of them would print a traceback, after the error that counts.
    """
    report = sys.unraisablehook

    def hook(event: Any) -> None:
        if "Event loop is closed" not in str(event.exc_value):
            report(event)

    sys.unraisablehook = hook


def _keep_tracebacks_back() -> None:
    """Of a failed save, Orbax and asyncio log a traceback per array; `_saving` says it once."""
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    logging.get_absl_logger().addFilter(_is_no_traceback_of_orbax)


def _is_no_traceback_of_orbax(record: python_logging.LogRecord) -> bool:
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _first_line(error: Exception) -> str:
    """What an error says, without the driver's settings that TensorStore adds."""
    line = next((line for line in str(error).strip().splitlines() if line), repr(error))
    return line.split(" [tensorstore_spec", 1)[0]


def check_free(workdir: Path) -> None:
    """Raises BlockingIOError where another run is at work; a workdir that is new stays unmade."""
    if jax.process_index() == 0 and (Path(workdir) / ".lock").exists():
        with locked(Path(workdir)):
            pass


def locked(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of a workdir, see `files.exclusively`."""
    return exclusively(workdir, "is trained in")


def _shapes(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def with_variables(state: TrainState, variables: dict[str, Any]) -> TrainState:
    """A training state with a model's variables, trained and fixed, from nested dicts."""
    params, fixed = state.params, state.fixed
    nnx.replace_by_pure_dict(params, _select(variables, nnx.to_pure_dict(params)))
    nnx.replace_by_pure_dict(fixed, _select(variables, nnx.to_pure_dict(fixed)))
    return dataclasses.replace(state, params=params, fixed=fixed)


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
        description: its `model.json`, see `describe_model`.
    """

    model: CompiledRViT
    config: ConfigDict
    class_names: tuple[str, ...]
    path: Path
    step: int
    description: dict[str, Any]

    def resize(self, frame: np.ndarray) -> np.ndarray:
        """One frame, uint8 [H, W, 3], as in training: uint8 [image_size, image_size, 3]."""
        side, dataset = self.config.model.image_size, self.config.dataset
        return resize_array(frame, side, dataset.resize, decoder=dataset.decoder)

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
        video = np.stack([self.resize(frame) for frame in frames])
        if self.config.dataset.frame_packing == "channel_planes":
            video = pack_channel_planes(video)
        return np.asarray(normalise(video))


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """Loads a model.

    Args:
        path: a workdir (its best checkpoint: highest validation top1, of equals the later; the
            latest when none was evaluated), one checkpoint folder, or a converted model. Its
            `params` are read; the moving average where its folder itself is named,
            `.../STEP/ema`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedError: it is not what was saved.
        ValueError: it cannot be read, or does not fit its own `model.json`.
    """
    folder = resolve_checkpoint(path)
    description = _read_description(folder)
    config = with_defaults(ConfigDict(description["config"]))
    model = precision.make_model(config, rngs=nnx.Rngs(0))
    model.eval()
    state = nnx.state(model)
    where, item = (folder.parent, "ema") if _is_ema(folder) else (folder, "params")
    if item == "ema":
        state = jax.tree.map(in_float32, state)
    template = _shapes(nnx.to_pure_dict(state))
    try:
        variables = read_arrays(where, item, template, description)
    except DamagedError as error:
        if "seal" in description:
            raise DamagedError(f"{error}; take another checkpoint with --checkpoint=") from error
        raise ValueError(
            f"{folder}: the checkpoint cannot be read, or its shapes are not those of its "
            f"model.json: {_first_line(error)}"
        ) from error
    nnx.replace_by_pure_dict(state, variables)
    # bfloat16 parameters in float32 too: the same numbers.
    nnx.update(model, jax.tree.map(lambda x: in_float32(jnp.asarray(x)), state))
    return LoadedModel(
        model=CompiledRViT(model),
        config=config,
        class_names=tuple(description["class_names"]),
        path=folder,
        step=int(description.get("step", 0)),
        description=description,
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


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that `path` means; see `load`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path).expanduser()
    if (path / "params").is_dir() or _is_ema(path):
        return path
    steps_folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [
        folder
        for folder in steps_folder.glob("[0-9]*")
        if folder.name.isdigit() and (folder / "params").is_dir() and _meta_file(folder).is_file()
    ]
    if not steps:
        raise FileNotFoundError(_no_checkpoint_message(path))
    return max(steps, key=lambda f: _rank(_read_description(f).get("metrics"), int(f.name)))


def _no_checkpoint_message(path: Path) -> str:
    if path.suffix in _PYTORCH_SUFFIXES and path.is_file():
        return (
            f"{path} is a file of PyTorch: convert it with python -m weights_converter to_flax "
            f"{path} OUT_DIR, and name OUT_DIR"
        )
    exists = "holds no checkpoint" if path.exists() else "does not exist"
    exists = "is a file, no checkpoint" if path.is_file() else exists
    return (
        f"{path} {exists}: expected a workdir of a training run, one of its checkpoints/STEP "
        "folders, or a converted model; train one with python -m rvit_jax.main --config=FILE"
    )


def has_steps(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run in `workdir` would go on; whether its checkpoints are whole is seen then."""
    folders = (Path(workdir) / "checkpoints").glob("*")
    return any(folder.is_dir() and folder.name.isdecimal() for folder in folders)


def _is_ema(path: Path) -> bool:
    """Whether `path` is the moving average's folder in a checkpoint."""
    return path.name == "ema" and path.is_dir() and (path.parent / "params").is_dir()


def _meta_file(folder: Path) -> Path:
    """`model.json` of a checkpoint of training."""
    return (folder.parent if _is_ema(folder) else folder) / "meta" / "model.json"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} cannot be read: {error}") from error


def _read_description(folder: Path) -> dict[str, Any]:
    for file in (_meta_file(folder), folder / "model.json"):
        if file.is_file():
            description = _read_json(file)
            if isinstance(description, dict) and not seal.is_intact(description):
                raise DamagedError(
                    f"{file} is not what was written, its checksum differs; if you changed it "
                    'yourself, remove its line "sha256"'
                )
            if not isinstance(description, dict) or description.get("format") != FORMAT:
                raise ValueError(
                    f"{file} is not a model description of format {FORMAT}; it was made by another "
                    "version of rvit_jax, or by something else"
                )
            return description
    raise FileNotFoundError(
        f"{folder} has no model.json: it is not a checkpoint of rvit_jax, or was copied in part"
    )
