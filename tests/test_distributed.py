"""Several processes, on this machine, train as one, stop as one and notice when one is gone.

`pytest -m slow tests/test_distributed.py` compares all ways to spread eight devices.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rvit_jax import distributed
from tests import many_processes

CONFIG = """
from tests.many_processes import get_config as make

def get_config(variant=None):
    config = make({data_dir!r})
    config.checkpoint_every_steps = 4
    return config
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    from input_pipeline import gestures

    folder = tmp_path_factory.mktemp("gestures") / "set"
    gestures.generate(folder, classes=many_processes.CLASSES, **many_processes.NUM_CLIPS, seed=0)
    return os.fspath(folder)


@pytest.fixture(scope="module")
def config_file(data_dir, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(CONFIG.format(data_dir=data_dir))
    return os.fspath(file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """A command, started several times as the processes of one run."""

    def __init__(self, arguments: Sequence[str], number: int, devices: int, *, address: str = ""):
        address = address or f"localhost:{free_port()}"
        self.started = []
        for index in range(number):
            flags = (
                []
                if number == 1
                else [
                    f"--coordinator_address={address}",
                    f"--num_processes={number}",
                    f"--process_id={index}",
                ]
            )
            self.started.append(start([*arguments, *flags], devices))

    def end(self, timeout: float = 500.0) -> list[tuple[int, str, str]]:
        """The exit status, output and errors of each."""
        deadline = time.monotonic() + timeout
        ended = []
        try:
            for process in self.started:
                output, errors = process.communicate(timeout=deadline - time.monotonic())
                ended.append((process.returncode, output, errors))
        finally:
            for process in self.started:
                process.kill()
        return ended


def start(arguments: Sequence[str], devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.getcwd(),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def noted(data_dir: str, folder: Path, number: int, devices: int, *options: str) -> dict:
    """What `tests.many_processes` notes with `number` processes of so many devices each."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{number}x{devices}{'_'.join(options)}.npz"
    if not file.exists():
        command = ["tests.many_processes", data_dir, os.fspath(file), *options]
        for status, _, errors in Processes(command, number, devices).end():
            assert status == 0, errors[-2000:]
    with np.load(file) as loaded:
        return {key: loaded[key] for key in loaded.files}


def largest_difference(ours: dict, theirs: dict, prefix: str) -> float:
    """Of each tensor against its own largest value, the largest over all."""
    keys = [key for key in theirs if key.startswith(prefix)]
    assert keys
    return max(
        float(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max()) for key in keys
    )


def assert_same_training(ours: dict, theirs: dict) -> None:
    np.testing.assert_array_equal(ours["id"], theirs["id"])
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    assert largest_difference(ours, theirs, "gradient/") < 1e-5
    assert largest_difference(ours, theirs, "params/") < 1e-5


def test_two_processes_train_as_one(data_dir, tmp_path):
    """The same clips, changed in the same way, give the same losses, gradients and parameters."""
    one = noted(data_dir, tmp_path, 1, 1, "--steps=3")
    two = noted(data_dir, tmp_path, 2, 2, "--steps=3", "--fsdp=2")
    assert_same_training(two, one)
    assert len(set(one["id"].ravel())) == 48


@pytest.mark.slow
class TestAllTopologies:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        return tmp_path_factory.mktemp("noted")

    @pytest.mark.parametrize(("number", "devices"), [(1, 8), (2, 4), (4, 2)])
    @pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
    def test_sgd(self, data_dir, folder, number, devices, fsdp):
        one = noted(data_dir, folder, 1, 1)
        many = noted(data_dir, folder, number, devices, f"--fsdp={fsdp}")
        print(
            f"{number} x {devices}, fsdp {fsdp}: losses",
            f"{np.abs(many['loss'] / one['loss'] - 1).max():.1e}, first gradient",
            f"{largest_difference(many, one, 'gradient/'):.1e}, parameters after 20 steps",
            f"{largest_difference(many, one, 'params/'):.1e}",
        )
        assert_same_training(many, one)

    @pytest.mark.parametrize(("number", "devices"), [(1, 8), (2, 4)])
    def test_adamw(self, data_dir, folder, number, devices):
        """Adam divides by the gradient's size: rounding in a gradient near zero is a whole step."""
        options = ("--optimizer=adamw", "--learning_rate=1e-4")
        one = noted(data_dir, folder, 1, 1, *options)
        many = noted(data_dir, folder, number, devices, *options)
        print(
            f"AdamW, {number} x {devices}: losses",
            f"{np.abs(many['loss'] / one['loss'] - 1).max():.1e}, parameters",
            f"{largest_difference(many, one, 'params/'):.1e}",
        )
        np.testing.assert_array_equal(many["id"], one["id"])
        np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-4)


# ---- the command ----


def command(config_file: str, workdir: Path, *more: str) -> list[str]:
    return [
        "rvit_jax.main",
        f"--config={config_file}",
        f"--workdir={workdir}",
        "--start_timeout=240",
        *more,
    ]


def records(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "checkpoint": None} for line in lines]


def steps_of(workdir: Path) -> set[int]:
    return {int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdecimal()}


def checksums(workdir: Path, step: int) -> dict:
    """Of everything that a checkpoint holds."""
    meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "model.json").read_text())
    return meta["seal"]


