"""Training: the loop, its checkpoints and its records.

batch -> train step -> ... -> validation -> metrics.jsonl, TensorBoard -> checkpoint
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
from rvit_jax import (
    checkpoint,
    diagnose,
    distributed,
    evaluate,
    losses,
    optimizer,
    precision,
    sharding,
    steps,
)
from rvit_jax.augment import make_augment
from rvit_jax.initialise import Start, check_there, initialise
from rvit_jax.records import Records
from rvit_jax.stopping import Interrupted, StopRequest

if TYPE_CHECKING:
    from input_pipeline.loader import BatchIterator

# Seconds between two looks at the device's sums: each look waits for the device.
LOOK_EVERY_S = 2.0
# Beside the data position in a checkpoint.
TRAINING_SUMS = "training_sums"
VALIDATION_DATA = "validation_data"
MOST_REFUSED_IN_A_ROW = 20  # updates; then `on_nonfinite="skip"` stops too


@dataclasses.dataclass(frozen=True)
class _Refused:
    """A step whose update was refused: its loss or gradient is not finite.

    Attributes:
        step: its number, from 1.
        ids: of its clips.
        loss: mean over them, nats.
        grad_norm: of the whole gradient.
    """

    step: int
    ids: list[str]
    loss: float
    grad_norm: float


class _TrainingSums:
    """Sums of the steps since the last evaluation; fetched seldom, since that waits.

    Attributes:
        total: as of the last `fetch`; it is saved with the state, so that a resumed run writes the
            same records.
    """

    def __init__(self, allowed: int, explain: Callable[[list[_Refused], steps.TrainState], str]):
        """Begins with nothing.

        Args:
            allowed: updates in a row that may be refused.
            explain: what to say of more, given the state after them.
        """
        self._allowed, self._explain = allowed, explain
        self._pending: list[dict[str, Any]] = []
        self._refused: list[_Refused] = []  # in a row
        self._state: steps.TrainState | None = None
        self._looked = time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Starts anew, after an evaluation."""
        self.total = {"clips": 0.0, "loss": 0.0, "right": 0.0, "skipped": 0.0, "refused": 0.0}

    def add(
        self,
        step: int,
        state: steps.TrainState,
        sums: dict[str, jax.Array],
        batch: dict[str, Any],
        skipped: int | jax.Array,
    ) -> bool:
        """Takes a step's sums; True when it was time to look and they were fetched.

        Args:
            step: its number, from 1.
            state: after it.
            sums: see `steps.make_train_step`.
            batch: that it was given.
            skipped: clips of it that could not be read, over all processes.
        """
        self._state = state
        self._pending.append({**sums, "skipped": skipped, "step": step, "ids": batch["id"]})
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return False
        self.fetch()
        return True

    def fetch(self) -> None:
        """Waits for the device and checks the losses.

        Raises:
            FloatingPointError: more updates in a row were refused than may be.
        """
        for sums in jax.device_get(self._pending):
            self.total["skipped"] += float(sums["skipped"])
            if not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])):
                self.total["refused"] += 1
                ids = [str(clip_id) for clip_id in sums["ids"] if clip_id]
                loss = float(sums["loss"] / max(sums["clips"], 1.0))
                self._refused.append(_Refused(sums["step"], ids, loss, float(sums["grad_norm"])))
                continue
            if len(self._refused) <= self._allowed:
                self._refused.clear()
            for key in ("clips", "loss", "right"):
                self.total[key] += float(sums[key])
        self._pending.clear()
        if len(self._refused) > self._allowed:
            assert self._state is not None
            raise FloatingPointError(self._explain(self._refused, self._state))
        self._looked = time.monotonic()

    def means(self) -> dict[str, float]:
        """Loss and top1 over the clips trained on since `reset`, and what was left out.

        Clips that could not be read, and updates that were refused. Empty where no clip was
        trained on; of refused updates alone, no loss and top1.
        """
        clips = self.total["clips"]
        left_out: dict[str, float] = {
            "skipped_clips": int(self.total["skipped"]),
            "skipped_updates": int(self.total["refused"]),
        }
        if not clips:
            return left_out if self.total["refused"] else {}
        return {
            "loss": self.total["loss"] / clips,
            "top1": self.total["right"] / clips,
            **left_out,
        }


