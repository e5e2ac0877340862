"""Finding clips: layouts, CSV files, and messages that name what is wrong."""

import shutil

import pytest

from input_pipeline import jester
from tests.jester_folder import CLASSES, labelled, make_clip, make_set


@pytest.mark.parametrize(
    ("frames", "labels"),
    [
        ("20bn-jester-v1", "annotations"),
        ("20bn-jester-v1", "20bn-jester-v1/annotations"),
        ("video", "label"),
        ("20bn-jester-v1", "."),
        (".", "."),
        (".", "annotations"),
    ],
)
@pytest.mark.parametrize("csv_name", ["jester-v1-{}.csv", "jester-v1-{}-quick-testing.csv"])
def test_layouts(tmp_path, frames, labels, csv_name):
    make_set(
        tmp_path,
        {"train": labelled(1, 3), "validation": labelled(4, 5)},
        frames=frames,
        labels=labels,
        csv_name=csv_name,
    )
    train = jester.read_split(tmp_path, "train", CLASSES)
    assert train.ids == ("1", "2", "3")
    assert train.labels.tolist() == [1, 2, 0]
    assert len(jester.frame_files(f"{train.frames_dir}/2")) == 2
    assert jester.read_split(tmp_path, "validation", CLASSES).ids == ("4", "5")


def test_clips_are_looked_up_by_id_not_by_place(tmp_path):
    make_set(tmp_path, {"train": ["30;Thumb Up", "4;Swiping Left"]})
    for other in ("1", "100", "5"):
        make_clip(tmp_path / "20bn-jester-v1" / other, 1)
    split = jester.read_split(tmp_path, "train")
    assert split.ids == ("30", "4")
    assert split.class_names == jester.CLASS_NAMES
    assert split.labels.tolist() == [20, 0]


def test_the_full_csv_goes_before_the_short_one(tmp_path, caplog):
    make_set(tmp_path, {"train": labelled(1, 6)})
    make_set(tmp_path, {"train": labelled(1, 3)}, csv_name="jester-v1-{}-quick-testing.csv")
    with caplog.at_level("WARNING"):
        assert len(jester.read_split(tmp_path, "train", CLASSES).ids) == 6
    assert "reading jester-v1-train.csv, not jester-v1-train-quick-testing.csv" in caplog.text


def test_class_order_is_the_configs_and_other_classes_are_left_out(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 6), "validation": labelled(7, 9)})
    split = jester.read_split(tmp_path, "train", ("Thumb Up", "Swiping Left"))
    assert split.ids == ("2", "3", "5", "6")
    assert split.labels.tolist() == [0, 1, 0, 1]
    assert jester.read_split(tmp_path, "validation", ("Thumb Up", "Swiping Left")).ids == ("8", "9")


def test_the_labels_csv_makes_more_classes_known(tmp_path):
    make_set(tmp_path, {"train": ["1;Waving", "2;Bowing"]})
    (tmp_path / "annotations" / "jester-v1-labels.csv").write_text("Waving\nBowing\n")
    assert jester.read_split(tmp_path, "train", ("Bowing", "Waving")).labels.tolist() == [1, 0]
    assert jester.read_split(tmp_path, "train", ("Bowing",)).ids == ("2",)


def test_byte_order_mark_crlf_and_blank_lines_are_read_over(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 2)})
    csv_file = tmp_path / "annotations" / "jester-v1-train.csv"
    csv_file.write_bytes("\ufeff1;Thumb Up\r\n2; Swiping Left \r\n\r\n\r\n".encode())
    split = jester.read_split(tmp_path, "train")
    assert split.ids == ("1", "2")
    assert split.labels.tolist() == [20, 0]


