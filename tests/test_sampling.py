"""Which frames make a clip, and what happens to their pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import sampling, transforms
from tests.jester_folder import make_clip, reference_frame

COUNT = st.integers(1, 80)


@pytest.mark.parametrize(
    ("num_available", "num_frames", "stride", "expected"),
    [
        (40, 4, 1, [0, 1, 2, 3]),
        (4, 4, 1, [0, 1, 2, 3]),
        (3, 4, 1, [0, 1, 2]),
        (1, 4, 3, [0]),
        (9, 4, 2, [0, 2, 4, 6]),
        (7, 4, 2, [0, 2, 4, 6]),
        (6, 4, 2, [0, 2, 4]),
        (7, 4, 5, [0, 5]),
    ],
)
def test_head_indices_by_hand(num_available, num_frames, stride, expected):
    assert sampling.head_indices(num_available, num_frames, stride).tolist() == expected


@given(COUNT, COUNT, COUNT)
def test_head_indices_take_all_that_both_video_and_clip_allow(available, num_frames, stride):
    indices = sampling.head_indices(available, num_frames, stride)
    assert indices.tolist() == [stride * i for i in range(len(indices))]
    assert indices[-1] < available
    assert len(indices) == num_frames or stride * len(indices) >= available


@pytest.mark.parametrize("zero", ["num_available", "num_frames", "stride"])
def test_head_indices_refuse_zero(zero):
    arguments = {"num_available": 5, "num_frames": 5, "stride": 1, zero: 0}
    with pytest.raises(ValueError, match=f"{zero} is 0"):
        sampling.head_indices(**arguments)


def test_a_short_clip_repeats_its_last_frame():
    assert sampling.repeat_last(np.array([0, 1, 2]), 5).tolist() == [0, 1, 2, 2, 2]
    assert sampling.repeat_last(np.array([0, 2, 4]), 4).tolist() == [0, 2, 4, 4]
    assert sampling.repeat_last(np.array([0, 1]), 2).tolist() == [0, 1]


@given(COUNT, st.integers(0, 2**31), st.text(max_size=8))
def test_shuffled_is_a_permutation_that_the_seed_and_the_id_decide(count, seed, clip_id):
    frames = np.arange(count)
    first, again = (
        sampling.order_frames(frames, "shuffled", seed=seed, clip_id=clip_id) for _ in range(2)
    )
    assert sorted(first) == frames.tolist()
    assert first.tolist() == again.tolist()


def test_shuffled_differs_between_clips_and_seeds():
    orders = {
        tuple(sampling.order_frames(np.arange(30), "shuffled", seed=seed, clip_id=clip_id))
        for seed in range(3)
        for clip_id in ("1", "2", "3")
    }
    assert len(orders) == 9


def test_single_draws_every_frame_about_as_often():
    drawn = [
        sampling.order_frames(np.arange(5), "single", seed=7, clip_id=str(i)) for i in range(2000)
    ]
    assert all(len(clip) == 5 and len(set(clip)) == 1 for clip in drawn)
    counts = np.bincount([clip[0] for clip in drawn], minlength=5)
    assert counts.min() > 330  # 400 expected, standard deviation 18
    assert counts.max() < 470


def test_forward_changes_nothing_and_other_orders_are_refused():
    frames = np.array([0, 2, 4])
    assert sampling.order_frames(frames, "forward", seed=0, clip_id="1") is frames
    with pytest.raises(ValueError, match="'backward'; choose one of: forward, shuffled, single"):
        sampling.order_frames(frames, "backward", seed=0, clip_id="1")


@pytest.mark.parametrize("image_size", [8, 14, 48])
@pytest.mark.parametrize("size", [(20, 14), (14, 14), (150, 100)])
def test_resize_frame_equals_the_reference_bit_for_bit(tmp_path, size, image_size):
    make_clip(tmp_path / "clip", 2, size=size)
    for path in (tmp_path / "clip").iterdir():
        frame = transforms.resize_frame(path, image_size)
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, reference_frame(path, image_size))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_resize_frame_converts_other_jpegs_as_the_reference_does(tmp_path, mode):
    path = tmp_path / "00001.jpg"
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (14, 20, bands), dtype=np.uint8)
    Image.merge(mode, [Image.fromarray(pixels[..., i]) for i in range(bands)]).save(path)
    np.testing.assert_array_equal(transforms.resize_frame(path, 8), reference_frame(path, 8))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"<html>404</html>", "cannot identify"),
    ],
)
def test_a_damaged_frame_is_named(tmp_path, damage, reason):
    make_clip(tmp_path / "7", 1, size=(150, 100))
    path = tmp_path / "7" / "00001.jpg"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot read the frame") as caught:
        transforms.resize_frame(path, 8)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "extract it again" in message
    assert message.count(str(path)) == 1


def test_channel_planes_by_hand():
    # T = 3 frames of one pixel: red 1, 2, 3; green 11, 12, 13; blue 21, 22, 23. The planes in a
    # row are all the reds, the greens, the blues; each "frame" takes the next three.
    video = np.array([[1, 11, 21], [2, 12, 22], [3, 13, 23]], np.uint8).reshape(3, 1, 1, 3)
    packed = transforms.pack_channel_planes(video)
    assert packed.reshape(3, 3).tolist() == [[1, 2, 3], [11, 12, 13], [21, 22, 23]]
    # T = 2: the second "frame" begins in the middle of the greens.
    packed = transforms.pack_channel_planes(video[:2])
    assert packed.reshape(2, 3).tolist() == [[1, 2, 11], [12, 21, 22]]


def test_channel_planes_equal_the_references_view():
    video = np.random.default_rng(0).integers(0, 256, (36, 4, 5, 3), dtype=np.uint8)
    held = np.ascontiguousarray(np.moveaxis(video, 3, 0))  # [3, T, H, W], as the reference's
    viewed = held.reshape(-1, 3, 4, 5)  # .view(-1, 3, H, W)
    packed = transforms.pack_channel_planes(video)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(np.moveaxis(packed, 3, 1), viewed)
    # So "frame" 5 of 36 is the red planes of frames 15, 16 and 17.
    np.testing.assert_array_equal(packed[5], np.moveaxis(video[15:18, ..., 0], 0, -1))
