"""What goes wrong around a run: damaged files, full disks, second runs, changed data, workers."""

import errno
import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import rvit_jax
from input_pipeline import files, get_dataset, loader, watch
from rvit_jax import checkpoint, optimizer, seal, steps, stopping
from rvit_jax.records import Records
from scripts.kill_test import warnings_of_absl
from tests.faulty import EndsItsProcess, flip, largest
from tests.jester_folder import CLASSES, labelled, make_set
from tests.small import saved_model, small_config, small_model

METRICS = {"top1": 0.5, "loss": 1.25}
# What is said depends on where it fell: in the numbers, or in what says where they lie.
BIT_FLIPPED = "checksum differs|cannot be read"


@functools.cache
def _state(ema: bool) -> steps.TrainState:
    config = small_config()
    chain = optimizer.make_optimizer(config.optimizer, lambda step: 0.1)
    model = rvit_jax.RViT(config.model, rngs=nnx.Rngs(0))
    return steps.create_train_state(model, chain, ema=ema)[1]


def make_state(ema: bool = False) -> steps.TrainState:
    """A state of step 0; its containers are the caller's own."""
    return jax.tree.map(lambda leaf: leaf, _state(ema))


def at_step(state: steps.TrainState, step: int) -> steps.TrainState:
    """A state with other numbers for each step, infinite and tiny ones among them."""

    def scramble(leaf):
        random = np.random.default_rng([step, leaf.size])
        return jnp.asarray(random.normal(size=leaf.shape) * 1e-3, leaf.dtype)

    state = jax.tree.map(scramble, state)
    return state.replace(step=jnp.int32(step), halted=jnp.zeros((), bool))


def description() -> dict:
    return checkpoint.describe_model(small_config(), [f"class {k}" for k in range(5)])


def open_run(workdir: Path, **options) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(workdir, description(), keep=3, **options)