def test_only_test_may_come_without_labels(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 3), "test": ["4", "5;"], "validation": ["4"]})
    split = jester.read_split(tmp_path, "test", CLASSES)
    assert split.ids == ("4", "5")
    assert split.labels is None
    with pytest.raises(ValueError, match=r"jester-v1-validation.csv:1: the clip '4' has no label"):
        jester.read_split(tmp_path, "validation", CLASSES)
    make_set(tmp_path, {"test": ["4;Thumb Up", "5;Swiping Left"]})
    assert jester.read_split(tmp_path, "test", CLASSES).labels.tolist() == [2, 0]
    make_set(tmp_path, {"test": ["4;Thumb Up", "5"]})
    with pytest.raises(ValueError, match=r"test.csv:2: the clip '5' has no label.*1 of 2 lines"):
        jester.read_split(tmp_path, "test", CLASSES)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["1;Thumb Up", "2,Thumb Up"], ":2: expected 'id;label', got '2,Thumb Up': .* semicolon"),
        (["1\tThumb Up"], ":1: expected 'id;label'.*semicolon"),
        (["1;Thumb Up;x"], ":1: expected 'id;label', got '1;Thumb Up;x'"),
        ([";Thumb Up"], ":1: expected 'id;label', got ';Thumb Up'"),
        (["1;Thump Up"], ":1: unknown label 'Thump Up'; did you mean 'Thumb Up'"),
        (["1;xyz"], ":1: unknown label 'xyz'; choose from Swiping Left, "),
        (["1;Thumb Up", "", "1;Thumb Up"], ":3: the id '1' stands in line 1 already"),
        (["1;Thumb Up", "2;Thumb Up", "1;Thumb Down"], ":3: the id '1' stands in line 1 already"),
        ([], "is empty; expected lines 'id;label'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, lines, expected):
    make_set(tmp_path, {"train": ["1;Thumb Up"]})
    csv_file = tmp_path / "annotations" / "jester-v1-train.csv"
    csv_file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=expected) as caught:
        jester.read_split(tmp_path, "train")
    assert str(csv_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_in_another_encoding_is_named(tmp_path):
    make_set(tmp_path, {"train": ["1;Thumb Up"]})
    csv_file = tmp_path / "annotations" / "jester-v1-train.csv"
    csv_file.write_bytes("1;Thumb Up\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"jester-v1-train.csv is no UTF-8 text"):
        jester.read_split(tmp_path, "train")


def test_missing_data_says_what_to_get(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*/none; expected 20BN-Jester"
    ) as caught:
        jester.read_split(tmp_path / "none", "train")
    for part in ("20bn-jester-v1/<id>/", "annotations/", "video/<id>/", "tar zx", "gestures.py"):
        assert part in str(caught.value)


def test_a_missing_csv_says_where_it_was_looked_for(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 3), "test": ["4"]})
    with pytest.raises(FileNotFoundError, match="no CSV of the split 'validation'") as caught:
        jester.read_split(tmp_path, "validation")
    for part in (
        "jester-v1-validation.csv or jester-v1-validation-quick-testing.csv",
        "annotations/, 20bn-jester-v1/annotations/, label/",
        "splits present: train, test",
    ):
        assert part in str(caught.value)


def test_ids_without_a_folder_are_named(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 12)})
    for clip_id in range(3, 12):
        shutil.rmtree(tmp_path / "20bn-jester-v1" / str(clip_id))
    with pytest.raises(
        FileNotFoundError, match=r"9 of the 12 clips .* 3, 4, 5, 6, 7, \.\.\. \(9 in all\)"
    ):
        jester.read_split(tmp_path, "train", CLASSES)
    shutil.rmtree(tmp_path / "20bn-jester-v1")
    with pytest.raises(FileNotFoundError, match=r"none of the 12 clips .* video/<id>/ and <id>/"):
        jester.read_split(tmp_path, "train", CLASSES)


def test_a_file_is_no_folder_of_a_clip(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 3)})
    shutil.rmtree(tmp_path / "20bn-jester-v1" / "3")
    (tmp_path / "20bn-jester-v1" / "3").write_text("")
    with pytest.raises(FileNotFoundError, match="1 of the 3 clips"):
        jester.read_split(tmp_path, "train", CLASSES)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("Thumb up",), "'Thumb up' is no class of this data; did you mean 'Thumb Up'"),
        (("Thumb Up", "Thumb Up"), "names 'Thumb Up' twice"),
        (("Thumb Up", "Stop Sign"), "has no clip of Stop Sign: take the class out"),
    ],
)
def test_wrong_classes_are_named(tmp_path, classes, expected):
    make_set(tmp_path, {"train": labelled(1, 3)})
    with pytest.raises(ValueError, match=expected):
        jester.read_split(tmp_path, "train", classes)


def test_a_split_without_any_class_wanted_is_an_error(tmp_path):
    make_set(tmp_path, {"validation": ["1;Thumb Up"]})
    with pytest.raises(ValueError, match=r"no clip of the classes wanted .Thumb Down, Stop Sign"):
        jester.read_split(tmp_path, "validation", ("Thumb Down", "Stop Sign"))


def test_frames_are_sorted_by_number_and_other_files_left_alone(tmp_path):
    for name in ("10.jpg", "00002.jpg", "9.JPG", "._00001.jpg", "00003.png", "Thumbs.db"):
        (tmp_path / name).write_text("")
    names = [path.rsplit("/", 1)[1] for path in jester.frame_files(str(tmp_path))]
    assert names == ["00002.jpg", "9.JPG", "10.jpg"]


def test_an_empty_or_missing_folder_of_frames_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no frame; expected 00001.jpg"):
        jester.frame_files(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"cannot list the frames in {tmp_path}/5: No such"):
        jester.frame_files(str(tmp_path / "5"))


def test_selected_clips_keep_their_labels_and_the_order_asked_for(tmp_path):
    make_set(tmp_path, {"validation": labelled(1, 6)})
    split = jester.read_split(tmp_path, "validation", CLASSES)
    chosen = split.select(("5", "2"))
    assert chosen.ids == ("5", "2")
    assert [CLASSES[label] for label in chosen.labels] == [CLASSES[5 % 3], CLASSES[2 % 3]]
    with pytest.raises(ValueError, match=r"no clip 7, 8; its 6 ids begin with 1, 2, 3"):
        split.select(("7", "5", "8"))
    with pytest.raises(ValueError, match="asked for twice"):
        split.select(("5", "5"))
