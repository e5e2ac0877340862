"""The contact sheet shows the right clip's frames in the right place."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline import jester
from scripts.contact_sheet import CAPTION_WIDTH, draw_sheet, main
from tests.jester_folder import CLASSES, labelled, make_set, reference_frame


def test_first_clip_of_each_class(tmp_path):
    make_set(tmp_path, {"train": labelled(1, 5)}, num_frames=5)
    sheet = draw_sheet(jester.read_split(tmp_path, "train", CLASSES), num_frames=3, side=16)
    assert isinstance(sheet, Image.Image)
    assert sheet.size == (CAPTION_WIDTH + 3 * 16, 3 * 16)
    # Class 1 ("Swiping Right") is first shown by id 1; its third column is frame 5.
    shown = np.asarray(sheet)[16:32, CAPTION_WIDTH + 32 :]
    expected = reference_frame(tmp_path / "20bn-jester-v1" / "1" / "00005.jpg", 16)
    np.testing.assert_array_equal(shown, expected)


def test_data_in_the_home_folder(tmp_path, monkeypatch, capsys):
    make_set(tmp_path / "data", {"train": labelled(1, 5)}, num_frames=5)
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["--config=configs/jester.py", "--config.dataset.data_dir=~/data", "--split=train"]
    classes = f"--config.dataset.classes={CLASSES}"
    sheet = tmp_path / "sheet.png"
    assert main(["contact_sheet", *command, classes, f"--output={sheet}"]) == 0
    assert capsys.readouterr().out == f"{sheet}\n"
    assert sheet.exists()


@pytest.mark.parametrize("name", ["sheet.psd", "sheet"])  # Pillow reads .psd and writes none
def test_a_picture_that_cannot_be_written(tmp_path, capsys, name):
    command = ["contact_sheet", "--config=configs/jester.py", f"--output={tmp_path / name}"]
    assert main(command) == 2
    assert "its ending is no picture's; take .jpg or .png" in capsys.readouterr().err
