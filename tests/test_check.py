"""What is wrong with a data set is found and named, each kind of it."""

import json
import shutil

import pytest

from input_pipeline import check
from input_pipeline.jester_dataset_builder import prepare
from tests.jester_folder import make_clip, make_set
from tests.test_video import write_film

CLIPS = [f"{number};Thumb Up" for number in range(1, 7)]


@pytest.fixture
def root(tmp_path):
    return make_set(
        tmp_path,
        {"train": CLIPS, "validation": ["11;Thumb Up", "12;Stop Sign"], "test": ["21", "22"]},
        num_frames=4,
    )


def frame(root, clip_id, number):
    return root / "20bn-jester-v1" / str(clip_id) / f"{number:05}.jpg"


def run(root, capsys, *arguments):
    argv = ["check", "--config=configs/jester.py", f"--config.dataset.data_dir={root}", *arguments]
    status = check.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def add_lines(root, split, *lines):
    file = root / "annotations" / f"jester-v1-{split}.csv"
    file.write_text(file.read_text() + "".join(f"{line}\n" for line in lines))


def test_nothing_is_wrong(root, capsys):
    status, out, _ = run(root, capsys)
    assert status == 0
    assert "train: 6 clips, 24 frames read" in out
    assert "nothing is wrong" in out


def test_every_kind_is_found_in_one_pass(root, capsys, tmp_path):
    add_lines(root, "train", "3;Thumb Up", "7,Thumb Up", "8;Thumb up", "9")
    for clip_id in (8, 9):
        make_clip(root / "20bn-jester-v1" / str(clip_id), 2)
    shutil.rmtree(root / "20bn-jester-v1" / "1")
    for file in (root / "20bn-jester-v1" / "2").iterdir():
        file.unlink()
    frame(root, 4, 3).unlink()
    frame(root, 5, 1).unlink()
    frame(root, 6, 2).write_bytes(frame(root, 6, 2).read_bytes()[:300])
    add_lines(root, "validation", "3;Thumb Up")  # in train too
    shutil.rmtree(root / "20bn-jester-v1" / "12")
    shutil.copytree(root / "20bn-jester-v1" / "3", root / "20bn-jester-v1" / "12")
    frame(root, 21, 1).write_bytes(b"")

    status, out, _ = run(root, capsys, f"--output={tmp_path / 'found.json'}")
    assert status == 1
    for message in (
        "train.csv:7: the id '3' stands in line 3 already",
        "train.csv:8: expected 'id;label', got '7,Thumb Up'",
        "train.csv:9: unknown label 'Thumb up'",
        "train.csv:10: the clip '9' has no label",
        "train.csv:1: the clip 1 has no folder",
        "20bn-jester-v1/2 holds no frame",
        "20bn-jester-v1/4 lacks 1 frames: 3",
        "20bn-jester-v1/5 begins with frame 2",
        "6/00002.jpg",
        "the clip 3 is in train too",
        "the clip 12 holds the same as clip 3 of train",
        "21/00001.jpg: the file is empty",
    ):
        assert message in out, message
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["problems"]) == 12
    assert {p["kind"] for p in found["problems"]} == {
        *("list", "no frames", "numbers", "damaged", "overlap")
    }
    assert out.strip().splitlines()[-1].startswith("12 problems: 2 x damaged, 5 x list")


def test_two_files_of_one_number(root, capsys):
    shutil.copy(frame(root, 2, 1), root / "20bn-jester-v1" / "2" / "1.jpg")
    status, out, _ = run(root, capsys)
    assert status == 1
    assert "two files have the number 1" in out


def test_one_split(root, capsys):
    frame(root, 11, 2).write_bytes(b"")
    assert run(root, capsys, "--splits=train,test")[0] == 0
    assert run(root, capsys, "--splits=validation")[0] == 1


def test_long_lists_are_cut_on_the_terminal(root, capsys):
    add_lines(root, "train", *["bad, line"] * 30)
    status, out, _ = run(root, capsys)
    assert status == 1
    assert out.count("expected 'id;label'") == check.MOST_LINES
    assert "--output=FILE has them all" in out
    assert "30 x list" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits=val"], "choose from train, validation, test"),
        (["--splits="], "--splits is empty: say some of train,validation,test"),
        (["--config.dataset.nmae=x"], "nmae"),
        (["extra"], "is no flag"),
    ],
)
def test_wrong_arguments_are_one_line(root, capsys, arguments, message):
    status, _, err = run(root, capsys, *arguments)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_no_data(tmp_path, capsys):
    status, _, err = run(tmp_path / "nowhere", capsys)
    assert status == 1
    assert "there is no folder" in err
    assert len(err.strip().splitlines()) == 1


def test_shards_are_read_too(root, capsys, tmp_path):
    prepare(root, tmp_path / "tfds")
    name = "--config.dataset.name=jester_tfds"
    status, out, _ = run(tmp_path / "tfds", capsys, name)
    assert (status, "train: 6 clips, 24 frames read" in out) == (0, True)
    frame(root, 2, 1).write_bytes(b"no image")  # bytes are stored as they are
    prepare(root, tmp_path / "again")
    status, out, _ = run(tmp_path / "again", capsys, name)
    assert status == 1
    assert "1 problems: 1 x damaged" in out


def test_missing_videos_are_listed(tmp_path, capsys):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(f"{split}_1.mp4,a\n{split}_2.mp4,b\n")
        write_film(tmp_path / f"{split}_1.mp4", 70)
    write_film(tmp_path / "train_2.mp4", 3)
    status, out, err = run(tmp_path, capsys, "--config.dataset.name=video_list")
    assert status == 1
    assert "validation: the video of validation_2.mp4 is missing" in out
    assert "train: 2 clips, 73 frames read" in out
    assert "validation_1.mp4 holds the same as clip train_1.mp4 of train" in out
    assert "test: not there" in err


def test_films_of_one_name_in_two_splits_are_two_clips(tmp_path, capsys):
    for index, (split, name) in enumerate(
        (split, name) for split in ("train", "validation") for name in "ab"
    ):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        write_film(folder / "1.mp4", 3 + index)
    arguments = ("--config.dataset.name=video_folder", "--splits=train,validation")
    status, out, _ = run(tmp_path, capsys, *arguments)
    assert (status, "nothing is wrong" in out) == (0, True)
    shutil.copy(tmp_path / "train/a/1.mp4", tmp_path / "validation/a/1.mp4")
    status, out, _ = run(tmp_path, capsys, *arguments)
    assert status == 1
    assert "the clip a/1.mp4 holds the same as clip a/1.mp4 of train" in out
    assert "1 problems: 1 x overlap" in out
