"""Trains the same RViT in several ways, seed by seed, and compares them on the test split.

    python scripts/compare_training.py --config=configs/gestures.py [--seeds=3]
        [--contenders=jax,torch] [--workdir=results/compare_training] [--config.KEY=VALUE ...]

Contenders: "jax", ours at the config's precision; "O0", "O1", "O2", ours at that one; "torch", the
same network in PyTorch, float32. The last one is what the others are compared with.

All start from the same weights (drawn by PyTorch), see the same batches in the same order and
follow the same recipe: schedule, AdamW, gradient clipping, loss, dropout rates. Only PyTorch's
random numbers of dropout differ. The weights after the last step answer every test clip once;
nothing is chosen by looking at an evaluation.

Every finished run is a file `WORKDIR/seed_SEED_CONTENDER.json` with its loss curve and its answer
to every clip. Interrupted, the same command goes on with the runs that are missing. The table is
kept in `WORKDIR/summary.json`.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.command_line import leaf_keys, leave_at_once, own_flags, require, suggest

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import jax
import numpy as np
import optax
import torch
from absl import flags
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
from configs import base
from input_pipeline.files import write_json
from rvit_jax import RViT, evaluate, losses, optimizer, precision, steps
from rvit_jax.checkpoint import check_writable
from rvit_jax.command import ArgumentError, parse, run, start
from rvit_jax.config import LEVELS, check_config, lookup
from weights_converter import mapping
from weights_converter.run_archive import for_torch
from weights_converter.torch_rvit import TorchRViT

CONTENDERS = ("jax", *LEVELS, "torch")
# Steps that are not timed: the first ones compile and warm up.
UNTIMED_STEPS = 3
# Keys that change how fast data come, not which.
FREE_KEYS = ("data_dir", "num_workers", "cache")
# What the recipe here has no part for; `dataset.augment.*` too.
LEFT_OUT = (
    *("init_from", "ema_decay", "dataset.length_buckets"),
    *("optimizer.frozen", "optimizer.layer_decay", "optimizer.accumulation_steps"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one contender made of one seed.

    Attributes:
        seed: of weights, shuffling and dropout.
        contender: one of `CONTENDERS`.
        losses: mean loss over the clips of every training batch, in nats.
        ids: of the test clips, in the split's order.
        right: whether each was answered rightly.
        seconds_per_step: median over the timed steps, loading excluded.
    """

    seed: int
    contender: str
    losses: list[float]
    ids: list[str]
    right: list[bool]
    seconds_per_step: float

    @property
    def top1(self) -> float:
        """Fraction of the test clips answered rightly."""
        return float(np.mean(self.right))


def initial_oracle(config: ConfigDict) -> TorchRViT:
    """The weights that all start from: a function of `config.seed` alone."""
    torch.manual_seed(config.seed)
    return TorchRViT(config.model)


def initial_model(config: ConfigDict) -> RViT:
    """The same weights in our model."""
    weights = {name: t.numpy() for name, t in initial_oracle(config).state_dict().items()}
    model = precision.make_model(config, rngs=nnx.Rngs(config.seed))
    dtype = precision.param_dtype(config.opt_level)
    flat = mapping.to_flax(weights, config.model)
    mapping.load_into(model, {path: array.astype(dtype) for path, array in flat.items()})
    return model


