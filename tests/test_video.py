"""Frames from files, folders, pipes and live sources."""

import io
import itertools
import struct
import threading

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import video
from input_pipeline.video import Frame, RateSampler, open_video

RATE = 25


def write_film(path, num_frames=20, *, codec="libx264", size=(64, 48), audio=False):
    """A film whose frames get brighter: frame t has the grey level 10 t."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(num_frames):
            image = np.full((height, width, 3), 10 * t % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_images(folder, sizes, suffix=".png"):
    folder.mkdir()
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index + 1}{suffix}")
    return folder


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_a_file_gives_all_frames_in_order_with_their_times(tmp_path, ending):
    codec = "mpeg4" if ending == "avi" else "libx264"
    with open_video(str(write_film(tmp_path / f"a.{ending}", codec=codec))) as film:
        frames = list(film)
    assert [frame.index for frame in frames] == list(range(20))
    assert [frame.time_s for frame in frames] == pytest.approx(np.arange(20) / RATE, abs=2e-3)
    assert film.frame_rate == RATE
    assert film.problem is None
    for t, frame in enumerate(frames):
        assert frame.image.shape == (48, 64, 3)
        assert abs(frame.image.mean() - 10 * t) < 6


def test_times_of_storage_are_not_taken_for_times_of_display(tmp_path):
    """AVI stores when a frame is decoded; with B-frames those go back and forth."""
    path = tmp_path / "b.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(20):
            image = np.full((48, 64, 3), 10 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with open_video(str(path)) as film:
        times = [frame.time_s for frame in film]
    assert np.all(np.diff(times) > 0)


def test_a_film_made_lying_down_is_upright(tmp_path):
    path = write_film(tmp_path / "a.mp4", 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # after version, flags, times, ids and volume
    # As a telephone held upright says it: a quarter turn clockwise to display.
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30
    )
    path.write_bytes(data)
    with open_video(str(path)) as film:
        assert next(iter(film)).image.shape == (64, 48, 3)


def test_upright_turns_counterclockwise():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    turned = video._upright(image, 90)
    assert turned[1, 0].tolist() == image[0, 0].tolist()  # upper left goes to lower left
    assert video._upright(image, 0) is image
    assert video._upright(image, -90)[0, 1].tolist() == image[0, 0].tolist()


def test_a_film_cut_short_gives_what_there_is_and_says_so(tmp_path):
    path = write_film(tmp_path / "a.avi", 60, codec="mpeg4")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with open_video(str(path)) as film:
        frames = list(film)
    assert 5 < len(frames) < 60
    assert "60" in film.problem
    assert str(len(frames)) in film.problem


def test_damage_in_the_middle_is_said(tmp_path):
    path = write_film(tmp_path / "a.mkv", 60, size=(320, 240))
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(len(data) // 3, len(data) // 2, 60):
        data[place] ^= 0xFF
    path.write_bytes(data)
    with open_video(str(path)) as film:
        assert list(film)
    assert film.problem


def test_own_rate_overrules_the_file(tmp_path):
    with open_video(str(write_film(tmp_path / "a.mp4", 5)), frame_rate=10.0) as film:
        assert [frame.time_s for frame in film] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    folder = write_images(tmp_path / "frames", [(8, 6)] * 12)
    (folder / "notes.txt").write_text("no image")
    with open_video(str(folder), frame_rate=4.0) as frames:
        got = list(frames)
    assert [frame.image[0, 0, 0] for frame in got] == list(range(12))
    assert got[4].time_s == 1.0
    with open_video(str(folder)) as frames:
        assert next(iter(frames)).time_s is None


def test_a_pipe_gives_frames_as_their_bytes_come():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
    pipe = video.RawVideo(Trickle(pixels.tobytes() + b"abc"), (5, 3))
    np.testing.assert_array_equal([frame.image for frame in pipe], pixels)
    assert "3 bytes after frame 3" in pipe.problem


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent.mp4", "no file or folder"),
        (lambda p: (p / "e.mp4", (p / "e.mp4").touch())[0], "is empty"),
        (lambda p: (p / "t.mp4", (p / "t.mp4").write_text("no video\n" * 99))[0], "as a video"),
        (lambda p: write_sound(p / "a.m4a"), "no picture, only audio"),
        (lambda p: (p / "d", (p / "d").mkdir())[0], "no images"),
        (lambda p: write_images(p / "f", [(8, 6), (8, 6), (6, 8)]), "frame 2 has 6 x 8 pixels"),
        (lambda p: "camera:4321", "camera:4321"),
        (lambda p: "camera", "camera:0"),
        (lambda p: "-", "--frame_size"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(open_video(str(make(tmp_path))))


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="standard input holds no frames"):
        list(video.RawVideo(io.BytesIO(b""), (5, 3)))


def test_a_broken_image_is_named(tmp_path):
    folder = write_images(tmp_path / "frames", [(8, 6)] * 3, ".jpg")
    (folder / "2.jpg").write_bytes(b"\xff\xd8 no jpeg")
    with pytest.raises(ValueError, match=r"2\.jpg"):
        list(open_video(str(folder)))


def frames_at(rate: float, count: int) -> list[Frame]:
    image = np.zeros((1, 1, 3), np.uint8)
    return [Frame(i, i / rate, image) for i in range(count)]


@pytest.mark.parametrize(
    ("rate", "taken"),
    [
        (12.0, [0, 1, 2, 3, 4, 5]),
        (24.0, [0, 2, 4, 6, 8, 10]),
        (60.0, [0, 5, 10, 15, 20, 25]),
        (30.0, [0, 2, 5, 7, 10, 12]),  # the nearest to 0, 2.5, 5, 7.5: of two the earlier
        (5.0, [0, 1, 2, 3, 4, 5]),  # slower than the model's: all there is
    ],
)
def test_frames_are_taken_at_the_rate_of_training(rate, taken):
    sampler = RateSampler(rate, 12.0, 1)
    got = [frame.index for frame in frames_at(rate, 40) if sampler.take(frame)]
    assert got[:6] == taken


def test_without_a_rate_every_kth_frame_is_taken():
    sampler = RateSampler(None, 12.0, 3)
    image = np.zeros((1, 1, 3), np.uint8)
    assert [i for i in range(10) if sampler.take(Frame(i, None, image))] == [0, 3, 6, 9]


@given(st.floats(2.0, 240.0), st.sampled_from([4.0, 12.0, 12.5, 30.0]), st.integers(1, 4))
def test_the_rate_neither_drifts_nor_bursts(rate, frame_rate, stride):
    sampler = RateSampler(rate, frame_rate, stride)
    target = min(rate, frame_rate / stride)
    times = [f.time_s for f in frames_at(rate, 2000) if sampler.take(f)]
    assert len(times) == pytest.approx(2000 / rate * target, abs=1.5)
    assert np.diff(times).min() >= 1 / target - 1 / rate - 1e-9


def test_a_live_source_gives_its_newest_frame_and_counts_the_others():
    taken, produced = threading.Event(), threading.Event()
    image = np.zeros((1, 1, 3), np.uint8)

    def source():
        yield Frame(0, 0.0, image)
        taken.wait(10)
        yield from (Frame(index, float(index), image) for index in range(1, 6))
        produced.set()

    class Live(video.Video):
        live = True

        def _frames(self):
            yield from video.newest_frames(source(), self)

    live = Live("live")
    frames = iter(live)
    assert next(frames).index == 0
    taken.set()
    assert produced.wait(10)
    # The generator has gone on past its last frame, so nothing newer can come.
    assert next(frames).index == 5
    assert live.dropped == 4
    assert next(frames, None) is None


def test_what_goes_wrong_in_a_live_source_is_raised_where_it_is_read():
    def source():
        yield Frame(0, 0.0, np.zeros((1, 1, 3), np.uint8))
        raise OSError("unplugged")

    class Live(video.Video):
        def _frames(self):
            yield from video.newest_frames(source(), self)

    with pytest.raises(OSError, match="unplugged"):
        for _ in itertools.islice(iter(Live("live")), 5):
            pass
