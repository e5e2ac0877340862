"""Generated gestures: what the files hold, what the motions mean, and going on after a stop."""

import collections
import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs.gestures import get_config as get_gestures_config
from input_pipeline import gestures, jester
from input_pipeline.hand import IMAGE_WIDTHS, draw_frames
from input_pipeline.jester import CLASS_NAMES, MIRRORED, REVERSED
from input_pipeline.sampling import choose_frames
from input_pipeline.source import VideoInfo

SMALL = {"train": 71, "validation": 27, "test": 4, "seed": 3}
TINY = {
    "classes": ("Pushing Hand Away", "Pulling Hand In", "Stop Sign"),
    "train": 7,
    "validation": 2,
    "test": 0,
    "progress": False,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("gestures") / "small"
    gestures.generate(output, **SMALL, num_workers=2, progress=False)
    return output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("gestures") / "tiny"
    gestures.generate(output, **TINY, num_workers=1)
    return output


def annotations(output: Path, split: str) -> dict[str, str]:
    lines = (output / f"annotations/jester-v1-{split}.csv").read_text().splitlines()
    return dict(line.split(";") for line in lines)


def clip_files(output: Path, clip: str) -> list[bytes]:
    return [p.read_bytes() for p in sorted((output / "20bn-jester-v1" / clip).iterdir())]


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


# ---- files ----


def test_the_layout_is_jesters(small):
    names = sorted(path.name for path in small.iterdir())
    assert names == ["20bn-jester-v1", "annotations", "gestures.json"]
    labels = (small / "annotations/jester-v1-labels.csv").read_text()
    assert labels == "".join(f"{name}\n" for name in CLASS_NAMES)
    clips = os.listdir(small / "20bn-jester-v1")
    assert sorted(map(int, clips)) == list(range(1, 71 + 27 + 4 + 1))
    annotated = []
    for split in ("train", "validation", "test"):
        annotated += annotations(small, split)
        read = jester.read_split(small, split)
        assert len(read.ids) == len(read.labels) == SMALL[split]
    assert sorted(annotated) == sorted(clips)


def test_counts_are_exact_and_classes_even(small):
    for split in ("train", "validation", "test"):
        clips = annotations(small, split)
        assert len(clips) == SMALL[split]
        counts = collections.Counter(clips.values())
        counts = [counts[name] for name in CLASS_NAMES]
        assert max(counts) - min(counts) <= 1


def test_classes_are_interleaved(small):
    labels = list(annotations(small, "train").values())
    assert len(set(labels[:18])) > 9


def test_frames_look_like_jesters(small):
    widths = set()
    for clip in annotations(small, "train"):
        names = sorted(os.listdir(small / "20bn-jester-v1" / clip))
        assert 28 <= len(names) <= 44
        assert names == [f"{i + 1:05d}.jpg" for i in range(len(names))]
        images = [cv2.imdecode(np.frombuffer(f, np.uint8), 1) for f in clip_files(small, clip)[::9]]
        assert {image.shape for image in images} == {(100, images[0].shape[1], 3)}
        widths.add(images[0].shape[1])
    assert widths <= set(IMAGE_WIDTHS)
    assert len(widths) > 2


def test_splits_share_no_frame(small):
    frames = [
        {frame for clip in annotations(small, split) for frame in clip_files(small, clip)}
        for split in ("train", "validation", "test")
    ]
    assert len(set.union(*frames)) == sum(map(len, frames))


def test_manifest(small):
    assert gestures.read_manifest(small) == {
        "version": gestures.VERSION,
        "seed": 3,
        "classes": list(CLASS_NAMES),
        "num_clips": {"train": 71, "validation": 27, "test": 4},
    }


def test_the_same_bytes_whatever_the_number_of_workers(tiny, tmp_path):
    gestures.generate(tmp_path, **TINY, num_workers=2)
    assert contents(tmp_path) == contents(tiny)


def test_another_seed_draws_other_clips(tiny, tmp_path):
    gestures.generate(tmp_path, **TINY, num_workers=1, seed=1)
    frames = [set(contents(output / "20bn-jester-v1").values()) for output in (tmp_path, tiny)]
    assert not frames[0] & frames[1]


# ---- classes that differ only in time ----


@pytest.mark.parametrize("name", [n for n in REVERSED if REVERSED[n] > n])
def test_opposites_share_every_frame(small, name):
    """No look at one frame can tell them apart: both classes hold the same files."""
    clips = annotations(small, "train")
    frames = {
        label: sorted(tuple(clip_files(small, clip)) for clip in clips if clips[clip] == label)
        for label in (name, REVERSED[name])
    }
    # 71 clips of 27 classes: 2 or 3 of each, of which an odd one may lack its opposite.
    backwards = {clip[::-1] for clip in frames[REVERSED[name]]}
    assert len(backwards & set(frames[name])) == min(map(len, frames.values()))


def test_opposites_share_the_frames_that_the_config_reads(small):
    """Also at every third frame: what is read forwards is what is read backwards."""
    dataset = get_gestures_config().dataset
    for clip in annotations(small, "train"):
        count = len(clip_files(small, clip))
        read = choose_frames(
            VideoInfo(count), "head", dataset.num_frames, stride=dataset.frame_stride
        ).tolist()
        assert read == [count - 1 - index for index in reversed(read)]


def test_a_class_without_its_opposite(tmp_path):
    gestures.generate(
        tmp_path, classes=("Swiping Up",), train=2, validation=1, test=0, progress=False
    )
    assert set(annotations(tmp_path, "train").values()) == {"Swiping Up"}


# ---- motions ----


def along_x(motion):
    seen = motion.place[motion.place[:, 1] < 0.95, 0]
    return seen[-1] - seen[0]


def along_y(motion):
    y = motion.place[:, 1]
    steps = np.diff(y)[(y[1:] < 0.9) & (y[:-1] < 0.9)]
    return np.median(steps)


def growth(motion):
    return motion.size[-1] - motion.size[0]


def clockwise(motion):
    return motion.turn[-1] - motion.turn[0]


def opening(motion):
    return (motion.extension.sum(-1) + motion.spread + motion.thumb)[[0, -1]] @ (-1, 1)


def rolling(motion):
    """Twice the area swept in the plane of height and nearness: up, then near, then down."""
    high = motion.place[:, 1] < 0.75
    up, near = -motion.place[high, 1], motion.size[high]
    up, near = up - up.mean(), near - near.mean()
    return np.sum(up[:-1] * near[1:] - up[1:] * near[:-1])


MEANING = {  # class -> what its motion is measured by, and the sign of that
    "Swiping Left": (along_x, -1),
    "Swiping Right": (along_x, 1),
    "Swiping Down": (along_y, 1),
    "Swiping Up": (along_y, -1),
    "Pushing Hand Away": (growth, 1),
    "Pulling Hand In": (growth, -1),
    "Sliding Two Fingers Left": (along_x, -1),
    "Sliding Two Fingers Right": (along_x, 1),
    "Sliding Two Fingers Down": (along_y, 1),
    "Sliding Two Fingers Up": (along_y, -1),
    "Pushing Two Fingers Away": (growth, 1),
    "Pulling Two Fingers In": (growth, -1),
    "Rolling Hand Forward": (rolling, 1),
    "Rolling Hand Backward": (rolling, -1),
    "Turning Hand Clockwise": (clockwise, 1),
    "Turning Hand Counterclockwise": (clockwise, -1),
    "Zooming In With Full Hand": (opening, 1),
    "Zooming Out With Full Hand": (opening, -1),
    "Zooming In With Two Fingers": (opening, 1),
    "Zooming Out With Two Fingers": (opening, -1),
}


@pytest.mark.parametrize("name", MEANING)
def test_motions_mean_their_class(name):
    for seed in range(40):
        motion = gestures.draw_motion(name, np.random.default_rng(seed))
        for seen, label in (
            (motion, name),
            (motion.mirrored(), MIRRORED[name]),
            (motion.reversed(), REVERSED[name]),
        ):
            measure, sign = MEANING[label]
            assert np.sign(measure(seen)) == sign, (seed, label)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_the_mirrored_class_has_the_mirrored_law(name):
    versions = gestures._VERSIONS[name]
    assert len(set(versions)) == len(versions) > 0
    mirrored = {(gesture, not mirror, backwards) for gesture, mirror, backwards in versions}
    assert mirrored == set(gestures._VERSIONS[MIRRORED[name]])


@pytest.mark.parametrize("name", REVERSED)
def test_the_reversed_class_has_the_reversed_law(name):
    backwards = {(gesture, mirror, not back) for gesture, mirror, back in gestures._VERSIONS[name]}
    assert backwards == set(gestures._VERSIONS[REVERSED[name]])


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_mirrored_and_reversed_undo_themselves(name):
    motion = gestures.draw_motion(name, np.random.default_rng(0))
    for again in (motion.mirrored().mirrored(), motion.reversed().reversed()):
        for field, value in vars(motion).items():
            np.testing.assert_array_equal(getattr(again, field), value)
    assert motion.mirrored().thumb_side == -motion.thumb_side
    np.testing.assert_array_equal(motion.reversed().place, motion.place[::-1])
    assert motion.extension.shape == (motion.num_frames, 5)
    assert np.all((motion.extension >= 0) & (motion.extension <= 1))
    assert np.all(motion.size > 0.04)


def difference_from_the_empty_room(name: str, seed: int):
    """Where the hand is seen: weights [T, height, width], and the pixels' x and y."""
    rng = np.random.default_rng(seed)
    frames = draw_frames(gestures.draw_motion(name, rng), rng)
    video = np.stack([cv2.imdecode(np.frombuffer(f, np.uint8), 1) for f in frames]).astype(float)
    weights = np.abs(video - np.median(video, axis=0)).mean(-1)
    weights = np.where(weights > 30, weights, 0)[12:-12]  # the middle of the gesture
    y, x = np.mgrid[: video.shape[1], : video.shape[2]]
    return weights, x, y


@pytest.mark.parametrize(
    ("name", "axis", "sign"),
    [
        ("Swiping Left", "x", -1),
        ("Swiping Right", "x", 1),
        ("Swiping Down", "y", 1),
        ("Swiping Up", "y", -1),
        ("Sliding Two Fingers Left", "x", -1),
    ],
)
def test_pixels_move_as_the_class_says(name, axis, sign):
    right = 0
    for seed in range(10):
        weights, x, y = difference_from_the_empty_room(name, seed)
        total = weights.sum((1, 2)) + 1
        centre = (weights * (x if axis == "x" else y)).sum((1, 2)) / total
        times = np.arange(len(centre))[total > 0.2 * total.max()]
        right += np.sign(np.polyfit(times, centre[times], 1)[0]) == sign
    assert right >= 8


# ---- going on, refusing, failing ----


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch, capsys):
    drawn = []

    def draw_twice_then_stop(motion, rng):
        drawn.append(motion)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_frames(motion, rng)

    command = [f"--output={tmp_path}", f"--classes={','.join(TINY['classes'])}", "--workers=1"]
    command += ["--train=7", "--validation=2", "--test=0"]
    with monkeypatch.context() as patch:
        patch.setattr(gestures, "draw_frames", draw_twice_then_stop)
        assert gestures.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "gestures.json").exists()
    with pytest.raises(ValueError, match=r"beginnings of other gestures: seed 0 \(wanted: 1\)"):
        gestures.generate(tmp_path, **TINY, seed=1)
    with pytest.raises(ValueError, match=r"7 train clips \(wanted: 6\)"):
        gestures.generate(tmp_path, **{**TINY, "train": 6})

    half_a_clip = tmp_path / "20bn-jester-v1/.9.tmp"
    half_a_clip.mkdir()
    (half_a_clip / "00001.jpg").write_bytes(b"")
    # One clip of a pair may be there without the other.
    present = [p for p in (tmp_path / "20bn-jester-v1").iterdir() if p != half_a_clip]
    for file in present[0].iterdir():
        file.unlink()
    present[0].rmdir()
    assert gestures.main(command) == 0
    assert "7 train, 2 validation, 0 test clips" in capsys.readouterr().out
    assert contents(tmp_path) == contents(tiny)


