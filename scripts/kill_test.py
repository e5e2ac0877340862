"""Kills training runs at random moments and compares what they end in with a run left alone.

    NPROC=1 python scripts/kill_test.py [--kills=20] [--terms=5] [--workers=0] [--seed=0]
                                        [--output=results/kill_test] [--debug]

Draws a small set of gestures, trains a small model on it, and then
(a) ends runs with SIGKILL at random moments, some while a checkpoint is being written, and starts
    each again with the same command, until it is done;
(b) the same with SIGTERM, where no step may be trained twice;
(c) damages every file of a finished run's latest checkpoint in turn, and goes on from it.
Final parameters, optimizer state and metrics.jsonl must be the same, bit for bit. The figures are
printed and written to OUTPUT/kill_test.json. Exit status 1 where anything differs.

Each start is a process of its own, forked from one that has imported the libraries.
"""

import argparse
import contextlib
import dataclasses
import json
import logging as python_logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# For the processes that a run starts in turn: they get this path, not what is already imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.command_line import Parser, check_output_folder, leave_at_once

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

from rvit_jax.command import Stopped, run, start

LIMIT_S = 900.0  # that one start may take
NUM_EPOCHS = 6


def arguments(folder: Path, workdir: Path, workers: int = 0, num_epochs: int = NUM_EPOCHS) -> list:
    """The command line of a small run that saves after every step."""
    config = {
        "dataset.data_dir": folder / "data",
        "dataset.generate.train": 92,  # the last batch of six is partial
        "dataset.generate.validation": 24,
        "dataset.generate.test": 8,
        "dataset.num_frames": 4,
        "dataset.num_workers": workers,
        "dataset.cache": workers == 0,
        "model.image_size": 16,
        "model.patch_size": 8,
        "model.hidden_size": 16,
        "model.mlp_dim": 24,
        "model.num_layers": 1,
        "model.dropout_rate": 0.1,
        "ema_decay": 0.9,
        "batch_size": 16,
        "num_epochs": num_epochs,
        "checkpoint_every_steps": 1,
        "test_after_training": False,
    }
    values = [f"--config.{key}={value}" for key, value in config.items()]
    return ["main", "--config=configs/gestures.py", f"--workdir={workdir}", *values]


def _run(argv: list[str], steps_file: Path, log: Path) -> None:
    """A start's process: the command itself, which also writes down each step that it trains."""
    os.setpgrp()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from rvit_jax import command, main, train

    make = train._Run.__init__

    def noting(self, *args, **kwargs):
        make(self, *args, **kwargs)
        step_of = self.train_step

        def noted(state, *rest):
            with steps_file.open("a") as file:
                file.write(f"{int(state.step) + 1}\n")
            return step_of(state, *rest)

        self.train_step = noted

    train._Run.__init__ = noting
    sys.argv = argv
    command.start(main.main)


