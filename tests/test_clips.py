"""How one clip comes about: views, draws, what is skipped, which frames it is."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from input_pipeline import get_dataset
from input_pipeline.clips import ClipOptions, ClipReader
from rvit_jax import evaluate, load, train
from tests.jester_folder import CLASSES, labelled, make_clip, make_set
from tests.small import saved_model, small_config
from tests.test_loader import assert_equal_batches, make_config, open_split, take


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve training clips of 9 frames, and three others."""
    root = tmp_path_factory.mktemp("jester")
    splits = {"train": labelled(1, 12), "validation": labelled(21, 23)}
    return make_set(root, splits, num_frames=9)


def frames_of(folder, split="train", epochs=1, process=(0, 1), **keys):
    """Clip id and epoch -> its frames, as the batches tell."""
    config = make_config(folder, **keys)
    batches = get_dataset(
        config, split, process_index=process[0], process_count=process[1], with_frame_indices=True
    )
    found = {}
    for number in range(epochs * batches.steps_per_epoch):
        batch = next(batches)
        for clip_id, indices, mask in zip(
            batch["id"], batch["frame_indices"], batch["mask"], strict=True
        ):
            if mask:
                found[clip_id, number // batches.steps_per_epoch] = tuple(indices.tolist())
    batches.close()
    return found


def test_a_batch_says_which_frames_it_holds(folder):
    keys = {"dataset.num_frames": 4, "dataset.frame_stride": 3, "dataset.short_clips": "ragged"}
    found = frames_of(folder, "validation", **keys)
    assert set(found.values()) == {(0, 3, 6, -1)}
    keys["dataset.short_clips"] = "repeat_last"
    assert set(frames_of(folder, "validation", **keys).values()) == {(0, 3, 6, 6)}
    assert "frame_indices" not in next(open_split(folder))


@pytest.mark.parametrize("how", ["random", "dense"])
def test_draws_depend_on_seed_epoch_and_clip_alone(folder, how):
    keys = {"dataset.sampling": how, "dataset.num_frames": 3}
    found = frames_of(folder, epochs=2, **keys)
    assert len(found) == 24
    assert len(set(found.values())) > 5  # clips and epochs differ
    assert found == frames_of(folder, epochs=2, **keys, **{"dataset.num_workers": 2})
    assert found == frames_of(folder, epochs=2, **keys, **{"batch_size": 6})
    halves = [frames_of(folder, epochs=2, process=(p, 2), **keys) for p in (0, 1)]
    assert found == halves[0] | halves[1]
    assert found != frames_of(folder, epochs=2, **keys, seed=4)


@pytest.mark.parametrize("how", ["random", "dense", "uniform"])
def test_evaluation_draws_nothing(folder, how):
    keys = {"dataset.sampling": how, "dataset.num_frames": 3}
    expected = {"random": (1, 4, 7), "uniform": (1, 4, 7), "dense": (3, 4, 5)}[how]
    assert set(frames_of(folder, "validation", **keys).values()) == {expected}


def test_a_resumed_run_draws_the_same(folder):
    keys = {"dataset.sampling": "random", "dataset.resize": "short_side"}
    expected = take(open_split(folder, **keys), 6)
    batches = open_split(folder, **keys)
    batches.set_state({**batches.get_state(), "position": 4})
    assert_equal_batches(take(batches, 2), expected[4:])


def test_views_by_hand(folder):
    keys = {
        "dataset.sampling": "uniform",
        "dataset.num_frames": 3,
        "dataset.resize": "short_side",
        "views.temporal": 2,
        "views.spatial": 3,
        "batch_size": 2,
    }
    config = make_config(folder, **keys)
    batch = next(get_dataset(config, "validation", with_frame_indices=True))
    assert batch["video"].shape == (2, 6, 3, 8, 8, 3)
    assert batch["num_frames"].tolist() == [[3] * 6] * 2
    # Parts of three frames: a quarter and three quarters of the way through each.
    assert batch["frame_indices"][0].tolist() == [[0, 3, 6]] * 3 + [[2, 5, 8]] * 3
    path = folder / "20bn-jester-v1" / "21" / "00006.jpg"  # frame 5
    whole = np.asarray(Image.open(path).convert("RGB").resize((11, 8)))  # 20 x 14 before
    for spatial, left in enumerate((0, 2, 2)):  # 3 pixels of room: 0.5, 1.5, 2.5, rounded
        expected = whole[:, left : left + 8]
        np.testing.assert_array_equal(batch["video"][0, 3 + spatial, 1], expected)


def test_a_clip_run_backwards_has_the_class_that_it_shows(folder):
    keys = {"dataset.augment.time_reversal": 0.5, "dataset.num_frames": 4}
    keys |= {"dataset.short_clips": "ragged", "dataset.frame_stride": 3}
    config = make_config(folder, **keys)
    batches = get_dataset(config, "train", with_frame_indices=True)
    own = {str(n): CLASSES[n % 3] for n in range(1, 13)}
    becomes = {"Swiping Left": "Swiping Right", "Swiping Right": "Swiping Left"}
    seen = set()
    for batch in take(batches, 12):
        for clip_id, label, indices, mask in zip(
            batch["id"], batch["label"], batch["frame_indices"], batch["mask"], strict=True
        ):
            if not mask:
                continue
            backwards = indices.tolist() == [6, 3, 0, -1]
            assert backwards or indices.tolist() == [0, 3, 6, -1]
            name = own[clip_id]
            seen.add((name, backwards))
            assert CLASSES[label] == (becomes[name] if backwards else name)
    # Thumb Up is never run backwards.
    assert seen == {(name, b) for name in CLASSES for b in (0, 1)} - {("Thumb Up", True)}


def test_a_clip_plays_faster_and_slower(folder):
    keys = {"dataset.augment.frame_rate_jitter": (0.5, 2.0), "dataset.num_frames": 3}
    keys["dataset.frame_stride"] = 2
    spans = {indices[2] for indices in frames_of(folder, epochs=4, **keys).values()}
    assert spans == {2, 3, 4, 5, 6, 7, 8}  # strides 1 to 4
    assert set(frames_of(folder, "validation", **keys).values()) == {(0, 2, 4)}


def test_evaluating_the_training_split_draws_nothing(folder, tmp_path):
    checkpoint = saved_model(tmp_path / "model", class_names=CLASSES)
    rows = []
    for seed in (1, 2):
        config = small_config(num_classes=3)
        config.dataset.update(data_dir=str(folder), classes=CLASSES, sampling="random")
        config.dataset.augment.time_reversal = 1.0
        config.seed = seed
        workdir = tmp_path / str(seed)
        evaluate.evaluate(config, workdir, "train", checkpoint, ["dataset.sampling"])
        rows.append((workdir / "evaluation" / "train_predictions.csv").read_text())
    assert rows[0] == rows[1]
    own = [(str(n), CLASSES[n % 3]) for n in range(1, 13)]
    assert [tuple(r.split(";")[::3]) for r in rows[0].splitlines()[1:]] == own


def test_training_has_one_view(folder):
    keys = {"dataset.sampling": "dense", "views.temporal": 3}
    assert next(open_split(folder, **keys))["video"].ndim == 5


def test_a_crop_is_one_for_all_frames_of_a_clip(tmp_path):
    root = make_set(tmp_path, {"train": labelled(1, 4)}, num_frames=1)
    for clip in (root / "20bn-jester-v1").iterdir():
        wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 64, 3), np.uint8))
        for number in (1, 2, 3):
            wide.save(clip / f"{number:05}.jpg", quality=95)
    keys = {"dataset.resize": "short_side", "dataset.num_frames": 3}
    batches = take(open_split(root, **keys), 3)
    videos = np.concatenate([batch["video"] for batch in batches])
    for video in videos:
        assert (video == video[0]).all()
    assert len(np.unique(videos[:, 0].reshape(len(videos), -1), axis=0)) > 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_views": 2}, "takes its beginning alone"),
        ({"spatial_views": 3}, "leaves none: set it to 'short_side'"),
        ({"sampling": "middle"}, "sampling is 'middle'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"time_reversal": 0.5, "frame_order": "shuffled", "training": True}, "in their order"),
        ({"time_reversal": 0.5, "frame_packing": "channel_planes", "training": True}, "in their"),
        (
            {"frame_rate_jitter": (0.5, 2.0), "sampling": "uniform", "training": True},
            "frame_rate_jitter has no effect with dataset.sampling=uniform",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClipOptions(8, 4, **options)


def test_controls_need_no_other_config_than_training():
    """Nothing is drawn in evaluation: frames may be shuffled whatever training drew."""
    ClipOptions(8, 4, time_reversal=0.5, frame_rate_jitter=(0.5, 2.0), frame_order="shuffled")


def test_a_cache_of_draws_is_refused():
    with pytest.raises(ValueError, match=r"set dataset.cache=False"):
        ClipReader(None, ClipOptions(8, 4, sampling="random", training=True), cache=True)


class TestSkipping:
    @pytest.fixture
    def damaged(self, tmp_path):
        root = make_set(
            tmp_path, {s: labelled(1, 6) for s in ("train", "validation")}, num_frames=3
        )
        (root / "20bn-jester-v1" / "2" / "00002.jpg").write_bytes(b"no image")
        for file in (root / "20bn-jester-v1" / "5").iterdir():
            file.unlink()
        return root

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_row_is_masked_and_the_others_keep_their_place(self, damaged, workers):
        keys = {"dataset.on_error": "skip", "dataset.num_workers": workers}
        batches = list(open_split(damaged, "validation", **keys))
        ids = [str(i) for batch in batches for i in batch["id"]]
        masks = [bool(m) for batch in batches for m in batch["mask"]]
        assert ids == ["1", "2", "3", "4", "5", "6", "", ""]
        assert masks == [True, False, True, True, False, True, False, False]
        assert not batches[0]["video"][1].any()

    def test_by_default_it_stops_and_names_the_file(self, damaged):
        with pytest.raises(ValueError, match=r"2/00002.jpg"):
            list(open_split(damaged, "validation"))

    def test_every_record_counts_them(self, damaged, tmp_path, capsys):
        checkpoint = saved_model(tmp_path / "model", class_names=CLASSES)
        config = small_config(num_classes=3)
        config.dataset.update(data_dir=str(damaged), classes=CLASSES, on_error="skip")
        config.batch_size = 4
        record = evaluate.evaluate(config, tmp_path / "run", "validation", checkpoint)
        assert (record["num_clips"], record["skipped_clips"]) == (4, 2)
        written = json.loads((tmp_path / "run" / "evaluation" / "validation.json").read_text())
        assert written["skipped_clips"] == 2

    def test_training_counts_them(self, damaged, tmp_path):
        config = small_config(num_classes=3, hidden_size=8)
        config.dataset.update(data_dir=str(damaged), classes=CLASSES, num_frames=2)
        config.dataset.on_error = "skip"
        config.batch_size, config.num_epochs = 3, 2
        train.train_and_evaluate(config, tmp_path / "run")
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        for record in map(json.loads, lines):
            assert record["training"]["skipped_clips"] == 2
            assert record["skipped_clips"] == 2

    def test_training_goes_on_while_all_is_skipped(self, damaged, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "LOOK_EVERY_S", 0.0)
        for file in (damaged / "20bn-jester-v1").glob("*/*"):
            if file.parent.name != "1":
                file.write_bytes(b"")
        config = small_config(num_classes=3, hidden_size=8)
        config.dataset.update(data_dir=str(damaged), classes=CLASSES, num_frames=2)
        config.dataset.on_error = "skip"
        config.batch_size, config.num_epochs = 1, 1
        train.train_and_evaluate(config, tmp_path / "run")
        record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
        assert record["training"]["skipped_clips"] == 5

    def test_nothing_left_is_an_error(self, tmp_path):
        root = make_set(tmp_path / "data", {"validation": labelled(1, 2)}, num_frames=1)
        for file in (root / "20bn-jester-v1").glob("*/*"):
            file.write_bytes(b"")
        checkpoint = saved_model(tmp_path / "model", class_names=CLASSES)
        config = small_config(num_classes=3)
        config.dataset.update(data_dir=str(root), classes=CLASSES, on_error="skip")
        with pytest.raises(ValueError, match="none of the 2 clips could be read"):
            evaluate.evaluate(config, tmp_path / "run", "validation", checkpoint)


def test_views_are_averaged(folder, tmp_path):
    """The mean of the probabilities of each view alone."""
    checkpoint = saved_model(tmp_path / "model", class_names=CLASSES, attention="softmax")
    config = small_config(num_classes=3)
    config.dataset.update(data_dir=str(folder), classes=CLASSES)
    config.update_from_flattened_dict(
        {"dataset.sampling": "dense", "dataset.num_frames": 3, "views.temporal": 2, "batch_size": 2}
    )
    overrides = ["dataset.sampling", "dataset.num_frames"]
    record = evaluate.evaluate(config, tmp_path / "run", "validation", checkpoint, overrides)
    assert record["views"] == {"temporal": 2, "spatial": 1}
    lines = (tmp_path / "run" / "evaluation" / "validation_predictions.csv").read_text()
    loaded = load(checkpoint)
    config.model = loaded.config.model
    for batch in get_dataset(config, "validation"):
        each = [np.asarray(loaded.model(batch["video"][:, v])[0]) for v in (0, 1)]
        expected = np.mean([np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in each], 0)
        for clip_id, mask, row in zip(batch["id"], batch["mask"], expected, strict=True):
            if mask:
                found = next(line for line in lines.splitlines() if line.startswith(f"{clip_id};"))
                assert found.split(";")[1] == CLASSES[row.argmax()]
                assert float(found.split(";")[2]) == pytest.approx(row.max(), abs=2e-6)


def test_a_run_that_changes_its_clips_is_resumed_bit_for_bit(folder, tmp_path, monkeypatch):
    """Draws in the loader and on the device are functions of seed, epoch, step and clip."""
    config = small_config(num_classes=3, hidden_size=8, num_layers=1)
    config.dataset.update(data_dir=str(folder), classes=CLASSES, num_frames=2, sampling="random")
    config.dataset.augment.update(time_reversal=0.5, horizontal_flip=0.5, mixup_alpha=0.8)
    config.dataset.augment.random_resized_crop.scale = (0.5, 1.0)
    config.batch_size, config.num_epochs, config.checkpoint_every_steps = 4, 2, 1
    train.train_and_evaluate(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in (5, 6):  # a run that was stopped after step 4
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    train.train_and_evaluate(config, tmp_path / "again")
    runs = [load(tmp_path / name / "checkpoints" / "6") for name in ("whole", "again")]
    for a, b in zip(*(run.model._leaves for run in runs), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "again")]
    assert lines[0] == lines[1].replace("/again/", "/whole/")


def test_clips_of_one_frame(tmp_path):
    make_clip(tmp_path / "20bn-jester-v1" / "1", 1)
    make_set(tmp_path, {"validation": ["1;Thumb Up"]})
    for how in ("head", "dense", "uniform", "random"):
        found = frames_of(tmp_path, "validation", **{"dataset.sampling": how})
        assert found == {("1", 0): (0, 0, 0, 0)}