def position(step: int) -> dict:
    return {"position": step, "split": "train"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with the checkpoints of steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    with open_run(workdir) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(at_step(make_state(), step), position(step), METRICS)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def go_on(workdir: Path) -> tuple[int, list[str]]:
    """The step that a run goes on from, which must be as it was saved, and the warnings."""
    with warnings_of_absl() as lines, open_run(workdir) as checkpoints:
        state, data = checkpoints.restore_latest(make_state())
    step = int(state.step)
    assert seal.seal_arrays(state) == seal.seal_arrays(at_step(make_state(), step))
    assert data == position(step)
    return step, [line for line in lines if line.startswith(("damaged checkpoint", str(workdir)))]


def exchange(step: Path, item: str) -> None:
    """Puts in what the step before has: whole and readable, and not what was saved."""
    shutil.rmtree(step / item)
    shutil.copytree(step.with_name(str(int(step.name) - 1)) / item, step / item)


class TestSeal:
    @given(
        arrays.arrays(
            st.sampled_from([np.float32, np.float16, np.int32, np.bool_, np.uint8]),
            arrays.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=5),
        ),
        st.data(),
    )
    def test_every_bit_counts(self, array, data):
        tree = {"a": [array, np.zeros(3)], "b": np.ones((2, 2), np.float32)}
        before = seal.seal_arrays(tree)
        raw = bytearray(array.tobytes())
        bit = data.draw(st.integers(0, len(raw) * 8 - 1))
        raw[bit // 8] ^= 1 << bit % 8
        tree["a"][0] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
        assert seal.differing(before, seal.seal_arrays(tree)) == ["a/[0]"]

    def test_type_and_shape_count(self):
        zeros = np.zeros(4, np.float32)
        sums = {
            seal.seal_arrays([x])["[0]"]
            for x in (zeros, zeros.reshape(2, 2), zeros.astype(np.int32), zeros.astype(np.float64))
        }
        assert len(sums) == 4
        assert seal.kinds_of_seal(seal.seal_arrays([zeros])) == seal.kinds([zeros])

    def test_a_known_sum(self):
        # printf '\x01\x00\x00\x00' | sha256sum
        known = "67abdd721024f0ff4e0b3f4c2fc13bc5bad42d0b7851d456d88d203d15aaa450"
        assert seal.seal_arrays({"x": jnp.int32(1)}) == {"x": f"int32[] {known}"}

    def test_json_may_be_laid_out_anew_but_not_changed(self):
        content = seal.with_own_seal({"b": [1, 2.5, float("nan")], "a": {"x": None}})
        again = json.loads(json.dumps(content, indent=7))
        assert seal.is_intact(again)
        assert seal.is_intact({"no": "checksum"})
        again["b"][1] = 2.25
        assert not seal.is_intact(again)


class TestDamage:
    def test_nothing_wrong_nothing_said(self, workdir):
        assert go_on(workdir) == (3, [])
        assert not (workdir / "damaged").exists()

    @pytest.mark.parametrize(
        ("damage", "cause"),
        [
            (lambda f: exchange(f, "params"), "3/params: .* its checksum differs"),
            (lambda f: exchange(f, "optimizer"), "3/optimizer: .* its checksum differs"),
            (lambda f: exchange(f, "data"), "data/metadata is not what was saved"),
            (lambda f: flip(largest(f / "params")), BIT_FLIPPED),
            (lambda f: flip(largest(f / "optimizer")), BIT_FLIPPED),
            (lambda f: flip(f / "meta" / "model.json"), "meta/model.json"),
            (lambda f: flip(f / "data" / "metadata"), "data/metadata"),
            (lambda f: os.truncate(f / "meta" / "model.json", 100), "cannot be read"),
            (lambda f: shutil.rmtree(f / "params"), "params cannot be read"),
            (lambda f: shutil.rmtree(f / "data"), "data/metadata cannot be read"),
            (lambda f: shutil.rmtree(f / "meta"), "has no model.json"),
            (lambda f: [shutil.rmtree(f), f.mkdir()], "3 has no model.json"),
            (lambda f: f.with_name("99").mkdir(), "99 has no model.json"),
            (lambda f: f.rename(f.with_name("99")), "99 is the checkpoint of step 3 under another"),
        ],
    )
    def test_a_damaged_step_is_put_aside_and_the_one_before_it_used(self, workdir, damage, cause):
        damage(workdir / "checkpoints" / "3")
        left = [f for f in (workdir / "checkpoints" / "3").rglob("*") if f.is_file()]
        step, lines = go_on(workdir)
        aside = [f.name for f in (workdir / "damaged").iterdir()]
        assert len(lines) == 1
        assert re.search(cause, lines[0])
        assert "tensorstore_spec" not in lines[0]
        assert str(workdir / "damaged" / aside[0]) in lines[0]
        if aside == ["3"]:  # nothing of it is lost
            assert step == 2
            assert sum(f.is_file() for f in (workdir / "damaged").rglob("*")) == len(left)
        else:
            assert aside == ["99"]
            assert step == (3 if (workdir / "checkpoints" / "3").exists() else 2)

    def test_the_run_saves_on_after_falling_back(self, workdir):
        for time_ in (1, 2):
            flip(largest(workdir / "checkpoints" / "3" / "params"))
            with open_run(workdir) as checkpoints:
                state, _ = checkpoints.restore_latest(make_state())
                assert int(state.step) == 2
                checkpoints.save(at_step(make_state(), 3), position(3), METRICS)
            assert len(list((workdir / "damaged").iterdir())) == time_
        assert go_on(workdir) == (3, [])

    def test_what_is_saved_is_what_was_handed_over(self, tmp_path, monkeypatch):
        """Training adds to its sums while the position that holds them is being written."""
        handed_on, write = threading.Event(), ocp.JsonCheckpointHandler._save_fn

        async def write_late(self, content, directory):
            assert handed_on.wait(60)
            return await write(self, content, directory)

        monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", write_late)
        metrics, sums = dict(METRICS), {"loss": 2.5}
        with open_run(tmp_path) as checkpoints:
            handed = {**position(4), "sums": sums}
            checkpoints.save(at_step(make_state(), 4), handed, metrics)
            handed["position"], sums["loss"], metrics["top1"] = 5, 3.5, 0.0
            handed_on.set()
            checkpoints.wait()
            _, data = checkpoints.restore_latest(make_state())
        assert data == {**position(4), "sums": {"loss": 2.5}}
        written = json.loads((tmp_path / "checkpoints/4/meta/model.json").read_text())
        assert written["metrics"] == METRICS

    def test_all_damaged_stops_the_run_again_and_again(self, workdir):
        for folder in (workdir / "checkpoints").iterdir():
            os.truncate(folder / "meta" / "model.json", 0)
        for _ in range(2):
            with (
                pytest.raises(ValueError, match=r"holds no whole checkpoint: .*/3/meta.*/1/meta"),
                open_run(workdir) as checkpoints,
            ):
                checkpoints.restore_latest(make_state())
            assert len(list((workdir / "checkpoints").iterdir())) == 3

    def test_another_program_is_no_damage(self, workdir):
        def other(leaf):
            return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf

        with (
            pytest.raises(ValueError, match=r"params was made by another version.*is float32\["),
            open_run(workdir) as checkpoints,
        ):
            checkpoints.restore_latest(jax.tree.map(other, make_state()))
        assert not (workdir / "damaged").exists()

    def test_a_checkpoint_of_an_earlier_version_is_used_with_a_warning(self, workdir):
        file = workdir / "checkpoints" / "3" / "meta" / "model.json"
        meta = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in meta.items() if k not in ("seal", "sha256")}))
        step, lines = go_on(workdir)
        assert step == 3
        assert "has no checksums" in lines[0]

    def test_processes_agree_on_the_step(self, workdir):
        """What another process finds wrong counts here too."""
        answers = iter([None, None, None, None, "the other one cannot read it", None, None])
        asked = []

        def agree(problem):
            asked.append(problem)
            return next(answers)

        with open_run(workdir, agree=agree) as checkpoints:
            state, _ = checkpoints.restore_latest(make_state())
        assert int(state.step) == 2
        assert asked == [None] * 7  # the lock, three descriptions, two steps, the move
        assert (workdir / "damaged" / "3").is_dir()

    def test_the_average_is_sealed_too(self, tmp_path):
        with open_run(tmp_path) as checkpoints:
            for step in (1, 2):
                checkpoints.save(at_step(make_state(ema=True), step), position(step), METRICS)
        flip(largest(tmp_path / "checkpoints" / "2" / "ema"))
        with pytest.raises(seal.DamagedError, match="2/ema"):
            rvit_jax.load(tmp_path / "checkpoints" / "2" / "ema")
        with open_run(tmp_path) as checkpoints:
            state, _ = checkpoints.restore_latest(make_state(ema=True))
        assert seal.seal_arrays(state) == seal.seal_arrays(at_step(make_state(ema=True), 1))