@dataclasses.dataclass
class Lab:
    """Where runs are made, one workdir after the other under the same name.

    Attributes:
        folder: holds the data, the workdir `run`, and what became of earlier ones.
        workers: processes that read data.
    """

    folder: Path
    workers: int = 0
    num_epochs: int = NUM_EPOCHS

    def __post_init__(self):
        self.workdir = self.folder / "run"
        self.steps_file = self.folder / "steps.txt"
        self.log = self.folder / "log.txt"
        self._context = multiprocessing.get_context("forkserver")
        # Not JAX's backends, which must not be forked.
        self._context.set_forkserver_preload(
            ["rvit_jax.main", "rvit_jax.train", "clu.metric_writers"]
        )

    def start(self) -> multiprocessing.Process:
        """Starts the command."""
        argv = list(map(str, arguments(self.folder, self.workdir, self.workers, self.num_epochs)))
        process = self._context.Process(target=_run, args=(argv, self.steps_file, self.log))
        process.start()
        return process

    def finish(self, process: multiprocessing.Process) -> None:
        """Waits for a start that should succeed."""
        process.join(LIMIT_S)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"exit status {process.exitcode}: {self.log.read_text()[-2000:]}")

    def steps(self) -> list[int]:
        """The steps trained by the starts of this run, in order."""
        text = self.steps_file.read_text() if self.steps_file.exists() else ""
        return [int(line) for line in text.split()]

    def put_away(self, name: str) -> Path:
        """Gives the workdir another name, so that the next run begins anew under the old one."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        self.workdir.rename(target)
        self.steps_file.unlink(missing_ok=True)
        return target

    def saving(self) -> bool:
        """Whether a checkpoint is just being written."""
        root = self.workdir / "checkpoints"
        return root.is_dir() and any("orbax-checkpoint-tmp" in name for name in os.listdir(root))


def what_is_left(workdir: Path) -> tuple[dict[str, str], bytes]:
    """The checksums of all arrays of the latest step, read from the disk, and metrics.jsonl."""
    import orbax.checkpoint as ocp

    from rvit_jax import seal

    step = max((f for f in (workdir / "checkpoints").iterdir()), key=lambda f: int(f.name))
    sums = {"step": step.name}
    for item in ("params", "ema", "optimizer"):
        arrays = ocp.StandardCheckpointHandler().restore((step / item).absolute())
        sums |= {f"{item}/{name}": total for name, total in seal.seal_arrays(arrays).items()}
    return sums, (workdir / "metrics.jsonl").read_bytes()


def compare(workdir: Path, expected: tuple[dict[str, str], bytes]) -> list[str]:
    """What differs from the run left alone."""
    from rvit_jax import seal

    sums, records = what_is_left(workdir)
    return seal.differing(sums, expected[0]) + (["metrics.jsonl"] * (records != expected[1]))


def wait_for(process: multiprocessing.Process, ready: Callable[[], bool]) -> bool:
    """Until `ready`; False where the process ended before."""
    until = time.monotonic() + LIMIT_S
    while process.is_alive():
        if ready():
            return True
        if time.monotonic() > until:
            raise RuntimeError(f"nothing for {LIMIT_S:.0f} s")
        time.sleep(0.001)
    return False


def _at_random(lab: Lab, process, rng: random.Random, spread: float) -> str | None:
    """Waits for a random moment; its kind, or None where the process ended before."""
    kind = rng.choices(["start", "save", "any"], [1, 4, 5])[0]
    if kind == "start":
        time.sleep(rng.uniform(0.0, 4.0))
        return kind if process.is_alive() else None
    before = len(lab.steps())
    trained = before + rng.randint(1, 6)
    if not wait_for(process, lambda: len(lab.steps()) >= trained):
        return None
    if kind == "save":
        if not wait_for(process, lab.saving):
            return None
        time.sleep(rng.uniform(0.0, 0.05))
    else:
        time.sleep(rng.uniform(0.0, spread))
    return kind if process.is_alive() else None


def _send(process: multiprocessing.Process, signum: int) -> bool:
    """Sends a signal and waits for the end; False where the process had ended before."""
    try:
        os.kill(process.pid, signum)
    except ProcessLookupError:
        return False
    process.join(LIMIT_S)
    return True


def interrupt(
    lab: Lab,
    expected: tuple[dict[str, str], bytes],
    signum: int,
    count: int,
    rng: random.Random,
    *,
    per_run: int = 5,
    spread: float = 1.5,
) -> dict[str, Any]:
    """Interrupts runs `count` times in all, at most `per_run` times each, and lets each finish.

    Returns:
        What happened: interrupts by their kind, differences, steps trained more than once.
    """
    done: list[str] = []
    differing: list[list[str]] = []
    statuses: list[int | None] = []
    repeated = runs = 0
    while len(done) < count:
        in_this, finished = 0, False
        while not finished and in_this < per_run and len(done) < count:
            process = lab.start()
            kind = _at_random(lab, process, rng, spread)
            was_saving = lab.saving()
            if kind is None or not _send(process, signum):
                lab.finish(process)  # it was done before its moment came
                finished = True
                continue
            statuses.append(process.exitcode)
            done.append("during a save" if was_saving else kind)
            in_this += 1
            print(f"{len(done)}: {done[-1]}, after {len(lab.steps())} steps", flush=True)
        if not finished:
            lab.finish(lab.start())
        trained = lab.steps()
        repeated += len(trained) - len(set(trained))
        runs += 1
        differing.append(compare(lab.workdir, expected))
        lab.put_away(f"{signal.Signals(signum).name}_{runs}")
    return {
        "interrupts": len(done),
        "during_a_save": done.count("during a save"),
        "runs": runs,
        "runs_that_differ": sum(map(bool, differing)),
        "differences": [d for d in differing if d],
        "steps_trained_again": repeated,
        "exit_statuses": sorted({str(s) for s in statuses}),
    }


class _Warnings(python_logging.Handler):
    def __init__(self):
        super().__init__(python_logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: python_logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def warnings_of_absl() -> Iterator[list[str]]:
    """The warnings that are logged in the block."""
    handler = _Warnings()
    python_logging.getLogger("absl").addHandler(handler)
    try:
        yield handler.lines
    finally:
        python_logging.getLogger("absl").removeHandler(handler)


def damages(step: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every damage of part (c): its name, and what does it to a copy of the step's folder."""
    for file in sorted(f.relative_to(step) for f in step.rglob("*") if f.is_file()):
        size = (step / file).stat().st_size
        bit = rng.randrange(size * 8) if size else 0

        def cut(folder: Path, file=file, size=size):
            os.truncate(folder / file, size // 2)

        def empty(folder: Path, file=file):
            os.truncate(folder / file, 0)

        def delete(folder: Path, file=file):
            (folder / file).unlink()

        def flip(folder: Path, file=file, bit=bit):
            content = bytearray((folder / file).read_bytes())
            content[bit // 8] ^= 1 << bit % 8
            (folder / file).write_bytes(content)

        yield f"{file} cut in half", cut
        yield f"{file} emptied", empty
        yield f"{file} deleted", delete
        yield f"{file} with bit {bit} flipped", flip
    for item in sorted(f.name for f in step.iterdir() if f.is_dir()):
        yield f"{item}/ missing", lambda folder, item=item: shutil.rmtree(folder / item)
    yield "a copy under a later number", lambda f: shutil.copytree(f, f.with_name("9999"))
    yield "the step renamed", lambda f: f.rename(f.with_name("9999"))
    yield "an empty later step", lambda f: f.with_name("9999").mkdir()


def damage_each(workdir: Path, scratch: Path, rng: random.Random) -> dict[str, Any]:
    """Part (c) on a finished run: goes on from a copy with one damage, for each in turn.

    Returns:
        How often the step was restored as saved and how often the one before it with a warning;
        `wrong` names whatever else came.
    """
    import jax
    import numpy as np
    from flax import nnx
    from ml_collections import ConfigDict

    from rvit_jax import checkpoint, optimizer, precision, seal, steps

    description = json.loads((workdir / "model.json").read_text())
    config = checkpoint.with_defaults(ConfigDict(description["config"]))
    chain = optimizer.make_optimizer(config.optimizer, lambda step: 0.0)
    _, state = steps.create_train_state(
        precision.make_model(config, rngs=nnx.Rngs(1)), chain, ema=config.ema_decay > 0
    )
    start = jax.tree.map(np.asarray, state)

    def go_on(folder: Path) -> tuple[int, dict[str, str], Any, list[str]]:
        state = jax.tree.map(jax.numpy.asarray, start)
        with (
            warnings_of_absl() as lines,
            checkpoint.Checkpoints(folder, description, keep=3) as checkpoints,
        ):
            state, position = checkpoints.restore_latest(state)
            later = state.replace(step=state.step + 1)
            checkpoints.save(later, position, None)  # a bad later step must not stand in its way
        return int(state.step), seal.seal_arrays(state), position, list(lines)

    def copy() -> Path:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(workdir, scratch)
        return scratch

    good: dict[int, Any] = {}
    latest, before = sorted(int(f.name) for f in (workdir / "checkpoints").iterdir())[:-3:-1]
    good[latest] = go_on(copy())[1:3]
    shutil.rmtree(copy() / "checkpoints" / str(latest))
    good[before] = go_on(scratch)[1:3]
    counts = {"cases": 0, "restored_exactly": 0, "the_previous_with_a_warning": 0}
    wrong = []
    for name, do in damages(workdir / "checkpoints" / str(latest), rng):
        do(copy() / "checkpoints" / str(latest))
        counts["cases"] += 1
        try:
            step, sums, position, lines = go_on(scratch)
        except Exception as error:  # every kind is a finding
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        told = any("damaged checkpoint" in line for line in lines)
        aside = list((scratch / "damaged").glob("*"))
        if (sums, position) != good.get(step):
            wrong.append(f"{name}: other numbers at step {step}")
        elif step == latest and told == bool(aside):
            counts["restored_exactly"] += 1
        elif step == before and told and aside:
            counts["the_previous_with_a_warning"] += 1
        else:
            wrong.append(f"{name}: step {step}, warned: {told}")
    shutil.rmtree(scratch, ignore_errors=True)
    return {**counts, "wrong": wrong}


def _test(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of part (a)")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs of part (b)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the bits")
    parser.add_argument(
        "--output", type=Path, default=Path("results/kill_test"), help="where all of it is written"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv[1:])
    check_output_folder(args.output, "--output")
    os.environ.setdefault("NPROC", "1")  # XLA's sums depend on the number of threads
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = args.output.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    try:
        return _run_parts(args, folder)
    except (KeyboardInterrupt, Stopped) as stop:
        stop.add_note(f"the runs so far are in {folder}")
        raise
    finally:  # a run leads a group of its own: Ctrl-C does not reach it
        for process in multiprocessing.active_children():
            process.kill()
            process.join()


def _run_parts(args: argparse.Namespace, folder: Path) -> int:
    """Runs the parts, prints and writes the report; returns the exit status."""
    lab, rng = Lab(folder, args.workers), random.Random(args.seed)
    shutil.rmtree(lab.workdir, ignore_errors=True)
    lab.finish(lab.start())
    left_alone = lab.put_away("left_alone")
    expected = what_is_left(left_alone)
    report = {
        "a_sigkill": interrupt(lab, expected, signal.SIGKILL, args.kills, rng),
        "b_sigterm": interrupt(lab, expected, signal.SIGTERM, args.terms, rng, per_run=3),
        "c_damage": damage_each(left_alone, folder / "damaged_copy", rng),
    }
    (folder / "kill_test.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    passed = (
        not report["a_sigkill"]["runs_that_differ"]
        and not report["b_sigterm"]["runs_that_differ"]
        and not report["b_sigterm"]["steps_trained_again"]
        and not report["c_damage"]["wrong"]
    )
    return 0 if passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the test and returns the exit status."""
    return run(_test, ["kill_test", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    start(main)
