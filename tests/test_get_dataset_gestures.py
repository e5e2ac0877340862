"""`get_dataset` on generated data: who draws, who waits, what is checked."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import input_pipeline
from configs.base import get_config
from tests.jester_folder import CLASSES, labelled, make_set


@pytest.fixture
def drawn(monkeypatch):
    """The calls of `generate`, which writes six tiny clips instead of drawing."""
    calls = []

    def generate(output, *, classes, **counts):
        calls.append((classes, dict(counts)))
        root = make_set(Path(output), {"train": labelled(1, 3), "test": labelled(4, 6)})
        seed = counts.pop("seed")
        manifest = {"version": 1, "seed": seed, "classes": list(classes), "num_clips": counts}
        (root / "gestures.json").write_text(json.dumps(manifest))

    def read_manifest(output):
        return json.loads((Path(output) / "gestures.json").read_text())

    fake = SimpleNamespace(generate=generate, read_manifest=read_manifest, VERSION=1)
    monkeypatch.setitem(input_pipeline.__dict__, "gestures", fake)
    return calls


@pytest.fixture
def config(tmp_path):
    config = get_config()
    config.batch_size = 2
    config.model.image_size = 8
    config.dataset.name = "gestures"
    config.dataset.data_dir = str(tmp_path / "drawn")
    config.dataset.classes = CLASSES
    config.dataset.num_frames = 2
    config.dataset.generate.train = 3
    config.dataset.generate.test = 3
    config.dataset.generate.seed = 5
    return config


def test_a_missing_set_is_drawn_once(config, drawn):
    assert input_pipeline.get_dataset(config, "train").num_clips == 3
    batches = input_pipeline.get_dataset(config, "test")
    assert batches.has_labels
    assert [batch["label"].tolist() for batch in batches] == [[1, 2], [0, -1]]
    assert drawn == [(CLASSES, {"train": 3, "validation": 0, "test": 3, "seed": 5})]


def test_a_class_that_was_not_drawn_is_named(config, drawn):
    input_pipeline.get_dataset(config, "train")
    config.dataset.classes = ("Thumb Up", "Stop Sign", "No gesture")
    with pytest.raises(
        ValueError, match=r"do not include Stop Sign, No gesture: .* new folder .*: Swiping Left,"
    ):
        input_pipeline.get_dataset(config, "train")
    assert len(drawn) == 1


def test_another_set_is_used_and_said(config, drawn, caplog):
    input_pipeline.get_dataset(config, "train")
    assert not caplog.records
    config.dataset.generate.update(seed=6, train=4)
    assert input_pipeline.get_dataset(config, "train").num_clips == 3
    (record,) = caplog.records
    assert "seed 5 (the config's: 6), 3 train clips (the config's: 4)" in record.getMessage()


def test_a_set_of_more_classes_is_used_and_said(config, drawn, caplog):
    input_pipeline.get_dataset(config, "train")
    config.dataset.classes = CLASSES[:2]  # the clips of the others are left out
    assert input_pipeline.get_dataset(config, "train").num_clips < 3
    (record,) = (r for r in caplog.records if "drawn with" in r.getMessage())
    assert "drawn with 3 classes (the config's: 2 of them);" in record.getMessage()


def test_other_processes_wait_for_the_first(config, drawn, monkeypatch):
    monkeypatch.setattr(input_pipeline, "_GENERATION_LIMIT_S", 0.0)
    with pytest.raises(FileNotFoundError, match=r"process 0 did not finish .* draw it beforehand"):
        input_pipeline.get_dataset(config, "train", process_index=1, process_count=2)
    monkeypatch.setattr(input_pipeline, "_GENERATION_LIMIT_S", 60.0)
    first = threading.Timer(0.3, input_pipeline.get_dataset, (config, "train"))
    first.start()
    batches = input_pipeline.get_dataset(config, "train", process_index=1, process_count=2)
    first.join()
    assert next(batches)["video"].shape[0] == 1
    assert len(drawn) == 1


def test_a_split_that_was_not_drawn_is_named(config, drawn):
    with pytest.raises(FileNotFoundError, match=r"no CSV of the split 'validation' .* train, test"):
        input_pipeline.get_dataset(config, "validation")


def test_gestures_that_are_really_drawn(config):
    config.dataset.classes = ("Swiping Left", "Swiping Right")
    config.dataset.generate.train = 2
    config.dataset.generate.test = 0
    batches = input_pipeline.get_dataset(config, "train")
    assert batches.class_names == ("Swiping Left", "Swiping Right")
    batch = next(batches)
    assert sorted(batch["label"].tolist()) == [0, 1]
    assert len(np.unique(batch["video"])) > 10
