"""Frames are decoded to Pillow's pixels; `dataset.decoder` "fast" resizes them nearly the same."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import transforms
from input_pipeline.jester_dataset_builder import prepare
from rvit_jax.evaluate import use_checkpoint_config
from tests.jester_folder import labelled, make_clip, make_set
from tests.small import small_config
from tests.test_loader import assert_equal_batches, make_config, open_split, take
from tests.test_video_files import write_video

FAST = {"dataset.decoder": "fast"}
STANDARD = Image.Resampling.BICUBIC  # Pillow's


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def soft(height, width, seed=0):
    """Shapes without edges, as a compressed video's frame has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), STANDARD))


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
@pytest.mark.parametrize("grey", [False, True])
def test_the_decoded_pixels_are_pillows(tmp_path, options, grey):
    noise = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    data = jpeg(noise[..., 0] if grey else noise, **options)
    path = tmp_path / "1.jpg"
    path.write_bytes(data)
    expected = np.asarray(Image.open(path).convert("RGB"))
    for file in (path, str(path), io.BytesIO(data)):
        frame = transforms.decode_image(file)
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, expected)


def test_a_picture_is_not_turned_by_its_exif_data():
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(soft(20, 30)).save(data, "JPEG", exif=exif)
    assert transforms.decode_image(data).shape == (20, 30, 3)


def test_what_opencv_cannot_read_goes_to_pillow():
    pixels = soft(20, 30)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "GIF")
    expected = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(transforms.decode_image(file), expected)


def noise(height=37, width=53, colours=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, colours), np.uint8)


def as_png():
    file = io.BytesIO()
    random = np.random.default_rng(1).integers(0, 65536, (9, 9), np.uint16)
    Image.fromarray(random).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "components"),
    [
        (jpeg(noise()), 3),
        (jpeg(noise()[..., 0]), 1),
        (jpeg(noise(), progressive=True, comment=b"c" * 60000), 3),
        (b"\xff\xd8\xff\xff" + jpeg(noise())[2:], 3),  # filling between segments
    ],
)
def test_grey_and_colour_jpegs_are_opencvs(monkeypatch, data, components):
    assert transforms._decode_alike()  # as pip's builds are
    monkeypatch.setattr(transforms, "_decode_with_pillow", pytest.fail)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert transforms._num_components(data) == components
    np.testing.assert_array_equal(transforms.decode_image(io.BytesIO(data)), expected)


@pytest.mark.parametrize(
    "data",
    [
        as_png(),
        b"GIF89a",
    ],
)
def test_other_kinds_are_left_to_pillow(data):
    assert transforms._num_components(data) == 0


def test_four_inks_are_left_to_pillow():
    file = io.BytesIO()
    Image.fromarray(noise(colours=4), "CMYK").save(file, "JPEG")
    assert transforms._num_components(file.getvalue()) == 4
    expected = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(transforms.decode_image(file), expected)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_header_is_read_past_its_end(data, end):
    assert transforms._num_components(b"\xff\xd8" + data) in range(256)
    assert transforms._num_components(jpeg(soft(8, 8))[:end]) in (0, 3)


def test_where_opencv_decodes_otherwise_pillow_does(monkeypatch):
    """As a build with another JPEG library may."""
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: decode(*args) ^ 1)
    transforms._decode_alike.cache_clear()
    try:
        data = jpeg(noise())
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(transforms.decode_image(io.BytesIO(data)), expected)
        assert not transforms._decode_alike()
    finally:
        transforms._decode_alike.cache_clear()


@settings(max_examples=60)
@given(st.integers(2, 3000))
def test_a_file_cut_short_is_refused_in_pillows_words(end):
    data = jpeg(soft(100, 176))
    cut = data[: end % len(data)]
    with pytest.raises((OSError, SyntaxError)) as theirs:
        Image.open(io.BytesIO(cut)).load()
    with pytest.raises(ValueError, match=r"cannot read the frame it: .* extract it") as ours:
        transforms.decode_image(io.BytesIO(cut), "it")
    said = str(theirs.value).split(" <")[0]
    assert said in str(ours.value) or not cut


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the frame .*1\.jpg: No such file"):
        transforms.decode_image(tmp_path / "1.jpg")


@pytest.mark.parametrize("size", [(100, 132), (100, 176), (240, 320), (60, 500), (112, 112)])
@pytest.mark.parametrize("how", transforms.RESIZES)
def test_resized_frames_are_nearly_pillows(size, how):
    frame = soft(*size)
    standard, fast = (
        transforms.resize_array(frame, 112, how, 0.3, decoder=decoder).astype(int)
        for decoder in transforms.DECODERS
    )
    assert fast.shape == standard.shape == (112, 112, 3)
    assert np.abs(fast - standard).mean() < 0.7
    assert np.abs(fast - standard).max() <= 12


def test_a_great_shrink_leaves_no_pixel_out():
    """Of a board of single black and white pixels each square of the result sees as many."""
    board = np.repeat(np.indices((96, 96)).sum(0)[..., None] % 2 * 255, 3, -1).astype(np.uint8)
    small = transforms.resize_array(board, 16, decoder="fast")
    assert np.abs(small.astype(int) - 127).max() <= 1
    grown = transforms.resize_array(board[:8], 16, decoder="fast")  # wide and low
    assert np.abs(grown.astype(int) - 127).max() <= 1


def test_folders_and_records_are_read_alike(tmp_path):
    root = make_set(tmp_path / "data", {"train": labelled(1, 5)}, num_frames=2)
    prepare(root, tmp_path / "tfds")
    folders = take(open_split(root, **FAST), 3)
    shards = take(open_split(tmp_path / "tfds", **FAST, **{"dataset.name": "jester_tfds"}), 3)
    assert_equal_batches(shards, folders)
    standard = take(open_split(root), 3)
    assert not np.array_equal(standard[0]["video"], folders[0]["video"])
    chosen = int(np.flatnonzero(folders[0]["mask"])[0])
    path = root / "20bn-jester-v1" / folders[0]["id"][chosen] / "00001.jpg"
    decoded = cv2.imread(str(path))[..., ::-1]
    expected = cv2.resize(decoded, (8, 8), interpolation=cv2.INTER_LINEAR_EXACT)
    if max(decoded.shape[0] / 8, decoded.shape[1] / 8) >= 2:  # 20 x 14: the area's mean first
        expected = cv2.resize(decoded, (8, 8), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(folders[0]["video"][chosen, 0], expected)


def test_video_files_are_resized_so_too(tmp_path):
    write_video(tmp_path / "train" / "one" / "1.avi", 3, "mpeg4")
    keys = {"dataset.name": "video_folder", "dataset.classes": ()}
    (standard,), (fast,) = (take(open_split(tmp_path, **keys, **k), 1) for k in ({}, FAST))
    difference = np.abs(standard["video"].astype(int) - fast["video"]).mean()
    assert 0 < difference < 8


def test_an_unknown_decoder_is_named(tmp_path):
    make_clip(tmp_path / "1", 1)
    with pytest.raises(ValueError, match=r"decoder is 'quick'; choose one of: pillow, fast"):
        open_split(tmp_path, **{"dataset.decoder": "quick"})


def test_a_trained_model_keeps_the_decoder_it_was_trained_with():
    trained = small_config()
    trained.dataset.decoder = "fast"
    config = make_config("data")
    assert use_checkpoint_config(config, trained, []).dataset.decoder == "fast"
    assert use_checkpoint_config(config, trained, ["dataset.decoder"]).dataset.decoder == "pillow"