class TestLoading:
    def test_what_is_whole_loads(self, saved):
        assert rvit_jax.load(saved).step == 3

    @pytest.mark.parametrize(
        "damage",
        [
            lambda f: exchange(f, "params"),
            lambda f: flip(largest(f / "params")),
            lambda f: flip(f / "meta" / "model.json"),
            lambda f: os.truncate(largest(f / "params"), 10),
        ],
    )
    def test_a_damaged_model_is_refused_in_one_line(self, workdir, damage):
        folder = workdir / "checkpoints" / "3"
        damage(folder)
        with pytest.raises(seal.DamagedError, match=str(folder)) as error:
            rvit_jax.load(folder)
        assert "\n" not in str(error.value)
        with pytest.raises(seal.DamagedError):  # it is the best: no other is taken in silence
            rvit_jax.load(workdir)

    def test_a_converted_model_is_sealed_too(self, tmp_path):
        folder = saved_model(tmp_path / "model")
        about = json.loads((folder / "model.json").read_text())
        variables = nnx.to_pure_dict(nnx.state(small_model()))
        files.write_json(folder / "model.json", checkpoint.sealed(about, {"params": variables}))
        rvit_jax.load(folder)
        flip(largest(folder / "params"))
        with pytest.raises(seal.DamagedError, match="params"):
            rvit_jax.load(folder)


