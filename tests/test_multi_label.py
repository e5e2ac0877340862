"""Clips with several labels: average precision, and a run from videos to its page."""

import csv
import json

import av
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rvit_jax import evaluate, load, losses, metrics, predict, steps, train
from tests.small import small_config

CLASSES = ("red", "green", "blue")


def by_definition(scores, positive):
    """Of each positive: what share of the clips that score as high are positive; the mean."""
    return np.mean([positive[scores >= score].mean() for score in scores[positive]])


def test_average_precision_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert metrics.average_precision(scores, np.array([1, 0, 1, 0], bool)) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    assert metrics.average_precision(scores, np.array([0, 0, 0, 1], bool)) == 0.25
    assert metrics.average_precision(scores, np.ones(4, bool)) == 1.0


def test_equal_scores_stand_in_one_place():
    positive = np.array([1, 0, 0, 1], bool)
    for order in ([0, 1, 2, 3], [1, 2, 3, 0]):
        equal = metrics.average_precision(np.full(4, 0.5), positive[order])
        assert equal == pytest.approx(0.5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 6))
def test_average_precision_is_its_definition(seed, clips, levels):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, clips) / levels
    positive = random.random(clips) < 0.4
    positive[random.integers(clips)] = True
    expected = by_definition(scores, positive)
    assert metrics.average_precision(scores, positive) == pytest.approx(expected)


def test_classes_without_a_clip_do_not_count():
    counted = metrics.MultiLabelMetrics()
    label = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], np.float32)
    logits = np.array([[2.0, 1, 0], [3, 0, 0], [-1, -2, 5], [9, 9, 9]], np.float32)
    mask = np.array([True, True, True, False])
    counted.update(logits, np.array([0.1, 0.2, 0.3, 9.0]), label, mask)
    result = counted.result()
    assert result["num_clips"] == 3
    assert result["mean_average_precision"] == pytest.approx((1 / 2 + 1) / 2)
    assert result["loss"] == pytest.approx(0.2)