def test_a_finished_folder_is_left_as_it_is(tiny, monkeypatch):
    monkeypatch.setattr(gestures, "_write_missing", None)  # would fail
    before = contents(tiny)
    gestures.generate(tiny, **TINY)
    gestures.generate(tiny, **{**TINY, "classes": TINY["classes"][::-1], "train": 3})
    assert contents(tiny) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, r"seed 0 \(wanted: 5\)"),
        ({"classes": ("Stop Sign",)}, r"other gestures: with Pushing Hand Away, Pulling Hand In\."),
        ({"train": 8}, r"7 train clips \(wanted: 8\).*rm -r"),
    ],
)
def test_a_finished_folder_of_something_else_is_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        gestures.generate(tiny, **{**TINY, **change})


def test_another_version_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(gestures, "VERSION", gestures.VERSION + 1)
    with pytest.raises(ValueError, match="version"):
        gestures.generate(tiny, **TINY)


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' and is no folder of gestures"):
        gestures.generate(tmp_path, **TINY)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "gestures.json").write_text(text)
    with pytest.raises(ValueError, match=r"gestures\.json is damaged; delete the folder"):
        gestures.read_manifest(tmp_path)


def test_output_in_the_home_folder(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tiny.parent))
    monkeypatch.chdir(tmp_path)  # where a folder called ~ would be made
    classes = f"--classes={','.join(TINY['classes'])}"
    command = [f"--output=~/{tiny.name}", classes, "--train=7", "--validation=2", "--test=0"]
    assert gestures.main([*command, "--workers=1"]) == 0
    assert capsys.readouterr().out == f"{tiny}: 7 train, 2 validation, 0 test clips\n"
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert gestures.main([f"--output={output}"]) == 1
        error = capsys.readouterr().err
        assert "name" in error
        assert str(output) in error
        assert error.count("\n") == 1


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device; make room") as caught:
        gestures.generate(tmp_path, **TINY, num_workers=1)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_system_without_hard_links(tiny, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    gestures.generate(tmp_path, **TINY, num_workers=1)
    assert contents(tmp_path) == contents(tiny)


def die(videos, drawings):
    os._exit(3)


def test_a_dead_worker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gestures, "_write_drawings", die)
    monkeypatch.setattr(gestures, "_DRAWINGS_PER_TASK", 1)
    with pytest.raises(OSError, match="a drawing process died"):
        gestures.generate(tmp_path, **TINY, num_workers=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ("Swipe Left",)}, "'Swipe Left'; did you mean 'Swiping Left'"),
        ({"classes": ()}, "no gesture classes"),
        ({"train": -1}, "train must be 0 or more, not -1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"train": 0, "validation": 0}, "are all 0"),
        ({"num_workers": 0}, "num_workers must be 1 or more"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        gestures.generate(tmp_path / "new", **{**TINY, **arguments})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=Thumbs Up"], "did you mean 'Thumb Up'"),
        (["--train=many"], "expected a whole number"),
        (["--seed=-1"], "expected a whole number"),
        (["--workers=0"], "expected 1 or more"),
        (["--train=0", "--validation=0", "--test=0"], "all 0"),
    ],
)
def test_wrong_command_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        gestures.main([f"--output={tmp_path / 'new'}", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_time_classes_are_four_pairs_of_opposites():
    assert {REVERSED[name] for name in gestures.TIME_CLASSES} == set(gestures.TIME_CLASSES)
    assert all(REVERSED[name] != name for name in gestures.TIME_CLASSES)
    assert gestures._class_list("time") == list(gestures.TIME_CLASSES)
    assert json.loads(json.dumps(gestures.TIME_CLASSES)) == list(gestures.TIME_CLASSES)
