"""Weights on a known hand give known figures; a model's come out for the right frames."""

import contextlib
import json

import numpy as np
import pytest

from input_pipeline import gestures, get_dataset, hand
from input_pipeline.transforms import decode_image
from rvit_jax import visualize
from scripts import attention_on_hand
from tests.small import saved_model, small_config

CLASSES = ("Swiping Left", "Swiping Right", "Thumb Up")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gestures")
    draw(folder)
    return folder


def draw(folder):
    counts = {"train": 0, "validation": 0, "test": 6}
    gestures.generate(folder, classes=CLASSES, **counts, seed=3, num_workers=1, progress=False)


def small(data_dir):
    config = small_config(num_classes=3)
    config.dataset.name, config.dataset.data_dir = "gestures", str(data_dir)
    config.dataset.update(classes=CLASSES, num_frames=6, frame_stride=4, short_clips="ragged")
    config.dataset.generate.update(train=0, validation=0, test=6, seed=3)
    return config


def test_a_mask_is_where_the_hand_changes_the_picture(data_dir, monkeypatch):
    """The same clip with arm and hand in the colours' opposites differs there alone."""
    ids = ("1", "4", "6")
    masks = dict(gestures.hand_masks(data_dir, ids))
    assert set(masks) == set(ids)
    arm_and_hand = hand._arm_and_hand

    def inverted(*arguments):
        return [(outline, 255 - np.clip(c, 0, 255)) for outline, c in arm_and_hand(*arguments)]

    monkeypatch.setattr(hand, "_arm_and_hand", inverted)
    other = data_dir.parent / "inverted"
    draw(other)
    seen = 0
    for clip_id, mask in masks.items():
        folders = (root / "20bn-jester-v1" / clip_id for root in (data_dir, other))
        files = [sorted(folder.iterdir()) for folder in folders]
        assert len(files[0]) == len(files[1]) == len(mask)
        for one, two, where in zip(*files, mask, strict=True):
            pixels = [decode_image(file).astype(int) for file in (one, two)]
            differ = np.abs(pixels[0] - pixels[1]).max(-1) > 40
            # Blurred edges and mid-grey parts, which are their own opposites, may be either.
            assert (differ & ~where).mean() < 0.02
            assert (where & ~differ).sum() <= 0.35 * where.sum() + 60
            seen += where.mean() > 0.05
    assert seen > 20


def test_unknown_clips_are_refused(data_dir):
    with pytest.raises(KeyError, match="has no clip '99'"):
        list(gestures.hand_masks(data_dir, {"1", "99"}))


def test_covered():
    mask = np.zeros((1, 4, 6), bool)
    mask[0, :2, :3] = True  # the first of four patches
    mask[0, 2, 3:] = True  # half of the last
    np.testing.assert_allclose(attention_on_hand.covered(mask, 4), [[1, 0, 0, 0.5]])


def test_weights_of():
    rng = np.random.default_rng(0)
    maps = rng.uniform(size=(5, 2, 3, 10)).astype(np.float32)  # [T, L, A, S]
    gradient = rng.normal(size=maps.shape)
    look = visualize.Look(rng.normal(size=(5, 4)), maps, maps[:, ::-1], maps[:, 0, 0], gradient)
    ways = attention_on_hand.weights_of(look, "softmax")
    assert len(ways) == 2 * 2 + 2 + 2 * 3
    np.testing.assert_allclose(ways["layer 1, class token"], maps[:, 1].mean(1)[:, 1:])
    np.testing.assert_allclose(ways["layer 0, state's token"], maps[:, 1].mean(1)[:, 1:])
    np.testing.assert_allclose(ways["layer 1, head 2"], maps[:, 1, 2, 1:])
    spoken = gradient.sum((1, 2))[:, 1:]
    np.testing.assert_allclose(ways["gradient x attention"], np.where(spoken > 0, spoken, 0))


def test_weights_on_the_hand_and_blind_ones(data_dir, tmp_path, monkeypatch):
    """Weights that are the hand's own shares reach the most; even ones give 1."""
    config = small(data_dir)
    loaded = attention_on_hand.checkpoint.load(
        saved_model(tmp_path / "model", patch_size=4, num_classes=3)
    )
    masks = dict(gestures.hand_masks(data_dir, {str(number) for number in range(1, 7)}))
    at = {}  # frames of a clip -> the clip and where in its file they stand
    dataset = get_dataset(config, "test", training=False, with_frame_indices=True)
    with contextlib.closing(dataset) as clips:
        for batch in clips:
            for row in range(len(batch["id"])):
                if batch["mask"][row]:
                    frames = batch["frame_indices"][row, : batch["num_frames"][row]]
                    at[str(batch["id"][row])] = frames
    order = iter(at)

    def weights_of(look, kind):
        clip_id = next(order)
        area = attention_on_hand.covered(masks[clip_id][at[clip_id]], 16)
        return {"the hand": area, "blind, head 0": np.ones_like(area)}

    monkeypatch.setattr(attention_on_hand, "weights_of", weights_of)
    summary = attention_on_hand.measure(config, loaded, "test", 6)
    the_hand, blind = summary["ways"]
    assert blind["lift"] == pytest.approx(1.0)
    assert the_hand["lift"] > 2
    assert the_hand["brightest_on_hand"] == 1.0
    assert 0 < summary["chance"] < 0.6
    assert 0.02 < summary["area"] < 0.3


def test_the_command(data_dir, tmp_path, capsys, monkeypatch):
    model = saved_model(tmp_path / "model", num_classes=3)
    arguments = [
        "x",
        "--config=configs/gestures.py",
        f"--checkpoint={model}",
        f"--config.dataset.data_dir={data_dir}",
        f"--config.dataset.classes={CLASSES}",
        "--config.dataset.generate.train=0",
        "--config.dataset.generate.validation=0",
        "--config.dataset.generate.test=6",
        "--config.dataset.generate.seed=3",
        "--config.model.num_classes=3",
    ]
    output = tmp_path / "table.json"
    assert attention_on_hand.main([*arguments, "--clips=6", f"--output={output}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 clips; ")
    assert lines[-1].startswith("best: layer ")
    assert len(json.loads(output.read_text())["ways"]) > 6
    assert attention_on_hand.main([*arguments, "--clips=7"]) == 1
    assert "the split test has 6" in capsys.readouterr().err