def train_and_evaluate(config: ConfigDict, workdir: Path) -> None:
    """Trains a model, or goes on where `workdir` stands, evaluating as it goes.

    Args:
        config: checked, see `config.check_config`.
        workdir: takes checkpoints, `model.json`, `metrics.jsonl`, TensorBoard's files and the
            final evaluation.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the state is saved and the same command goes on.
        ValueError: config, data or checkpoint do not fit together.
        FileNotFoundError: data is missing.
        OSError: the workdir cannot be written, or another run is at work in it.
        FloatingPointError: a loss or its gradient is not finite, see `config.on_nonfinite`.
    """
    checkpoint.check_writable(workdir)  # before the data, which may have to be drawn
    if distributed.is_first():  # it holds the workdir for all
        checkpoint.check_free(workdir)
    begins_elsewhere = bool(config.init_from) and not checkpoint.has_steps(workdir)
    if begins_elsewhere:
        check_there(config.init_from)
    layout = sharding.make_layout(config)
    sharding.check_accumulation(config, layout)
    if config.test_after_training:
        _check_test_split(config)
    parts = distributed.part_of_batches()
    train_data = input_pipeline.get_dataset(config, "train", **parts)
    _check_labels(config, train_data)
    validation_data = input_pipeline.get_dataset(config, "validation", **parts)
    run = _Run(config, workdir, layout, train_data, validation_data)
    description = checkpoint.describe_model(config, train_data.class_names)
    distributed.check_same("config or data", [description, train_data.get_state()])
    # Read before the workdir is made: a model that does not fit leaves no trace.
    start = run.read_start() if begins_elsewhere else None
    with (
        checkpoint.Checkpoints(
            workdir, description, keep=config.keep_checkpoints, agree=distributed.agree
        ) as checkpoints,
        StopRequest().listen() as stop,
    ):
        run.train(checkpoints, stop, start)
    train_data.close()
    validation_data.close()
    distributed.wait("trained")  # the last checkpoint has its name
    if config.test_after_training:
        record = evaluate.evaluate(config, workdir, "test", workdir)
        print(f"test: {_percentages(record)}, checkpoint of step {record['step']}")


def _check_labels(config: ConfigDict, data: "BatchIterator") -> None:
    """Raises ValueError where model and loss do not fit the classes of the data."""
    if len(data.class_names) != config.model.num_classes:
        raise ValueError(
            f"{config.dataset.data_dir} has {len(data.class_names)} classes, but "
            f"config.model.num_classes={config.model.num_classes}: say "
            f"--config.model.num_classes={len(data.class_names)}, or choose classes with "
            "--config.dataset.classes"
        )
    if data.multi_label != (config.loss.name == "binary_cross_entropy"):
        what = "several labels per clip" if data.multi_label else "one label per clip"
        instead = "binary_cross_entropy" if data.multi_label else "cross_entropy"
        raise ValueError(
            f"config.loss.name={config.loss.name}, but {config.dataset.data_dir} has {what}: set "
            f"it to {instead!r}"
        )


def _check_test_split(config: ConfigDict) -> None:
    """Raises now what would come after the whole training."""
    with contextlib.closing(input_pipeline.get_dataset(config, "test")) as test_data:
        if not test_data.has_labels:
            raise ValueError(
                "config.test_after_training=True, but the test split has no labels: set it to "
                "False; --mode=evaluate --split=test then gives predictions"
            )