def batches(data: Any, num_steps: int, what: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The next `num_steps` batches, numbered, with a progress bar."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    for step in tqdm(range(num_steps), desc=what, unit="step", mininterval=interval):
        yield step, next(data)


def median_step(seconds: list[float]) -> float:
    """The median after the untimed steps; of all where there are no more."""
    return float(np.median(seconds[UNTIMED_STEPS:] or seconds))


def train_jax(
    config: ConfigDict, data: Any, schedule: optax.Schedule, num_steps: int
) -> tuple[steps.TrainState, nnx.GraphDef, list[float], float]:
    """Our own training step; returns the last state, its structure, losses, seconds per step."""
    adamw = precision.make_optimizer_for(
        config.opt_level, optimizer.make_optimizer(config.optimizer, schedule)
    )
    graphdef, state = steps.create_train_state(initial_model(config), adamw)
    train_step = jax.jit(
        steps.make_train_step(
            graphdef,
            adamw,
            losses.make_loss(config.loss),
            seed=config.seed,
            ragged=evaluate.is_ragged(config),
        ),
        donate_argnums=0,
    )
    curve, seconds = [], []
    for _, batch in batches(data, num_steps, f"seed {config.seed}, {config.opt_level}"):
        start = time.perf_counter()
        state, sums = train_step(state, evaluate.on_device(batch))
        curve.append(float(sums["loss"] / sums["clips"]))
        seconds.append(time.perf_counter() - start)
    return state, graphdef, curve, median_step(seconds)


def run_jax(
    config: ConfigDict,
    train_data: Any,
    test_data: Any,
    schedule: optax.Schedule,
    num_steps: int,
    contender: str,
) -> Run:
    """Trains and tests in JAX."""
    if contender != "jax":
        config = config.copy_and_resolve_references()
        config.opt_level = contender
    state, graphdef, curve, step_s = train_jax(config, train_data, schedule, num_steps)
    eval_step = jax.jit(
        steps.make_eval_step(
            graphdef, losses.make_loss(config.loss), ragged=evaluate.is_ragged(config)
        )
    )
    result = evaluate.evaluate_split(
        eval_step,
        state.params,
        state.fixed,
        test_data,
        num_classes=config.model.num_classes,
        progress=f"seed {config.seed}, {contender}, test",
    )
    right = result.probabilities.argmax(axis=-1) == result.label
    return Run(config.seed, contender, curve, result.ids, right.tolist(), step_s)


def oracle_logits(oracle: TorchRViT, batch: dict[str, np.ndarray], ragged: bool) -> torch.Tensor:
    """Logits [B, K] for a batch with `video` uint8 [B, T, H, W, 3]."""
    video = (for_torch(batch["video"]).float() / 255.0 - 0.5) / 0.5
    num_frames = torch.from_numpy(batch["num_frames"]) if ragged else None
    return oracle(video, oracle.initial_state(len(batch["label"])), num_frames)[0]


def train_torch(
    config: ConfigDict, data: Any, schedule: optax.Schedule, num_steps: int
) -> tuple[TorchRViT, list[float], float]:
    """The same recipe in PyTorch; returns the trained oracle, losses, seconds per step."""
    recipe, ragged = config.optimizer, evaluate.is_ragged(config)
    smoothing = config.loss.label_smoothing if config.loss.name != "cross_entropy" else 0.0
    oracle = initial_oracle(config).train()
    adamw = torch.optim.AdamW(
        oracle.parameters(), betas=tuple(recipe.betas), weight_decay=recipe.weight_decay
    )
    curve, seconds = [], []
    for step, batch in batches(data, num_steps, f"seed {config.seed}, torch"):
        adamw.param_groups[0]["lr"] = float(schedule(step))
        start = time.perf_counter()
        real = torch.from_numpy(batch["mask"])
        label = torch.from_numpy(batch["label"]).long()
        logits = oracle_logits(oracle, batch, ragged)
        loss = torch.nn.functional.cross_entropy(
            logits[real], label[real], label_smoothing=smoothing
        )
        adamw.zero_grad()
        loss.backward()
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(oracle.parameters(), recipe.clip_norm)
        adamw.step()
        curve.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return oracle, curve, median_step(seconds)


def run_torch(
    config: ConfigDict,
    train_data: Any,
    test_data: Any,
    schedule: optax.Schedule,
    num_steps: int,
    contender: str,
) -> Run:
    """Trains and tests in PyTorch."""
    oracle, curve, step_s = train_torch(config, train_data, schedule, num_steps)
    oracle.eval()
    ids, right = [], []
    what = f"seed {config.seed}, torch, test"
    for _, batch in batches(test_data, test_data.steps_per_epoch, what):
        with torch.no_grad():
            logits = oracle_logits(oracle, batch, evaluate.is_ragged(config)).numpy()
        mask = batch["mask"]
        ids.extend(batch["id"][mask].tolist())
        right.extend((logits.argmax(axis=-1) == batch["label"])[mask].tolist())
    return Run(config.seed, contender, curve, ids, right, step_s)


def compare(
    config: ConfigDict, contenders: Sequence[str], num_seeds: int, workdir: Path
) -> dict[str, Any]:
    """Makes the runs that `workdir` lacks and returns the summary of all.

    Raises:
        ValueError: the recipe has a part that is compared in no framework but ours, the test split
            has no labels, or `workdir` holds runs of another config.
    """
    check_comparable(config, contenders)
    claim_workdir(config, workdir)
    runs = []
    for seed in range(config.seed, config.seed + num_seeds):
        files = {name: workdir / f"seed_{seed}_{name}.json" for name in contenders}
        missing = [name for name in contenders if not files[name].exists()]
        if missing:
            make_runs(config, seed, {name: files[name] for name in missing})
        runs.append({name: Run(**json.loads(files[name].read_text())) for name in contenders})
    summary = summarise(runs)
    write_json(workdir / "summary.json", summary)
    return summary


def make_runs(config: ConfigDict, seed: int, files: dict[str, Path]) -> None:
    """One run per contender in `files`, written there; the frames decoded for one serve both."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    train_data = input_pipeline.get_dataset(config, "train")
    test_data = input_pipeline.get_dataset(config, "test")
    if not test_data.has_labels:
        raise ValueError("the test split has no labels: the comparison needs a labelled one")
    num_steps = config.num_epochs * train_data.steps_per_epoch
    schedule = optimizer.learning_rate_schedule(
        config.optimizer, train_data.steps_per_epoch, config.num_epochs
    )
    for name, file in files.items():
        train_data.rewind()
        test_data.rewind()
        runner = run_torch if name == "torch" else run_jax
        run = runner(config, train_data, test_data, schedule, num_steps, name)
        write_json(file, dataclasses.asdict(run))
    train_data.close()
    test_data.close()


def check_comparable(config: ConfigDict, contenders: Sequence[str]) -> None:
    """Raises ValueError where there is no such contender, or PyTorch's side has no such part."""
    for name in contenders:
        if name not in CONTENDERS:
            raise ValueError(f"--contenders: {name!r} is unknown{suggest(name, CONTENDERS)}")
    if len(set(contenders)) != len(contenders) or len(contenders) < 2:
        raise ValueError("--contenders: expected two or more different ones, as in jax,torch")
    if config.optimizer.name != "adamw":
        raise ValueError(
            f"config.optimizer.name={config.optimizer.name!r}: the comparison is of 'adamw'"
        )
    if config.loss.name not in ("smoothed_cross_entropy", "cross_entropy"):
        raise ValueError(
            f"config.loss.name={config.loss.name!r}: the comparison is of one label per clip"
        )
    defaults = base.get_config()
    for key in leaf_keys(defaults):
        left_out = key in LEFT_OUT or key.startswith("dataset.augment.")
        if left_out and lookup(config, key) != lookup(defaults, key):
            raise ValueError(
                f"config.{key}={lookup(config, key)!r}: the comparison leaves it out; set it to "
                f"{lookup(defaults, key)!r}"
            )


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
    """Notes the config, or raises ValueError where the runs in `workdir` had another."""
    wanted = json.loads(config.to_json_best_effort())
    for key in FREE_KEYS:
        del wanted["dataset"][key]
    file = workdir / "config.json"
    if not file.exists():
        write_json(file, wanted)
    elif json.loads(file.read_text()) != wanted:
        raise ValueError(f"{workdir} holds runs of another config: choose another --workdir")


def summarise(runs: list[dict[str, Run]]) -> dict[str, Any]:
    """Accuracies, differences to the last contender and their standard errors; fractions.

    The error over seeds says how far the mean difference would move with other initial weights
    and orders; the one over clips, how far with other test clips, each clip's answers averaged
    over the seeds first. Generated clips come in pairs of one drawing, so for them the latter is a
    lower bound.
    """
    *others, baseline = runs[0]
    ids = runs[0][baseline].ids
    if any(run.ids != ids for row in runs for run in row.values()):
        raise ValueError("the runs were tested on different clips: start in a new --workdir")
    return {
        "num_clips": len(ids),
        "baseline": baseline,
        "seeds": [
            {
                "seed": row[baseline].seed,
                "top1": {name: run.top1 for name, run in row.items()},
                "seconds_per_step": {name: run.seconds_per_step for name, run in row.items()},
            }
            for row in runs
        ],
        "differences": {name: _difference(runs, name, baseline) for name in others},
    }


def _difference(runs: list[dict[str, Run]], name: str, baseline: str) -> dict[str, Any]:
    """`name` minus `baseline`."""
    right = np.array([[row[name].right, row[baseline].right] for row in runs], float)
    difference = right[:, 0] - right[:, 1]  # [seeds, clips]
    per_seed, per_clip = difference.mean(axis=1), difference.mean(axis=0)
    return {
        "per_seed": per_seed.tolist(),
        "mean": float(per_seed.mean()),
        "standard_error_over_seeds": _standard_error(per_seed),
        "standard_error_over_clips": _standard_error(per_clip),
        "largest_relative_loss_difference": [
            _loss_difference(row[name], row[baseline]) for row in runs
        ],
    }


def _loss_difference(ours: Run, theirs: Run, num_steps: int = 10) -> float:
    """Over the first steps, before rounding has had time to grow."""
    ours, theirs = (np.array(run.losses[:num_steps]) for run in (ours, theirs))
    return float(np.max(np.abs(ours - theirs) / theirs))


def _standard_error(values: np.ndarray) -> float | None:
    """Of the mean; None for a single value."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def table(summary: dict[str, Any]) -> str:
    """The summary to read; percent and percentage points."""

    def points(value: float | None) -> str:
        return "unknown" if value is None else f"{100 * value:.2f}"

    names = [*summary["differences"], summary["baseline"]]
    lines = [
        f"top-1 on {summary['num_clips']} test clips, percent (seconds per step)",
        f"{'seed':>8}" + "".join(f"{name:>18}" for name in names),
    ]
    for row in summary["seeds"]:
        cells = (f"{100 * row['top1'][n]:.2f} ({row['seconds_per_step'][n]:.4f})" for n in names)
        lines.append(f"{row['seed']:>8}" + "".join(f"{cell:>18}" for cell in cells))
    for name, difference in summary["differences"].items():
        lines.append(
            f"{name} - {summary['baseline']}: mean {100 * difference['mean']:+.2f} points; "
            f"standard error over seeds {points(difference['standard_error_over_seeds'])}, "
            f"paired over clips {points(difference['standard_error_over_clips'])}"
        )
    return "\n".join(lines)


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(argv)
    flags.DEFINE_integer(
        "seeds",
        3,
        "Runs per contender, with config.seed and those that follow it.",
        1,
        flag_values=values,
    )
    flags.DEFINE_list(
        "contenders",
        ["jax", "torch"],
        f"Out of {', '.join(CONTENDERS)}; the last one is what the others are compared with.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir",
        "results/compare_training",
        "Where the results are kept.",
        flag_values=values,
    )
    return values


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """The flags' values; raises ArgumentError where one is unknown, missing or does not fit."""
    values = define_flags(argv)
    parse(values, argv, __doc__)
    require(values, config="configs/gestures.py")
    return values


def _work(argv: list[str]) -> None:
    values = parse_flags(argv)
    workdir = Path(values.workdir).expanduser()
    try:
        check_config(values.config, base.get_config())
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    check_writable(workdir)
    print(table(compare(values.config, values.contenders, values.seeds, workdir)))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_work, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
