"""Which frames make a clip, and what happens to their pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import sampling, transforms
from input_pipeline.source import VideoInfo
from input_pipeline.video import Frame, RateSampler
from tests.jester_folder import make_clip, reference_frame

COUNT = st.integers(1, 80)


def choose(num_available, how, num_frames, *, rate=None, **keys):
    info = VideoInfo(num_available, rate)
    return sampling.choose_frames(info, how, num_frames, **keys).tolist()


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
def test_head_by_hand(num_available, num_frames, stride, expected):
    assert choose(num_available, "head", num_frames, stride=stride) == expected


@given(COUNT, COUNT, COUNT)
def test_head_takes_all_that_both_video_and_clip_allow(available, num_frames, stride):
    indices = choose(available, "head", num_frames, stride=stride)
    assert indices == [stride * i for i in range(len(indices))]
    assert indices[-1] < available
    assert len(indices) == num_frames or stride * len(indices) >= available


def test_a_rate_stretches_the_stride():
    # 25 frames a second of which 12 are wanted: the ones nearest to 0, 2.083, 4.167, ...
    assert choose(100, "head", 5, rate=25.0, frame_rate=12.0) == [0, 2, 4, 6, 8]
    assert choose(100, "head", 14, rate=25.0, frame_rate=12.0)[-2:] == [25, 27]
    assert choose(100, "head", 3, rate=24.0, frame_rate=12.0, stride=3) == [0, 6, 12]
    # A slower video: every frame once, none twice.
    assert choose(9, "head", 20, rate=6.0, frame_rate=12.0) == list(range(9))


@pytest.mark.parametrize(("rate", "stride"), [(25.0, 1), (30.0, 2), (12.0, 3), (59.94, 1)])
def test_head_takes_the_frames_that_streaming_takes(rate, stride):
    sampler = RateSampler(rate, 12.0, stride)
    frames = (Frame(image=None, index=i, time_s=i / rate) for i in range(200))
    streamed = [frame.index for frame in frames if sampler.take(frame)]
    assert choose(200, "head", 200, rate=rate, frame_rate=12.0, stride=stride) == streamed


def test_dense_by_hand():
    # 4 of 10 frames at stride 2 span 7: the beginning is 0 to 3.
    assert choose(10, "dense", 4, stride=2, place=0.0) == [0, 2, 4, 6]
    assert choose(10, "dense", 4, stride=2, place=1.0) == [3, 5, 7, 9]
    assert choose(11, "dense", 4, stride=2) == [2, 4, 6, 8]
    assert choose(5, "dense", 4, stride=2) == [0, 2, 4]  # too short: from its beginning


def test_parts_by_hand():
    assert choose(8, "uniform", 4) == [1, 3, 5, 7]
    assert choose(8, "uniform", 4, place=0.0) == [0, 2, 4, 6]
    assert choose(9, "uniform", 2) == [2, 6]
    assert choose(3, "uniform", 5) == [0, 1, 2]
    assert choose(8, "random", 4) == choose(8, "uniform", 4)  # without draws


@given(COUNT, COUNT, st.integers(1, 5), st.sampled_from(sampling.SAMPLINGS), st.integers(0, 99))
def test_frames_ascend_and_none_comes_twice(available, num_frames, stride, how, seed):
    for random in (None, np.random.default_rng(seed)):
        keys = {"stride": stride, "random": random}
        indices = choose(available, how, num_frames, **keys)
        assert 1 <= len(indices) <= num_frames
        assert indices == sorted(set(indices))
        assert 0 <= indices[0] <= indices[-1] < available


def test_random_reaches_every_frame_and_dense_every_beginning():
    random = np.random.default_rng(0)
    drawn = np.array([choose(8, "random", 4, random=random) for _ in range(200)])
    assert [sorted(set(column)) for column in drawn.T] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    starts = [choose(10, "dense", 4, random=random)[0] for _ in range(300)]
    assert set(starts) == set(range(7))


@pytest.mark.parametrize("zero", ["num_available", "num_frames", "stride"])
def test_zero_is_refused(zero):
    arguments = {"num_available": 5, "num_frames": 5, "stride": 1, zero: 0}
    with pytest.raises(ValueError, match="is 0; it counts from 1"):
        choose(arguments.pop("num_available"), "head", arguments.pop("num_frames"), **arguments)


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
def test_a_frame_equals_the_reference_bit_for_bit(tmp_path, size, image_size):
    make_clip(tmp_path / "clip", 2, size=size)
    for path in (tmp_path / "clip").iterdir():
        frame = transforms.resize_array(transforms.decode_image(path), image_size)
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, reference_frame(path, image_size))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_frame_converts_other_jpegs_as_the_reference_does(tmp_path, mode):
    path = tmp_path / "00001.jpg"
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (14, 20, bands), dtype=np.uint8)
    Image.merge(mode, [Image.fromarray(pixels[..., i]) for i in range(bands)]).save(path)
    frame = transforms.resize_array(transforms.decode_image(path), 8)
    np.testing.assert_array_equal(frame, reference_frame(path, 8))


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
        transforms.decode_image(path)
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


def test_the_short_side_keeps_the_shape():
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (30, 60, 3))
    whole = np.asarray(Image.fromarray(ramp).resize((40, 20)))
    for place, left in ((0.0, 0), (0.5, 10), (1.0, 20)):
        cut = transforms.resize_array(ramp, 20, "short_side", place)
        np.testing.assert_array_equal(cut, whole[:, left : left + 20])
    upright = transforms.resize_array(ramp.swapaxes(0, 1), 20, "short_side", 1.0)
    np.testing.assert_array_equal(upright, whole[:, 20:].swapaxes(0, 1))


def test_a_square_is_a_square_in_every_way():
    frame = np.random.default_rng(0).integers(0, 256, (33, 33, 3), dtype=np.uint8)
    squashed = transforms.resize_array(frame, 16)
    np.testing.assert_array_equal(transforms.resize_array(frame, 16, "short_side", 0.3), squashed)