class _Run:
    """A training run: what stays the same from step to step."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        layout: sharding.Layout,
        train_data: "BatchIterator",
        validation_data: "BatchIterator",
    ):
        self.config, self.workdir, self.layout = config, Path(workdir), layout
        self.train_data, self.validation_data = train_data, validation_data
        self.steps_per_epoch = train_data.steps_per_epoch
        self.total_steps = config.num_epochs * self.steps_per_epoch
        schedule = optimizer.learning_rate_schedule(
            config.optimizer, self.steps_per_epoch, config.num_epochs
        )
        model = precision.make_model(config, rngs=nnx.Rngs(config.seed))
        transformation = precision.make_optimizer_for(
            config.opt_level, optimizer.make_optimizer(config.optimizer, schedule)
        )
        graphdef, self.initial_state = steps.create_train_state(
            model, transformation, ema=config.ema_decay > 0
        )
        loss_per_clip = losses.make_loss(config.loss)
        ragged = evaluate.is_ragged(config)
        self.graphdef, self.augment = graphdef, make_augment(config, train_data.class_names)
        train_step = steps.make_train_step(
            graphdef,
            transformation,
            loss_per_clip,
            seed=config.seed,
            ragged=ragged,
            augment=self.augment,
            accumulation_steps=config.optimizer.accumulation_steps,
            ema_decay=config.ema_decay,
            halt=config.on_nonfinite == "stop",
            spread=layout.spread,
        )
        self.train_step = layout.compile_step(train_step)
        eval_step = steps.make_eval_step(
            graphdef, loss_per_clip, ragged=ragged, multi_label=validation_data.multi_label
        )
        self.eval_step = layout.compile_whole(eval_step)
        self.schedule = schedule

    def train(
        self, checkpoints: checkpoint.Checkpoints, stop: StopRequest, start: Start | None = None
    ) -> None:
        """The loop; see `train_and_evaluate`.

        Args:
            checkpoints: of the workdir.
            stop: tells of signals.
            start: what a run begins with that has no checkpoint yet; None: with new weights.
        """
        state, step = self.layout.place(self.initial_state), 0
        allowed = MOST_REFUSED_IN_A_ROW if self.config.on_nonfinite == "skip" else 0
        sums = _TrainingSums(allowed, self._explain)
        restored = checkpoints.restore_latest(state)
        if restored is None and start is not None:
            state, step = self._begin_with(start)
        elif restored is not None:
            state, position = restored
            sums.total |= position.pop(TRAINING_SUMS, {})
            if VALIDATION_DATA in position:  # not in those of earlier versions
                self.validation_data.set_state(position.pop(VALIDATION_DATA))
            self.train_data.set_state(position)
            step = int(state.step)
            if step > self.total_steps:
                raise ValueError(
                    f"{self.workdir} is at step {step}, past the {self.total_steps} of "
                    f"config.num_epochs={self.config.num_epochs}: raise it, or take another "
                    "--workdir"
                )
            print(f"resuming {self.workdir} at step {step} of {self.total_steps}")
        records = Records(self.workdir) if distributed.is_first() else None
        record = distributed.from_first(records.cut_back(step) if records else None)
        if record is not None:
            sums.reset()  # saved before that evaluation, where a signal had put it off
        closing = contextlib.closing(records) if records else contextlib.nullcontext()
        with closing, self._progress_bar(step) as bar:
            while True:
                stop.look(step)
                checkpoints.check()
                if self._evaluation_is_due(step) and record is None:
                    sums.fetch()
                    record = self._validate(state, stop)
                    if record is not None:
                        means = sums.means()
                        rate = float(self.schedule(optimizer.updates_made(state.opt_state)))
                        if records:
                            records.write(record, {**means, "lr": rate})
                        self._report(bar, step, means, record)
                        sums.reset()
                        distributed.wait("record")  # the first process has written it
                last = bool(stop) or step == self.total_steps  # once: a signal may come any time
                if last or record is not None:
                    sums.fetch()  # a state whose loss is not finite is not saved
                    checkpoints.save(state, self._position(sums), record)
                if last:
                    checkpoints.wait()
                    if stop.signum is not None:
                        raise Interrupted(stop.signum)
                    return
                batch = next(self.train_data)
                state, step_sums = self.train_step(state, self.layout.send(batch))
                step, record = step + 1, None
                skipped = self.layout.total(evaluate.count_skipped(batch))
                looked = sums.add(step, state, step_sums, batch, skipped)
                if looked and "loss" in (means := sums.means()):  # not if all was skipped
                    refused = means["skipped_updates"]
                    bar.set_postfix_str(
                        f"loss {means['loss']:.3f}, top1 {means['top1']:.1%}"
                        + (f", {refused} updates skipped" if refused else "")
                    )
                bar.update(self._clips_after(step) - bar.n)
                every = self.config.checkpoint_every_steps
                if every and step % every == 0 and not self._evaluation_is_due(step):
                    sums.fetch()
                    checkpoints.save(state, self._position(sums), None)

    def _position(self, sums: _TrainingSums) -> dict[str, Any]:
        """Where the data stands, and what the next record has so far."""
        return {
            **self.train_data.get_state(),
            TRAINING_SUMS: sums.total,
            VALIDATION_DATA: {**self.validation_data.get_state(), "position": 0},
        }

    def read_start(self) -> Start:
        """What `config.init_from` gives."""
        start = initialise(
            self.config, self.initial_state, self.steps_per_epoch, self.train_data.class_names
        )
        if int(start.state.step) >= self.total_steps:
            raise ValueError(
                f"config.init_from={self.config.init_from} has {start.epochs} epochs behind it, "
                f"config.num_epochs={self.config.num_epochs}: raise it to train on"
            )
        return start

    def _begin_with(self, start: Start) -> tuple[steps.TrainState, int]:
        """The state of another model, and the step that it stands at."""
        step = int(start.state.step)
        position = {**self.train_data.get_state(), "position": step}
        self.train_data.set_state(position)
        print(f"starting from {self.config.init_from}:", *start.notes, sep="\n  ")
        return self.layout.place(start.state), step

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.evaluate_every_epochs * self.steps_per_epoch
        return step > 0 and (step % every == 0 or step == self.total_steps)

    def _validate(self, state: steps.TrainState, stop: StopRequest) -> dict[str, Any] | None:
        """The validation record of a state; None when a signal came in between."""
        result = self._evaluate(state.params, state.fixed, "validation", stop)
        if result is None:
            return None
        step = int(state.step)
        folder = self.workdir / "checkpoints" / str(step)
        record = evaluate.make_record(result, "validation", self.config, folder, step)
        if state.ema is not None:
            averaged = self._evaluate(state.ema, state.fixed, "validation of the average", stop)
            if averaged is None:
                return None
            for key in ("top1", "mean_average_precision", "loss"):
                if averaged.metrics and key in averaged.metrics:
                    record[f"ema_{key}"] = averaged.metrics[key]
        return record

    def _evaluate(
        self, params: steps.State, fixed: steps.State, progress: str, stop: StopRequest
    ) -> evaluate.SplitResult | None:
        """One pass over the validation split; None when a signal came in between."""
        self.validation_data.rewind()
        return evaluate.evaluate_split(
            self.eval_step,
            self.layout.gather(params),
            self.layout.gather(fixed),
            self.validation_data,
            num_classes=self.config.model.num_classes,
            multi_label=self.validation_data.multi_label,
            progress=progress,
            should_stop=lambda: bool(stop),
            send=self.layout.send,
        )

    def _explain(self, refused: list[_Refused], state: steps.TrainState) -> str:
        """What to say of updates that were refused, the last ones of `state`."""
        first = refused[0]
        others = ", ".join(str(r.step) for r in refused[1:6])
        more = f", ... {refused[-1].step}" if len(refused) > 6 else ""
        others = f"; so were those of steps {others}{more}" if others else ""
        return (
            f"the training loss or its gradient is not finite: step {first.step} (loss "
            f"{first.loss:.4g}, gradient's norm {first.grad_norm:.4g}) was refused; its clips are "
            f"{', '.join(first.ids)}{others}. {self._diagnosis(first.step, state)}. The last "
            "checkpoint is from before: lower config.optimizer.learning_rate, set "
            "config.optimizer.clip_norm, or let config.on_nonfinite='skip' leave such steps out"
        )

    def _diagnosis(self, step: int, state: steps.TrainState) -> str:
        """The largest values in a forward pass of a step's batch, read once more."""
        try:
            self.train_data.set_state({**self.train_data.get_state(), "position": step - 1})
            batch = evaluate.on_device(next(self.train_data))
            key = jax.random.fold_in(jax.random.key(self.config.seed), step - 1)
            video, _ = self.augment(
                key, batch["video"], batch["label"], batch["mask"], batch["num_frames"]
            )
            # From wherever they lie to where these clips are.
            variables = jax.device_put(jax.device_get((state.params, state.fixed)))
            model = nnx.merge(self.graphdef, *variables)
            largest = diagnose.largest_activations(model, video, batch["num_frames"], batch["mask"])
        except Exception as error:  # the error that it was to explain must come out all the same
            return f"Its clips could not be looked at again: {type(error).__name__}: {error}"
        values = ", ".join(f"{name} {value:.3g}" for name, value in largest.items())
        return f"Largest values in them with the parameters before, without dropout: {values}"

    def _report(
        self, bar: tqdm, step: int, training: dict[str, float], record: dict[str, Any]
    ) -> None:
        epoch = step / self.steps_per_epoch
        seen = (
            f"training loss {training['loss']:.4f}, top1 {training['top1']:.2%}; "
            if "loss" in training  # not where a resumed run begins with its evaluation
            else ""
        )
        bar.write(
            f"epoch {epoch:g}/{self.config.num_epochs}, step {step}: {seen}validation "
            f"{_percentages(record)}"
        )

    def _clips_after(self, step: int) -> int:
        """Clips that have come by then, over all processes, as if all batches held as many."""
        return step * self.train_data.num_clips // self.steps_per_epoch

    def _progress_bar(self, step: int) -> tqdm:
        clips = self.train_data.num_clips
        return tqdm(
            total=self.config.num_epochs * clips,
            initial=self._clips_after(step),
            disable=not distributed.is_first(),
            desc="training",
            unit="clip",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )


def _percentages(record: dict[str, Any]) -> str:
    if "mean_average_precision" in record:
        text = f"loss {record['loss']:.4f}, mAP {record['mean_average_precision']:.2%}"
    else:
        text = f"loss {record['loss']:.4f}, top1 {record['top1']:.2%}, top5 {record['top5']:.2%}"
    averaged = record.get("ema_mean_average_precision", record.get("ema_top1"))
    return text if averaged is None else f"{text}, of the average {averaged:.2%}"
