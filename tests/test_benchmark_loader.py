"""The loader's benchmark: the reference's work by hand, fair turns, and what is refused."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from configs.base import get_config
from scripts import benchmark  # puts its own parts on the path
from tests.jester_folder import labelled, make_set

import benchmark_loader  # isort: skip
import benchmark_report as report  # isort: skip
from benchmark_contenders import Settings  # isort: skip
from benchmark_loader import OURS, OURS_FAST, THEIRS, THEIRS_UINT8  # isort: skip


@pytest.fixture
def config(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 6)}, num_frames=3)
    config = get_config()
    config.model.image_size, config.batch_size = 8, 2
    config.dataset.update(data_dir=str(tmp_path), num_frames=5)
    return config


def test_a_clip_is_the_references(config, tmp_path):
    clip, label = benchmark_loader.ReferenceClips(config)[1]
    assert (clip.shape, clip.dtype, label) == ((3, 5, 8, 8), torch.float32, 20)  # 2 is a Thumb Up
    folder = tmp_path / "20bn-jester-v1" / "2"
    for t, number in enumerate((1, 2, 3, 3, 3)):
        image = Image.open(folder / f"{number:05d}.jpg").convert("RGB").resize((8, 8))
        expected = (np.asarray(image).astype(np.float64) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(clip[:, t].permute(1, 2, 0), expected, atol=1e-6)


def test_batches_shuffle_each_epoch_and_drop_the_partial_one():
    batches = iter(benchmark_loader.EndlessBatches(7, 3, seed=0))
    epochs = [[next(batches), next(batches)] for _ in range(5)]
    for first, second in epochs:
        assert len({*first, *second}) == 6
    assert len({str(epoch) for epoch in epochs}) == 5


def test_pixels_are_compared(config, monkeypatch):
    differences = benchmark_loader.pixel_differences(config)
    for name in (THEIRS, THEIRS_UINT8, OURS):
        assert differences[name] == {"max_pixel_difference": 0.0, "mean_pixel_difference": 0.0}
    assert 0 < differences[OURS_FAST]["mean_pixel_difference"] < 20
    decode = benchmark_loader.ReferenceClips._frame
    monkeypatch.setattr(
        benchmark_loader.ReferenceClips, "_frame", lambda self, path: decode(self, path).flip(0)
    )
    with pytest.raises(ValueError, match="pixels of PyTorch DataLoader are not those of rvit_jax"):
        benchmark_loader.pixel_differences(config)


def test_each_turn_begins_with_a_pause(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    reader = benchmark_loader.Reader(lambda: range(100), 3)
    reader()
    reader.begin(0.5)
    pauses.clear()
    assert [reader() for _ in range(7)] == list(range(1, 8))
    assert pauses == [0.5, 0.5, 0.5]


def test_made_up_clips_are_of_jesters_kind(tmp_path):
    mean = benchmark_loader.write_clips(tmp_path, 3, 2)
    assert 3_000 < mean < 6_000
    for number, width in (("1", 132), ("2", 150), ("3", 176)):
        files = sorted((tmp_path / "20bn-jester-v1" / number).iterdir())
        assert [Image.open(file).size for file in files] == [(width, 100)] * 2


def test_the_table_tells_rates_and_pixels():
    figures = {"median_s": 0.1, "quartile_1_s": 0.1, "quartile_3_s": 0.1, "clips_per_s": 40.0}
    pixels = {"max_pixel_difference": 14.0, "mean_pixel_difference": 0.456}
    row = {
        "batch_size": 4,
        "num_workers": 2,
        "contenders": {OURS: {**figures, **pixels}},
        "speedups": {},
        "failed": {},
    }
    (table,) = report.TABLES["loader"]([row])
    assert table.splitlines()[0].split("|")[1].strip() == "batch of 4, 2 workers"
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[-3:-1]] == [
        "40.0",
        "0.46 (14)",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("one_torch_thread")
def test_the_whole_section(monkeypatch):
    monkeypatch.setattr(benchmark_loader, "num_cpus", lambda: 1)
    config = get_config()
    config.model.image_size, config.dataset.num_frames = 8, 2
    (row,) = benchmark.SECTIONS["loader"](config, Settings(rounds=2, quick=True))
    assert row["num_workers"] == 1
    assert [figures["rounds"] for figures in row["contenders"].values()] == [2] * 5
    assert all(figures["clips_per_s"] > 0 for figures in row["contenders"].values())
    assert set(row["speedups"]) == {OURS, OURS_FAST, benchmark_loader.OURS_THREADS}