class TestOneRunAtATime:
    def test_a_second_run_is_refused(self, workdir):
        with open_run(workdir), pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on"):
            open_run(workdir)
        with open_run(workdir):  # the refused one left nothing behind
            assert rvit_jax.load(workdir).step == 3  # readers may
        with pytest.raises(BlockingIOError, match="is trained in"), open_run(workdir):
            checkpoint.check_free(workdir)
        checkpoint.check_free(workdir)
        checkpoint.check_free(workdir / "new")
        assert not (workdir / "new").exists()

    def test_a_killed_holder_lets_go_and_its_children_do_not_hold(self, tmp_path):
        code = (
            "import subprocess, sys, time\nfrom pathlib import Path\n"
            "from input_pipeline import files\n"
            f"with files.exclusively(Path({str(tmp_path)!r}), 'is in use'):\n"
            "    child = subprocess.Popen(['sleep', '60'])\n"
            "    print(child.pid, flush=True)\n    time.sleep(60)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
            child = int(holder.stdout.readline())
            try:
                with (
                    pytest.raises(BlockingIOError, match=f"is in use by process {holder.pid} on"),
                    files.exclusively(tmp_path, "is in use"),
                ):
                    pass
                holder.kill()
                holder.wait()
                with files.exclusively(tmp_path, "is in use"):
                    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
            finally:
                os.kill(child, signal.SIGKILL)


class _SmallFiles:
    """No file may grow past so many bytes: what a full disk is to a writer."""

    def __init__(self, limit: int):
        self._limit = limit

    def __enter__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit, self._before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


class TestFullDisk:
    def test_a_save(self, workdir):
        def save_into_a_full_disk():
            with open_run(workdir) as checkpoints:
                checkpoints.restore_latest(make_state())
                with _SmallFiles(4096):
                    checkpoints.save(at_step(make_state(), 4), position(4), METRICS)
                    checkpoints.wait()

        with (
            warnings_of_absl() as lines,
            pytest.raises(OSError, match=r"a checkpoint cannot be saved: .*step 3 is whole"),
        ):
            save_into_a_full_disk()
        assert not any("raised an exception" in line for line in lines)  # one line says it
        assert go_on(workdir) == (3, [])
        assert sorted((workdir / "checkpoints").glob("[0-9]")) == [
            workdir / "checkpoints" / step for step in "123"
        ]

    def test_a_description(self, workdir):
        files.write_json(workdir / "model.json", {"short": 1})
        before = (workdir / "model.json").read_text()
        with _SmallFiles(100), pytest.raises(OSError, match=r"model\.json cannot be written"):
            files.write_json(workdir / "model.json", {"long": "x" * 9999})
        assert (workdir / "model.json").read_text() == before
        assert {f.name for f in workdir.iterdir()} == {"model.json", "checkpoints", ".lock"}

    def test_a_folder(self, tmp_path):
        def write():
            with files.folder_written_aside(tmp_path / "new" / "folder") as aside:
                (aside / "weights").write_bytes(bytes(9999))

        with _SmallFiles(100), pytest.raises(OSError, match=r"new/folder cannot be written: File"):
            write()
        assert not list(tmp_path.iterdir())

    def test_the_records(self, tmp_path):
        records = Records(tmp_path)
        records.write({"step": 3, "loss": 1.0}, {"loss": 2.0})
        whole = (tmp_path / "metrics.jsonl").read_text()
        with (
            _SmallFiles(len(whole) + 10),
            pytest.raises(OSError, match=r"metrics\.jsonl cannot be written"),
        ):
            records.write({"step": 6, "loss": 1.0}, {"loss": 2.0})
        assert (tmp_path / "metrics.jsonl").stat().st_size == len(whole) + 10  # half a line
        assert records.cut_back(3) == {"step": 3, "loss": 1.0, "training": {"loss": 2.0}}
        assert (tmp_path / "metrics.jsonl").read_text() == whole
        records.close()

    def test_the_message_says_what_helps(self):
        error = files.cannot_be_written(Path("x"), OSError(errno.ENOSPC, "No space left on device"))
        assert str(error).endswith("x cannot be written: No space left on device: make room there")


class TestFolderWrittenAside:
    def test_one_that_another_process_filled_meanwhile(self, tmp_path):
        def write():
            with files.folder_written_aside(tmp_path / "folder") as aside:
                (aside / "ours").touch()
                (tmp_path / "folder").mkdir()
                (tmp_path / "folder" / "theirs").touch()

        with pytest.raises(OSError, match=r"/folder cannot be written: Directory not empty$"):
            write()
        assert [file.name for file in tmp_path.rglob("*")] == ["folder", "theirs"]

    def test_two_of_one_name_at_a_time(self, tmp_path):
        """As of two machines whose processes have the same number; the later one stays."""
        with files.folder_written_aside(tmp_path / "folder", replace=True) as first:
            with files.folder_written_aside(tmp_path / "folder", replace=True) as second:
                (second / "b").touch()
            (first / "a").touch()
        assert [file.name for file in tmp_path.rglob("*")] == ["folder", "a"]

    def test_an_error_of_the_work_is_left_as_it_is(self, tmp_path):
        with (
            pytest.raises(FileNotFoundError, match="nowhere"),
            files.folder_written_aside(tmp_path / "folder"),
        ):
            (tmp_path / "nowhere").read_text()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["17", "[]", '{"split": "validation"}', '{"step": "x"}', "\x80"])
