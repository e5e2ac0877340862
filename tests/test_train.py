"""Training, evaluation and checkpoints end to end, on tiny folders of noise in Jester's layout."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rvit_jax
from rvit_jax import evaluate, seal, train
from rvit_jax.checkpoint import resolve_checkpoint
from tests.jester_folder import CLASSES, labelled, make_set, reference_frame
from tests.small import small_config

TRAIN, VALIDATION, TEST = labelled(1, 10), labelled(11, 17), ["21", "22", "23"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("jester")
    return make_set(root, {"train": TRAIN, "validation": VALIDATION, "test": TEST}, num_frames=None)


def tiny_run(data_dir: Path, **keys):
    config = small_config(num_classes=3)
    config.dataset.update(
        data_dir=str(data_dir), classes=CLASSES, num_frames=4, short_clips="ragged"
    )
    config.update(batch_size=4, num_epochs=2, **keys)
    return config


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory) -> Path:
    """The workdir of a whole run."""
    workdir = tmp_path_factory.mktemp("finished")
    train.train_and_evaluate(tiny_run(data_dir), workdir)
    return workdir


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir: Path) -> list[np.ndarray]:
    return jax.tree.leaves(jax.device_get(rvit_jax.load(workdir).model._leaves))


def set_top1(workdir: Path, step: int, top1: float) -> None:
    file = workdir / "checkpoints" / str(step) / "meta" / "model.json"
    meta = json.loads(file.read_text())
    meta["metrics"]["top1"] = top1
    file.write_text(json.dumps(seal.with_own_seal(meta)))


def test_what_a_run_leaves(finished):
    assert [r["step"] for r in records(finished)] == [3, 6]  # 10 clips, 4 a step, 2 epochs
    first = records(finished)[0]
    assert first["split"] == "validation"
    assert first["num_clips"] == 7
    assert set(first) == {
        *("split", "num_clips", "top1", "top5", "loss", "mean_class_accuracy", "views"),
        *("frame_order", "checkpoint", "step", "skipped_clips", "missing_clips", "training"),
    }
    model = json.loads((finished / "model.json").read_text())
    assert model["class_names"] == list(CLASSES)
    assert model["config"]["model"]["hidden_size"] == 16
    assert list(finished.glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["3", "6"]


def test_loading_gives_the_best_checkpoint(finished):
    top1 = {r["step"]: (r["top1"], r["step"]) for r in records(finished)}
    loaded = rvit_jax.load(finished)
    assert loaded.step == max(top1, key=top1.get)
    assert loaded.class_names == CLASSES
    for step in (3, 6):
        assert rvit_jax.load(finished / "checkpoints" / str(step)).step == step


def test_of_equals_the_later_checkpoint_is_best(finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for step, top1 in ((3, 0.5), (6, 0.5)):
        set_top1(tmp_path, step, top1)
    assert resolve_checkpoint(tmp_path).name == "6"


def test_a_moved_checkpoint_folder_is_complete(finished, tmp_path):
    shutil.copytree(finished / "checkpoints" / "6", tmp_path / "mine")
    loaded = rvit_jax.load(tmp_path / "mine")
    assert loaded.class_names == CLASSES


def test_preprocess_is_the_training_pixels(finished, data_dir):
    from PIL import Image

    file = data_dir / "20bn-jester-v1" / "1" / "00001.jpg"
    frames = np.array(Image.open(file).convert("RGB"))[None]
    expected = (reference_frame(file, 16).astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_array_equal(rvit_jax.load(finished).preprocess(frames)[0], expected)


@pytest.mark.parametrize("frames", [np.zeros((2, 8, 8), np.uint8), np.zeros((1, 8, 8, 3))])
def test_preprocess_refuses_what_is_no_video(finished, frames):
    with pytest.raises(ValueError, match=r"expected uint8 \[T, H, W, 3\]"):
        rvit_jax.load(finished).preprocess(frames)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_evaluation_does_not_depend_on_the_batch_size(finished, data_dir, batch_size, tmp_path):
    config = tiny_run(data_dir)
    config.batch_size = batch_size
    record = evaluate.evaluate(config, tmp_path, "validation", finished / "checkpoints" / "3")
    expected = records(finished)[0]
    assert record["loss"] == pytest.approx(expected.pop("loss"), rel=1e-6)
    for key in ("num_clips", "top1", "top5", "mean_class_accuracy", "step"):
        assert record[key] == expected[key], key
    assert json.loads((tmp_path / "evaluation" / "validation.json").read_text()) == record


def test_evaluation_in_another_order_gives_the_same(finished, data_dir, tmp_path, monkeypatch):
    orders = []
    split = evaluate.nnx.split

    def note_and_split(module, *filters):
        orders.append((module.schedule, module.segment_frames))
        return split(module, *filters)

    monkeypatch.setattr(evaluate.nnx, "split", note_and_split)
    config = tiny_run(data_dir)
    expected = evaluate.evaluate(config, tmp_path / "one", "validation", finished)
    assert ("layers", 2) not in orders
    config.model.update(schedule="layers", segment_frames=2)
    overrides = ["model.schedule", "model.segment_frames"]
    record = evaluate.evaluate(config, tmp_path / "two", "validation", finished, overrides)
    assert ("layers", 2) in orders
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert [record[key] for key in ("top1", "top5")] == [expected[key] for key in ("top1", "top5")]


def test_every_training_clip_is_evaluated_once(finished, data_dir, tmp_path):
    record = evaluate.evaluate(tiny_run(data_dir), tmp_path, "train", finished)
    assert record["num_clips"] == 10
    lines = (tmp_path / "evaluation" / "train_predictions.csv").read_text().splitlines()[1:]
    assert sorted(line.split(";")[0] for line in lines) == sorted(r.split(";")[0] for r in TRAIN)


def test_a_split_without_labels_gives_predictions(finished, data_dir, tmp_path):
    record = evaluate.evaluate(tiny_run(data_dir), tmp_path, "test", finished)
    assert record["num_clips"] == 3
    assert "top1" not in record
    lines = (tmp_path / "evaluation" / "test_predictions.csv").read_text().splitlines()
    assert [line.split(";")[0] for line in lines[1:]] == ["21", "22", "23"]
    assert all(line.split(";")[1] in CLASSES for line in lines[1:])


def test_labels_are_matched_by_name(finished, data_dir, tmp_path):
    straight = evaluate.evaluate(tiny_run(data_dir), tmp_path, "validation", finished)
    config = tiny_run(data_dir)
    config.dataset.classes = (*CLASSES[1:], CLASSES[0])
    turned = evaluate.evaluate(config, tmp_path, "validation", finished)
    assert {**turned, "loss": 0} == {**straight, "loss": 0}


def test_a_class_that_the_model_does_not_know_is_refused(finished, data_dir, tmp_path):
    config = tiny_run(data_dir)
    config.dataset.classes = ()  # Jester's 27
    with pytest.raises(ValueError, match="24 classes that the checkpoint does not know"):
        evaluate.evaluate(config, tmp_path, "validation", finished)


def test_the_checkpoint_brings_model_and_preprocessing(finished, data_dir):
    trained = rvit_jax.load(finished).config
    config = tiny_run(data_dir)
    config.dataset.num_frames = 2
    config.model.hidden_size = 32
    used = evaluate.use_checkpoint_config(config, trained, [])
    assert (used.dataset.num_frames, used.model.hidden_size) == (4, 16)
    used = evaluate.use_checkpoint_config(config, trained, ["dataset.num_frames"])
    assert used.dataset.num_frames == 2
    with pytest.raises(ValueError, match=r"--config.model.hidden_size=32 contradicts"):
        evaluate.use_checkpoint_config(config, trained, ["model.hidden_size"])
    config.model.schedule = "layers"  # changes no number
    used = evaluate.use_checkpoint_config(config, trained, ["model.schedule"])
    assert (used.model.schedule, used.model.hidden_size) == ("layers", 16)


class _StopAfter:
    """Stands in for the next batch: asks for a stop, as a signal would, at the n-th batch."""

    def __init__(self, dataset, batches: int):
        self._dataset, self._left = dataset, batches

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def __next__(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._dataset)


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(
    finished, data_dir, tmp_path, monkeypatch, stop_after
):
    get_dataset = train.input_pipeline.get_dataset

    def stopping(config, split):
        dataset = get_dataset(config, split)
        return _StopAfter(dataset, stop_after) if split == "train" else dataset

    with monkeypatch.context() as patched:
        patched.setattr(train.input_pipeline, "get_dataset", stopping)
        with pytest.raises(train.Interrupted) as interrupted:
            train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    assert interrupted.value.signum == signal.SIGTERM
    assert (tmp_path / "checkpoints" / str(stop_after)).is_dir()  # the step was finished and saved
    train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    expected = [{**r, "checkpoint": None} for r in records(finished)]
    assert [{**r, "checkpoint": None} for r in records(tmp_path)] == expected
    for ours, theirs in zip(weights(tmp_path), weights(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("owner", "method", "stands_at"),
    [
        (train.Records, "cut_back", 0),  # before the first step
        (train.checkpoint.Checkpoints, "save", 4),  # in the save of step 3
        (train.checkpoint.Checkpoints, "wait", 6),  # in the last one
    ],
)
def test_a_signal_at_another_moment_loses_nothing(
    finished, data_dir, tmp_path, monkeypatch, owner, method, stands_at
):
    whole = getattr(owner, method)

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(owner, method, whole)
        return whole(self, *args)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(train.Interrupted):
        train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    assert max(int(f.name) for f in (tmp_path / "checkpoints").iterdir()) == stands_at
    train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(finished)]
    for ours, theirs in zip(weights(tmp_path), weights(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_longer_run_goes_on(finished, data_dir, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    config = tiny_run(data_dir)
    config.num_epochs = 3
    bars = []

    class Bar(train.tqdm):
        def __init__(self, **keys):
            super().__init__(**keys)
            bars.append((self, keys["initial"]))

    monkeypatch.setattr(train, "tqdm", Bar)
    train.train_and_evaluate(config, tmp_path)
    assert [r["step"] for r in records(tmp_path)] == [3, 6, 9]
    ((bar, began_at),) = bars  # ten clips an epoch, of which four, four and two come in a batch
    assert (began_at, bar.n, bar.total) == (20, 30, 30)


def test_another_config_is_refused(finished, data_dir):
    config = tiny_run(data_dir)
    config.optimizer.learning_rate = 0.5
    config.model.num_layers = 3
    before = (finished / "model.json").read_text()
    with pytest.raises(ValueError, match=r"num_layers: 2 there, 3 now.*another --workdir") as error:
        train.train_and_evaluate(config, finished)
    assert "optimizer.learning_rate: 0.0001 there, 0.5 now" in str(error.value)
    assert (finished / "model.json").read_text() == before


def test_old_checkpoints_go_and_the_best_stays(data_dir, tmp_path):
    config = tiny_run(data_dir, keep_checkpoints=1)
    config.num_epochs = 5
    train.train_and_evaluate(config, tmp_path)
    best = max(records(tmp_path), key=lambda r: (r["top1"], r["step"]))["step"]
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 15}


def test_the_best_stays_across_restarts(data_dir, tmp_path):
    """What was best is known from the disk, not from the process that made it."""
    config = tiny_run(data_dir, keep_checkpoints=1)
    train.train_and_evaluate(config, tmp_path)
    best = max(records(tmp_path), key=lambda r: (r["top1"], r["step"]))["step"]
    set_top1(tmp_path, best, 1.0)  # nothing later is better; equals would be
    config.optimizer.learning_rate = 0.0
    config.num_epochs = 5
    with pytest.raises(ValueError, match="another config"):
        train.train_and_evaluate(config, tmp_path)
    config.optimizer.learning_rate = 1e-4
    train.train_and_evaluate(config, tmp_path)
    later = {r["step"]: r["top1"] for r in records(tmp_path) if r["step"] > 6}
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert all(top1 < 1.0 for top1 in later.values())
    assert kept == {best, 15}
    assert resolve_checkpoint(tmp_path).name == str(best)


def test_a_stop_in_the_evaluation_leaves_it_to_the_next_start(
    finished, data_dir, tmp_path, monkeypatch
):
    evaluate_split = evaluate.evaluate_split

    def interrupted(*args, should_stop, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate_split(*args, should_stop=should_stop, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(train.evaluate, "evaluate_split", interrupted)
        with pytest.raises(train.Interrupted):
            train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    assert [r["step"] for r in records(tmp_path)] == [3, 6]
    for step in (3, 6):  # the checkpoint that was there got its metrics
        file = tmp_path / "checkpoints" / str(step) / "meta" / "model.json"
        theirs = finished / "checkpoints" / str(step) / "meta" / "model.json"
        top1 = [json.loads(f.read_text())["metrics"]["top1"] for f in (file, theirs)]
        assert top1[0] == top1[1]
    assert resolve_checkpoint(tmp_path).name == resolve_checkpoint(finished).name


def test_a_run_is_not_cut_short(finished, data_dir):
    config = tiny_run(data_dir)
    config.num_epochs = 1
    with pytest.raises(ValueError, match=r"at step 6, past the 3 of config\.num_epochs=1"):
        train.train_and_evaluate(config, finished)


def test_a_damaged_record_is_dropped(finished, data_dir, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "valid')
    train.train_and_evaluate(tiny_run(data_dir), tmp_path)
    assert [r["step"] for r in records(tmp_path)] == [3, 6]


def test_a_checkpoint_is_what_was_evaluated(finished, data_dir, tmp_path):
    """Saving in the background while training goes on saves the step's own numbers."""
    for expected in records(finished):
        folder = finished / "checkpoints" / str(expected["step"])
        record = evaluate.evaluate(tiny_run(data_dir), tmp_path, "validation", folder)
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_testing_after_training_needs_labels(data_dir, tmp_path):
    with pytest.raises(ValueError, match="the test split has no labels"):
        train.train_and_evaluate(tiny_run(data_dir, test_after_training=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_between_evaluations(data_dir, tmp_path):
    train.train_and_evaluate(tiny_run(data_dir, checkpoint_every_steps=2), tmp_path)
    steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert steps >= {3, 4, 6}
    assert resolve_checkpoint(tmp_path).name in {"3", "6"}  # those that were evaluated


def test_nothing_compiles_again(data_dir, tmp_path, monkeypatch):
    """The partial last batch included: one program per step function, none after epoch one."""
    compiled, at_evaluation, functions = [], [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    write = train.Records.write
    jit = jax.jit

    def note_and_write(self, *args):
        at_evaluation.append(len(compiled))
        write(self, *args)

    def note_and_jit(*args, **kwargs):
        functions.append(jit(*args, **kwargs))
        return functions[-1]

    monkeypatch.setattr(train.Records, "write", note_and_write)
    config = tiny_run(data_dir)
    config.num_epochs = 4
    with monkeypatch.context() as patched:
        patched.setattr(train.jax, "jit", note_and_jit)
        train.train_and_evaluate(config, tmp_path)
    steps = [f for f in functions if getattr(f, "__name__", "") in ("train_step", "eval_step")]
    assert [f._cache_size() for f in steps] == [1, 1]
    assert compiled  # the listener hears
    assert at_evaluation[1] == at_evaluation[2] == at_evaluation[3]


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    config = tiny_run(data_dir)
    config.optimizer.update(name="sgd", learning_rate=1e30, schedule="constant")
    with pytest.raises(FloatingPointError, match=r"lower config\.optimizer\.learning_rate"):
        train.train_and_evaluate(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


class TestErrors:
    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint.*train one with"):
            rvit_jax.load(tmp_path)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            rvit_jax.load(tmp_path / "nothing")

    def test_half_a_checkpoint(self, finished, tmp_path):
        shutil.copytree(finished / "checkpoints" / "6", tmp_path / "6")
        shutil.rmtree(tmp_path / "6" / "meta")
        with pytest.raises(FileNotFoundError, match=r"has no model\.json"):
            rvit_jax.load(tmp_path / "6")

    def test_weights_of_another_shape(self, finished, tmp_path):
        shutil.copytree(finished / "checkpoints" / "6", tmp_path / "6")
        file = tmp_path / "6" / "meta" / "model.json"
        description = json.loads(file.read_text())
        description["config"]["model"]["hidden_size"] = 32
        file.write_text(json.dumps(seal.with_own_seal(description)))
        with pytest.raises(ValueError, match=r"params was made by another version or config"):
            rvit_jax.load(tmp_path / "6")
        del description["seal"], description["sha256"]  # as earlier versions wrote it
        file.write_text(json.dumps(description))
        with pytest.raises(ValueError, match=r"6: the checkpoint cannot be read, or its shapes"):
            rvit_jax.load(tmp_path / "6")

    def test_a_broken_description(self, finished, tmp_path):
        shutil.copytree(finished / "checkpoints" / "6", tmp_path / "6")
        (tmp_path / "6" / "meta" / "model.json").write_text("{")
        with pytest.raises(ValueError, match=r"model\.json cannot be read"):
            rvit_jax.load(tmp_path / "6")


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rvit_jax.main", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            (["--config=configs/gesture.py"], 2, "there is no file configs/gesture.py"),
            (["--config=configs/jester.py", "--config.batchsize=8"], 2, "mean 'batch_size'?"),
            (["--config=configs/jester.py", "--config.model.num_heads=7"], 2, "is 6"),
            (["--config=configs/jester.py:v3"], 2, "no variant 'v3'"),
            (["--config=configs/jester.py", "--mode=trian"], 2, "mean 'train'?"),
            (["--config=configs/jester.py", "--config.batch_size=x"], 2, "a whole number"),
            ([], 2, "--config is missing"),
            (["--config=configs/jester.py", "--checkpoint=results/x"], 2, "for --mode=evaluate"),
            (["--config=configs/jester.py", "--mode=evaluate", "--split=val"], 2, "validation"),
            (["--config=configs/jester.py", "--config.model.num_classes=10"], 2, "27 classes"),
            (
                ["--config=configs/jester.py", "--config.dataset.data_dir=/nowhere"],
                1,
                "/nowhere",
            ),
        ],
    )
    def test_mistakes_give_one_line(self, arguments, status, message, tmp_path):
        done = command(*arguments, f"--workdir={tmp_path / 'run'}")
        assert done.returncode == status
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "run").exists()

    def test_evaluating_before_training(self, tmp_path):
        done = command(
            "--config=configs/jester.py", "--mode=evaluate", f"--workdir={tmp_path / 'run'}"
        )
        assert done.returncode == 1
        assert "holds no checkpoint: train first" in done.stderr

    def test_evaluation_prints_its_record_last(self, finished, data_dir, tmp_path):
        done = command(
            "--config=configs/jester.py",
            "--mode=evaluate",
            f"--checkpoint={finished}",
            f"--workdir={tmp_path}",
            f"--config.dataset.data_dir={data_dir}",
            f"--config.dataset.classes={CLASSES[:2]}",
        )
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout.strip().splitlines()[-1])
        assert record["num_clips"] == sum(not row.endswith(CLASSES[2]) for row in VALIDATION)

    def test_a_workdir_that_cannot_be_used(self, data_dir, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(
            OSError, match=r"file is a file, not a folder; choose another --workdir"
        ):
            train.train_and_evaluate(tiny_run(data_dir), tmp_path / "file" / "run")

    def test_a_file_where_the_evaluation_goes(self, finished, data_dir, tmp_path):
        (tmp_path / "evaluation").write_text("")
        with pytest.raises(
            OSError, match=rf"--workdir={tmp_path} cannot be used: .*/evaluation is a file"
        ):
            evaluate.evaluate(tiny_run(data_dir), tmp_path, "validation", finished)
