"""Frames from files, folders, pipes and live sources."""

import io
import itertools
import struct
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import video
from input_pipeline.video import Frame, RateSampler, open_video

RATE = 25


def write_film(path, num_frames=20, *, codec="libx264", size=(64, 48)):
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
    turned = video.upright(image, 90)
    assert turned[1, 0].tolist() == image[0, 0].tolist()  # upper left goes to lower left
    assert video.upright(image, 0) is image
    assert video.upright(image, -90)[0, 1].tolist() == image[0, 0].tolist()


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
    assert "3 bytes after 4 whole frames" in pipe.problem


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent.mp4", "no file or folder"),
        (lambda p: (p / "e.mp4", (p / "e.mp4").touch())[0], "is empty"),
        (lambda p: (p / "t.mp4", (p / "t.mp4").write_text("no video\n" * 99))[0], "as a video"),
        (lambda p: write_sound(p / "a.m4a"), "no film, only audio"),
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


def write_stamped(path, times_ms):
    """A film with these times of display; `codec` keeps them as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for stamp in times_ms:
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_times_of_a_variable_rate_count_from_the_first(tmp_path):
    times = [10_000, 10_500, 11_000, 11_040, 11_080, 12_000]
    with open_video(str(write_stamped(tmp_path / "a.mkv", times))) as film:
        got = [frame.time_s for frame in film]
    assert got == pytest.approx([0.0, 0.5, 1.0, 1.04, 1.08, 2.0])
    assert film.problem is None


def test_one_time_that_repeats_leaves_the_others_as_they_are():
    film = object.__new__(video.VideoFile)
    film.frame_rate, film._counts, film._start_s, film._time_s = 10.0, False, None, None
    got = [film._time_of(stamp) for stamp in (5.0, 5.5, 6.0, 6.0, 6.04, 6.08)]
    assert got == pytest.approx([0.0, 0.5, 1.0, 1.001, 1.04, 1.08])
    assert film._time_of(5.9) == pytest.approx(1.18)  # backwards: it counts from here on
    assert film._time_of(7.5) == pytest.approx(1.28)


def test_a_film_with_sound_that_is_cut_short_says_so(tmp_path):
    path = tmp_path / "a.mkv"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        film = container.add_stream("mjpeg", rate=RATE)
        film.width, film.height, film.pix_fmt = 64, 48, "yuvj420p"
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        for t in range(100):
            image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(film.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 8000, 320 * t
            container.mux(sound.encode(samples))
        container.mux(film.encode())
        container.mux(sound.encode())
    with open_video(str(path)) as whole:
        assert len(list(whole)) == 100
    assert whole.problem is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_video(str(path)) as half:
        assert 10 < len(list(half)) < 90
    assert half.problem


def test_a_record_with_its_cover_is_no_film(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
        image = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(image))
        container.mux(cover.encode())
    with pytest.raises(ValueError, match="no film, only audio"):
        open_video(str(path))


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:a.mp4", "f%03d.mp4", "- a b.mp4"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
    write_film(tmp_path / "plain.mp4", 3).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with open_video(name) as film:
        assert len(list(film)) == 3


def test_folders_skip_what_is_no_frame_and_refuse_deep_pixels(tmp_path):
    folder = write_images(tmp_path / "frames", [(8, 6)] * 3)
    (folder / "._1.png").write_bytes(b"a shadow of another system")
    (folder / "4.png").mkdir()
    assert len(list(open_video(str(folder)))) == 3
    Image.fromarray(np.full((6, 8), 30_000, np.uint16)).save(folder / "4b.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        list(open_video(str(folder)))


class FakeCapture:
    """OpenCV's camera, which must not be released while it is read."""

    def __init__(self, _):
        self.reading, self.faults, self.released = threading.Event(), [], threading.Event()

    def isOpened(self):  # noqa: N802
        return True

    def get(self, _):
        return 30.0

    def read(self):
        self.reading.set()
        time.sleep(0.05)
        if self.released.is_set():
            self.faults.append("released under a read")
        self.reading.clear()
        return True, np.array([[[1, 2, 3]]], np.uint8)

    def release(self):
        if self.reading.is_set():
            self.faults.append("released under a read")
        self.released.set()


def test_a_camera_is_released_only_when_nobody_reads_it(monkeypatch):
    import cv2

    monkeypatch.setattr(cv2, "VideoCapture", FakeCapture)
    camera = open_video("camera:0")
    frames = iter(camera)
    assert next(frames).image.tolist() == [[[3, 2, 1]]]  # OpenCV gives blue first
    camera.close()
    assert camera._capture.released.is_set()
    assert camera._capture.faults == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evil.mp4", "ffconcat version 1.0\nfile '{other}'\n"),
        ("evil.ts", "#EXTM3U\n#EXTINF:1,\n{other}\n"),
        (
            "evil.mkv",
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{other}\n#EXT-X-ENDLIST\n",
        ),
    ],
)
def test_a_text_that_names_another_film_is_no_film(tmp_path, name, text):
    other = write_film(tmp_path / "other.mp4", 5)
    path = tmp_path / name
    path.write_text(text.format(other=other))
    with pytest.raises(ValueError, match="cannot be read as a video"):
        open_video(str(path))