def wait_for(workdir: Path, step: int, processes: Processes, timeout: float = 400.0) -> None:
    """Returns when the checkpoint of a step is there."""
    deadline = time.monotonic() + timeout
    while step not in steps_of(workdir):
        running = [process.poll() for process in processes.started]
        if any(status is not None for status in running) or time.monotonic() > deadline:
            raise AssertionError(f"no step {step}: {processes.end()}")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> Path:
    """The workdir of a run of two processes that nobody stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    ended = Processes(command(config_file, workdir), 2, 1).end()
    assert [status for status, *_ in ended] == [0, 0], ended
    first, second = ended
    assert "2 x cpu in 2 processes" in first[1]
    assert "epoch 2/2, step 20" in first[1] + first[2]
    assert "epoch" not in second[1] + second[2]  # one speaks
    return workdir


@pytest.mark.slow
def test_one_process_goes_on_and_evaluates_alike(whole, config_file, tmp_path):
    """Checkpoints and positions belong to no number of processes or devices."""
    kept = records(whole)
    assert [record["step"] for record in kept] == [10, 20]
    for number, devices in ((1, 1), (2, 2)):
        workdir = tmp_path / f"{number}"
        evaluate = command(
            config_file, workdir, "--mode=evaluate", f"--checkpoint={whole}/checkpoints/20"
        )
        ended = Processes(evaluate, number, devices).end()
        assert [status for status, *_ in ended] == [0] * number, ended
        record = json.loads(ended[0][1].splitlines()[-1])
        assert record["loss"] == pytest.approx(kept[-1]["loss"], rel=1e-5)
        assert {k: record[k] for k in ("num_clips", "top1", "step")} == {
            k: kept[-1][k] for k in ("num_clips", "top1", "step")
        }
    tables = [
        [line.split(";") for line in (tmp_path / n / "evaluation" / f).read_text().splitlines()]
        for n in ("1", "2")
        for f in ("validation_predictions.csv",)
    ]
    assert len(tables[0]) == 21
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
    worst = [(tmp_path / n / "evaluation" / "report.html").stat().st_size for n in ("1", "2")]
    assert worst[0] == pytest.approx(worst[1], rel=0.01)  # all the films are there


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_at_one_step(signum, whole, config_file, tmp_path):
    """And the same command goes on to the same bits."""
    processes = Processes(command(config_file, tmp_path), 2, 1)
    wait_for(tmp_path, 4, processes)
    processes.started[1].send_signal(signum)
    ended = processes.end()
    assert [status for status, *_ in ended] == [143, 128 + signum], ended
    assert all("the state is saved" in errors for *_, errors in ended), ended
    last = max(steps_of(tmp_path))
    assert 4 <= last < 20
    ended = Processes(command(config_file, tmp_path), 2, 1).end()
    assert [status for status, *_ in ended] == [0, 0], ended
    assert f"at step {last} of 20" in ended[0][1]
    assert records(tmp_path) == records(whole)
    assert checksums(tmp_path, 20) == checksums(whole, 20)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others(killed, whole, config_file, tmp_path):
    processes = Processes(command(config_file, tmp_path), 2, 1)
    wait_for(tmp_path, 4, processes)
    processes.started[killed].kill()
    began = time.monotonic()
    other = 1 - killed
    _, errors = processes.started[other].communicate(timeout=150)
    print(f"process {other} ended {time.monotonic() - began:.1f} s after process {killed}")
    assert processes.started[other].returncode not in (0, None)
    assert errors.strip()
    ended = Processes(command(config_file, tmp_path), 2, 1).end()
    assert [status for status, *_ in ended] == [0, 0], ended
    assert records(tmp_path) == records(whole)
    assert checksums(tmp_path, 20) == checksums(whole, 20)


class TestStart:
    """What is wrong before the processes are together is one line."""

    def test_a_port_that_is_in_use(self, config_file, tmp_path):
        with socket.socket() as taken:
            taken.bind(("localhost", 0))
            taken.listen()
            address = f"localhost:{taken.getsockname()[1]}"
            process = start(
                [
                    *command(config_file, tmp_path),
                    f"--coordinator_address={address}",
                    "--num_processes=2",
                    "--process_id=0",
                ]
            )
            _, errors = process.communicate(timeout=200)
        assert process.returncode == 1
        (line,) = errors.splitlines()
        assert line.startswith(f"error: --coordinator_address={address}: process 0 cannot listen")

    @pytest.mark.slow
    @pytest.mark.parametrize("index", [0, 1])
    def test_a_process_that_does_not_come(self, index, config_file, tmp_path):
        process = start(
            [
                *command(config_file, tmp_path, "--start_timeout=5"),
                f"--coordinator_address=localhost:{free_port()}",
                "--num_processes=2",
                f"--process_id={index}",
            ]
        )
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 1
        assert (
            f"error: process {index}: not the 2 processes came together" in errors.splitlines()[-1]
        )
        assert "within 5 s" in errors


class TestRendezvous:
    def find(self, environ=None, **given):
        names = ("coordinator_address", "num_processes", "process_id", "detect")
        given = {name: given.get(name) for name in names}
        return distributed.find_rendezvous(**given, environ=environ or {})

    def test_one_process_is_the_default(self):
        assert self.find() is None
        assert self.find(coordinator_address="h:1", num_processes=1, process_id=0) is None

    def test_flags_and_the_environment(self):
        found = self.find(coordinator_address="h:1", num_processes=2, process_id=1)
        assert found == distributed.Rendezvous("h:1", 2, 1)
        environ = {
            "JAX_COORDINATOR_ADDRESS": "[::1]:9",
            "JAX_NUM_PROCESSES": "3",
            "JAX_PROCESS_ID": "2",
            "JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:9",
        }
        assert self.find(environ) == distributed.Rendezvous("[::1]:9", 3, 2, "0.0.0.0:9")
        assert self.find(environ, process_id=0).process_id == 0  # a flag wins
        assert self.find(environ, detect=False) is None

    def test_tasks_of_a_launcher_are_one_run(self):
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
            assert self.find({name: "2"}) == distributed.Rendezvous()
            assert self.find({name: "2"}, detect=False) is None
            assert self.find({name: "1"}) is None
        given = self.find({"SLURM_STEP_NUM_TASKS": "2"}, coordinator_address="h:1")
        assert given == distributed.Rendezvous("h:1")  # the rest is SLURM's
        assert self.find({"SLURM_NTASKS": "8"}) is None  # a batch script, which runs once
        assert self.find(detect=True) == distributed.Rendezvous()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"detect": False, "process_id": 0}, "--nodistributed contradicts"),
            ({"num_processes": 2, "process_id": 0}, "--coordinator_address is missing"),
            ({"coordinator_address": "h:1"}, "--num_processes is missing"),
            (
                {"coordinator_address": "h", "num_processes": 2, "process_id": 0},
                "--coordinator_address=h: expected HOST:PORT",
            ),
            (
                {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
                "--process_id=2 of --num_processes=2: they are counted from 0 to 1",
            ),
        ],
    )
    def test_what_cannot_be(self, given, message):
        with pytest.raises(ValueError, match=message):
            self.find(**given)

    def test_a_number_that_is_none(self):
        with pytest.raises(ValueError, match="num_processes is 'two': expected a whole number"):
            self.find(
                {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, coordinator_address="h:1"
            )

    def test_an_address_of_another_machine(self):
        with pytest.raises(OSError, match="an address of the machine that process 0 runs on"):
            distributed._check_port("192.0.2.1:12321", "")  # reserved for documentation
        with pytest.raises(OSError, match=r"the host nowhere\.invalid is unknown here"):
            distributed._check_port("nowhere.invalid:12321", "")


def test_alone_everything_is_gathered_as_it_is():
    rows = {"id": np.array(["a", "bcd"]), "mask": np.array([True, False])}
    gathered = distributed.gather_rows(rows)
    for key, values in rows.items():
        np.testing.assert_array_equal(gathered[key], values)
    assert distributed.from_first({"a": 0.1}) == {"a": 0.1}
    assert distributed.agree(None) is None
    assert distributed.agree("broken") == "broken"
    assert distributed.part_of_batches() == {}