def test_a_line_that_is_no_record_is_dropped(tmp_path, line):
    records = Records(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 3}\n' + line.encode("latin1") + b'\n{"step": 6}\n{"step": 9}\n')
    with warnings_of_absl() as lines:
        assert records.cut_back(6) == {"step": 6}
    assert file.read_text() == '{"step": 3}\n{"step": 6}\n'
    assert "damaged line" in lines[0]
    assert "1 evaluations after step 6" in lines[1]
    records.close()


def test_a_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with stopping.StopRequest().listen() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signum, left) == (signal.SIGINT, [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [128 + signal.SIGTERM]


class TestData:
    @pytest.fixture
    def config(self, tmp_path):
        rows = {"train": labelled(1, 10), "validation": labelled(11, 14)}
        config = small_config(num_classes=3)
        make_set(tmp_path / "data", rows)
        config.dataset.update(data_dir=str(tmp_path / "data"), classes=CLASSES, num_frames=4)
        config.batch_size = 4
        return config

    def frames(self, config, clip: int) -> Path:
        return Path(config.dataset.data_dir) / "20bn-jester-v1" / str(clip)

    def test_other_pictures_are_refused(self, config):
        state = get_dataset(config, "train").get_state()
        state = json.loads(json.dumps(state))
        get_dataset(config, "train").set_state(state)
        shutil.copy(self.frames(config, 4) / "00001.jpg", self.frames(config, 5))
        with pytest.raises(ValueError, match=r"has changed .* 1 of 10 sampled clips, '5' among"):
            get_dataset(config, "train").set_state(state)

    def test_another_number_of_frames_is_refused(self, config):
        state = get_dataset(config, "train").get_state()
        sorted(self.frames(config, 2).iterdir())[-1].unlink()
        with pytest.raises(ValueError, match="'2' among them"):
            get_dataset(config, "train").set_state(state)

    def test_another_place_and_a_mended_clip_are_not(self, config, tmp_path):
        whole = (self.frames(config, 7) / "00001.jpg").read_bytes()
        (self.frames(config, 7) / "00001.jpg").write_bytes(whole[:50])
        state = get_dataset(config, "train").get_state()
        (self.frames(config, 7) / "00001.jpg").write_bytes(whole)
        shutil.move(tmp_path / "data", tmp_path / "elsewhere")
        config.dataset.data_dir = str(tmp_path / "elsewhere")
        get_dataset(config, "train").set_state(state)

    def test_a_position_of_an_earlier_version_is_taken(self, config):
        state = get_dataset(config, "train").get_state()
        del state["pictures"]
        get_dataset(config, "train").set_state(state)


class TestWorkers:
    def batches(self, source=None, **options) -> loader.BatchIterator:
        config = small_config(num_classes=2)
        config.dataset.num_frames = 1
        options_ = loader.ClipOptions.from_config(config, training=True)
        return loader.BatchIterator(source or EndsItsProcess(), options_, batch_size=2, **options)

    def test_one_that_ends_with_0_is_an_error_not_a_wait(self):
        batches = self.batches(num_workers=2)
        with pytest.raises(RuntimeError, match=r"worker process reading .* died.*exit code 0"):
            list(itertools.islice(batches, 20))
        batches.close()

    def test_one_that_hangs_is_an_error_not_a_wait(self, tmp_path):
        batches = self.batches(EndsItsProcess(ids=tuple("abcd")), num_workers=1, timeout_s=600)
        next(batches)  # a worker may take long to start on a busy machine
        (worker,) = batches._batches._workers
        batches._batches._timeout_s = 4.0
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"hang: no batch in 4 s; 1 of 1 .*timeout_s"):
            list(itertools.islice(batches, 20))
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL
        batches.close()

    def test_waiting_is_not_hanging(self):
        class Slow:
            def __next__(self):
                time.sleep(2.5)
                return "batch"

            def close(self):
                pass

        batches = watch.WatchedBatches(Slow(), timeout_s=4.0, endless=True)
        assert [next(batches), next(batches)] == ["batch", "batch"]
        batches.close()
        batches = watch.WatchedBatches(Slow(), timeout_s=1.0, endless=True)
        with pytest.raises(watch.WorkerError, match=r"no batch in 1 s; 0 of 0"):
            next(batches)
        batches.close()