def test_binary_cross_entropy_by_hand():
    loss = losses.binary_cross_entropy(jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 0.0]]))
    expected = (np.log(2) + np.log(1 + np.exp(2.0))) / 2
    assert float(loss[0]) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos whose colour channels are bright or dark; the bright ones are the labels."""
    root = tmp_path_factory.mktemp("lists")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 5)):
        lines = []
        for number in range(count):
            bright = random.random(3) < 0.5
            if not bright.any():
                bright[number % 3] = True
            path = root / f"{split}_{number}.mp4"
            with av.open(str(path), "w") as film:
                stream = film.add_stream("mpeg4", rate=12)
                stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
                for _ in range(5):
                    image = np.where(bright, 220, 20).astype(np.uint8)
                    image = np.broadcast_to(image, (24, 32, 3)) + random.integers(
                        0, 20, (24, 32, 3), dtype=np.uint8
                    )
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    film.mux(stream.encode(frame))
                film.mux(stream.encode())
            names = [name for name, is_bright in zip(CLASSES, bright, strict=True) if is_bright]
            lines.append(json.dumps({"path": path.name, "label": names}))
        (root / f"{split}.jsonl").write_text("\n".join(lines))
    return root


def config_of(data):
    config = small_config(num_classes=3, hidden_size=8, num_layers=1)
    config.dataset.update(name="video_list", data_dir=str(data), num_frames=3, sampling="random")
    config.dataset.classes = CLASSES
    config.loss.name = "binary_cross_entropy"
    config.optimizer.learning_rate = 5e-3
    config.batch_size, config.num_epochs, config.evaluate_every_epochs = 4, 12, 4
    return config


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(config_of(data), workdir)
    return workdir


def test_it_learns_and_the_best_is_that_of_the_highest_map(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert "top1" not in lines[0]
    found = {line["step"]: line["mean_average_precision"] for line in lines}
    assert max(found.values()) > 0.95
    assert load(finished).step == max(found, key=lambda step: (found[step], step))


def test_evaluation(finished, data, tmp_path):
    record = evaluate.evaluate(config_of(data), tmp_path, "validation", finished)
    assert record["num_clips"] == 5
    assert record["mean_average_precision"] > 0.95
    folder = tmp_path / "evaluation"
    rows = list(csv.reader((folder / "validation_predictions.csv").open(), delimiter=";"))[1:]
    listed = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    assert [row[3].split(" | ") for row in rows] == [entry["label"] for entry in listed]
    page = (folder / "report.html").read_text()
    assert "mean average precision" in page
    assert "no labels" not in page


def test_labels_take_the_models_order():
    """Three classes in a circle: the way there is not the way back."""
    index = evaluate.match_labels(("green", "blue", "red"), CLASSES)
    assert index.tolist() == [1, 2, 0]
    mask = np.ones(2, bool)
    one_each = {"label": np.array([0, 2], np.int32), "mask": mask}
    assert evaluate._reindex(one_each, index, 3).tolist() == [1, 0]
    several = {"label": np.array([[1, 1, 0], [0, 0, 1]], np.float32), "mask": mask}
    assert evaluate._reindex(several, index, 3).tolist() == [[0, 1, 1], [1, 0, 0]]


def test_labels_are_matched_by_name(finished, data, tmp_path):
    straight = evaluate.evaluate(config_of(data), tmp_path, "validation", finished)
    config = config_of(data)
    config.dataset.classes = (*CLASSES[1:], CLASSES[0])
    turned = evaluate.evaluate(config, tmp_path, "validation", finished)
    assert turned["mean_average_precision"] == pytest.approx(straight["mean_average_precision"])
    assert turned["loss"] == pytest.approx(straight["loss"], rel=1e-6)


def test_views_are_averaged_class_by_class(finished, data, tmp_path):
    config = config_of(data)
    config.views.temporal = 2
    record = evaluate.evaluate(config, tmp_path, "validation", finished)
    assert record["views"] == {"temporal": 2, "spatial": 1}
    assert record["mean_average_precision"] > 0.95


def test_a_split_without_labels(finished, data, tmp_path):
    """Each class for itself, in one view and in several, whatever the batch."""
    films = sorted(data.glob("validation_*.mp4"))
    lines = [json.dumps({"path": film.name}) for film in films]
    (data / "test.jsonl").write_text("\n".join(lines))
    expected = evaluate.evaluate(config_of(data), tmp_path / "v", "validation", finished)
    assert expected["num_clips"] == 5
    rows = {}
    for split in ("validation", "test"):
        for batch_size in (3, 4):
            config = config_of(data)
            config.batch_size, config.views.temporal = batch_size, 2
            workdir = tmp_path / f"{split}{batch_size}"
            evaluate.evaluate(config, workdir, split, finished)
            text = (workdir / "evaluation" / f"{split}_predictions.csv").read_text()
            rows[split, batch_size] = [line.split(";")[:3] for line in text.splitlines()]
    assert rows["test", 3] == rows["test", 4] == rows["validation", 3]


def test_prediction_answers_each_class_for_itself(finished, data, capsys):
    film = data / "validation_0.mp4"
    arguments = ["--checkpoint", str(finished), "--input", str(film), "--json", "--top_k", "3"]
    assert predict.main(arguments) == 0
    *_, last, result = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    labels = json.loads((data / "validation.jsonl").read_text().splitlines()[0])["label"]
    assert {name for name, p in last["top"] if p > 0.5} == set(labels)
    assert result["result"] in labels


def test_pictures(finished, data, tmp_path):
    from rvit_jax import visualize

    found = visualize.visualize(config_of(data), tmp_path, "validation", finished, num_clips=1)
    assert len(found) == 3


def test_a_subset_of_classes_counts_those_alone(finished, data, tmp_path):
    config = config_of(data)
    config.dataset.classes = ("green",)
    record = evaluate.evaluate(config, tmp_path, "validation", finished)
    loaded = load(finished)
    from input_pipeline import get_dataset

    config.model = loaded.config.model
    total = 0.0
    for batch in get_dataset(config, "validation"):
        logits = np.asarray(loaded.model(batch["video"])[0], np.float64)[:, CLASSES.index("green")]
        label = batch["label"][:, 0]
        total += ((np.logaddexp(0, logits) - logits * label) * batch["mask"]).sum()
    assert record["loss"] == pytest.approx(total / 5, rel=1e-5)


def test_views_are_averaged_without_overflow():
    logits = jnp.array([[[200.0, -200.0], [150.0, -90.0]]])
    assert np.isfinite(steps._average(logits, True)).all()
    assert np.isfinite(steps._average(logits, False)).all()
    small = jnp.array([[[0.5, -1.0], [2.0, 0.3]]])
    mean = np.asarray(jnp.mean(1 / (1 + jnp.exp(-small)), axis=1))
    np.testing.assert_allclose(1 / (1 + np.exp(-steps._average(small, True))), mean, rtol=1e-5)


def test_another_loss_is_refused(finished, data, tmp_path):
    config = config_of(data)
    config.loss.name = "cross_entropy"
    message = "has several labels per clip: set it to 'binary_cross_entropy'"
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="have several labels each"):
        evaluate.evaluate(config, tmp_path, "validation", finished)


def test_another_number_of_classes_is_refused(data, tmp_path):
    config = config_of(data)
    config.dataset.classes = ()
    config.model.num_classes = 4
    with pytest.raises(ValueError, match=r"has 3 classes, but config.model.num_classes=4"):
        train.train_and_evaluate(config, tmp_path / "run")
