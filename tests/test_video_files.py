"""Data sets of video files: what is listed, what it is labelled, and which frames are decoded."""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import os
import pickle
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from input_pipeline import video_files, video_frames
from input_pipeline.source import VideoInfo
from input_pipeline.video import open_video
from input_pipeline.video_files import VideoFiles, read_split

MS = Fraction(1, 1000)
UNEVEN = np.cumsum([0, *np.random.default_rng(0).integers(10, 90, 39)]).tolist()  # ms


def picture(t, width=64, height=48):
    """A gradient that moves, with a bar and a line: no two frames alike."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = (np.arange(width)[:, None] * 3 + 7 * t) % 256
    image[:, 3 * t % width : 3 * t % width + 8] = 255 - t
    image[t % height] = 5 * t % 256, 20, 200
    return image


def write_video(
    path,
    num_frames=40,
    codec="libx264",
    *,
    stamps=None,
    pixels="yuv420p",
    container=None,
    gop=10,
    **options,
):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.gop_size = gop
        if stamps is not None:
            stream.codec_context.time_base = MS
        for t in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(t), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[t], MS
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def x264(text):
    return {"x264-params": f"{text}:scenecut=0", "preset": "ultrafast"}


B_FRAMES = x264("bframes=3:keyint=10:b-pyramid=normal")
HEVC = "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0:log-level=none"
NO_SHIFT = {"avoid_negative_ts": "disabled"}
# name: (ending, arguments of write_video, whether decoding must begin at a later key frame)
FILMS = {
    "b_frames": ("mp4", B_FRAMES, True),
    "open_gop": ("mp4", x264("bframes=3:keyint=10:open-gop=1"), False),
    "intra_refresh": ("mp4", x264("keyint=16:intra-refresh=1"), None),
    "matroska": ("mkv", B_FRAMES, True),
    "fragments": ("mp4", {**B_FRAMES, "container": {"movflags": "frag_keyframe+empty_moov"}}, True),
    "uneven": ("mp4", {**B_FRAMES, "stamps": UNEVEN}, True),
    "begins_late": ("mp4", {**B_FRAMES, "stamps": [ms + 5000 for ms in UNEVEN]}, True),
    "begins_below_0": (
        "mp4",
        {**B_FRAMES, "stamps": [ms - 300 for ms in UNEVEN], "container": NO_SHIFT},
        None,
    ),
    "matroska_below_0": (
        "mkv",
        {**B_FRAMES, "stamps": [ms - 300 for ms in UNEVEN], "container": NO_SHIFT},
        None,
    ),
    "vp8": ("webm", {"codec": "libvpx", "b": "50k", "cpu-used": "8"}, True),
    "vp9": ("webm", {"codec": "libvpx-vp9", "cpu-used": "8", "lag-in-frames": "8"}, True),
    "hevc": ("mp4", {"codec": "libx265", "x265-params": HEVC, "preset": "ultrafast"}, True),
    "mpeg4": ("mp4", {"codec": "mpeg4", "bf": "2"}, True),
    "mpeg4_avi": ("avi", {"codec": "mpeg4", "bf": "2"}, False),
    "h264_avi": ("avi", B_FRAMES, False),
    "mjpeg": ("avi", {"codec": "mjpeg", "pixels": "yuvj420p"}, False),
    "mpeg2": ("mpg", {"codec": "mpeg2video", "bf": "2"}, False),
    "transport": ("ts", B_FRAMES, False),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("films"), {}

    def film(name):
        """The path, and all frames as the player of `predict` decodes them."""
        if name not in made:
            ending, options, _ = FILMS[name]
            path = write_video(folder / f"{name}.{ending}", **options)
            made[name] = path, whole(path)
        return made[name]

    return film


def whole(path):
    with open_video(str(path)) as film:
        return [frame.image for frame in film]


def source_of(*paths):
    return VideoFiles(
        "train", tuple(map(str, range(len(paths)))), None, ("a",), tuple(map(str, paths))
    )


def frames_of(source, *frames):
    return source.read(0, lambda info: np.array(frames))


@pytest.fixture
def fed(monkeypatch):
    """The number of packets that decoders were given."""
    packets, decode = [], video_frames._decode_packet
    monkeypatch.setattr(
        video_frames, "_decode_packet", lambda packet: packets.append(packet.pts) or decode(packet)
    )
    return packets


# --- Frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILMS)
def test_every_frame_equals_the_full_decode(films, name):
    path, full = films(name)
    source = source_of(path)
    assert source.video_info(0).num_frames == len(full) > 30
    for wanted, image in enumerate(full):
        np.testing.assert_array_equal(frames_of(source, wanted)[0], image, err_msg=str(wanted))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(FILMS)), data=st.data())
def test_any_frames_in_any_order(films, name, data):
    path, full = films(name)
    wanted = data.draw(st.lists(st.integers(0, len(full) - 1), min_size=1, max_size=8))
    images = frames_of(source_of(path), *wanted)
    assert len(images) == len(wanted)
    for image, frame in zip(images, wanted, strict=True):
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, full[frame])


@pytest.mark.parametrize("name", FILMS)
def test_only_what_is_needed_is_decoded(films, name, fed):
    path, full = films(name)
    source = source_of(path)
    source.video_info(0)
    # Knowing a file takes no decoding, where its packets can be trusted.
    assert bool(fed) == (name in ("mpeg2", "transport", "matroska_below_0"))
    last = len(full) - 1
    fed.clear()
    frames_of(source, 0)
    assert len(fed) < 25  # a decoder may hold back some; VP8's holds none
    fed.clear()
    frames_of(source, last)
    seeks = FILMS[name][2]
    if seeks:
        for wanted in range(len(full)):
            fed.clear()
            frames_of(source, wanted)
            assert len(fed) < 20, wanted  # up to a group of pictures, and what is held back
    elif seeks is False:
        assert len(fed) >= len(full)


def test_frames_far_apart_skip_what_lies_between(films, fed):
    path, full = films("b_frames")
    source = source_of(path)
    images = frames_of(source, 39, 0, 39)
    np.testing.assert_array_equal(images[0], full[39])
    np.testing.assert_array_equal(images[1], full[0])
    assert images[0] is images[2]
    assert len(fed) < 20
    fed.clear()
    frames_of(source, *range(40))
    assert len([pts for pts in fed if pts is not None]) == 40  # each packet once


def test_a_key_frame_that_seeking_misses_is_no_error(films, monkeypatch):
    """From the start, then, with the same pixels."""
    path, full = films("b_frames")
    source = source_of(path)
    source.video_info(0)
    film = source._known[str(path)]
    wrong = [video_frames._Key(key.packet, key.pts + 1, key.until) for key in film.keys[1:]]
    source._known[str(path)] = dataclasses.replace(film, keys=(film.keys[0], *wrong))
    for frame in (12, 25, 39):
        np.testing.assert_array_equal(frames_of(source, frame)[0], full[frame])


def test_packed_b_frames(tmp_path):
    """MPEG-4 in AVI as DivX wrote it: a P and a B frame in one packet, an empty one after."""
    plain = write_video(tmp_path / "plain.avi", codec="mpeg4", bf="1", num_frames=21)
    packets = []
    with av.open(str(plain)) as film:
        stream = film.streams.video[0]
        extra = bytes(stream.codec_context.extradata)
        packets = [bytes(packet) for packet in film.demux(stream) if packet.size]
    kinds = [vop_type(packet) for packet in packets]
    not_coded = b"\0\0\1\xb6" + struct.pack(">B", 0x40 | 0x10) + b"\x7f"
    packed, place = [], 0
    while place < len(packets):
        if place + 1 < len(packets) and kinds[place] == "P" and kinds[place + 1] == "B":
            packed += [packets[place] + packets[place + 1], not_coded]
            place += 2
        else:
            packed.append(packets[place])
            place += 1
    assert "B" in kinds
    assert len(packed) == len(packets)
    user_data = b"\0\0\1\xb2DivX503b1393p\0"
    path = tmp_path / "packed.avi"
    with av.open(str(path), "w") as out:
        made = out.add_stream("mpeg4", rate=25)
        made.width, made.height, made.pix_fmt = 64, 48, "yuv420p"
        made.codec_context.extradata = extra + user_data
        for number, data in enumerate(packed):
            packet = av.Packet((extra + user_data + data) if number == 0 else data)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 25), made
            packet.is_keyframe = number == 0
            out.mux(packet)
    full, source = whole(path), source_of(path)
    assert len(full) == 21
    assert source.video_info(0).num_frames == 21
    for frame, image in enumerate(full):
        np.testing.assert_array_equal(frames_of(source, frame)[0], image)
    plain_frames = whole(plain)
    assert sum(np.array_equal(a, b) for a, b in zip(full, plain_frames, strict=True)) >= 20


def vop_type(packet):
    return "IPBS"[packet[packet.index(b"\0\0\1\xb6") + 4] >> 6]


@pytest.mark.parametrize(("name", "first"), [("open_gop", 6), ("hevc", "key")])
def test_a_film_cut_out_of_another_gives_what_a_player_shows(films, tmp_path, name, first):
    """Its first frames need some before the cut: nobody can decode them."""
    path, _ = films(name)
    cut = tmp_path / "cut.mkv"
    with av.open(str(path)) as film, av.open(str(cut), "w") as out:
        packets = [p for p in film.demux(film.streams.video[0]) if p.dts is not None]
        if first == "key":
            first = [place for place, packet in enumerate(packets) if packet.is_keyframe][1]
        stream = out.add_stream_from_template(film.streams.video[0])
        for packet in packets[first:]:
            packet.stream = stream
            out.mux(packet)
    full, source = whole(cut), source_of(cut)
    assert source.video_info(0).num_frames == len(full) < 40 - first
    for frame, image in enumerate(full):
        np.testing.assert_array_equal(frames_of(source, frame)[0], image)


@pytest.mark.parametrize(("start", "length"), [(0, 20), (12, 20), (25, 9)])
def test_a_film_with_an_edit_list_gives_what_a_player_shows(tmp_path, start, length):
    """As telephones cut films: all is still in the file, a part of it is to be shown."""
    path = write_video(tmp_path / "a.mp4", container={"movflags": "faststart"}, **B_FRAMES)
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12  # after version, flags and the number of entries
    unit_s, begin = 1000, struct.unpack(">i", data[entry + 4 : entry + 8])[0]
    assert struct.unpack(">I", data[entry : entry + 4]) == (40 * unit_s // 25,)
    data[entry : entry + 4] = struct.pack(">I", length * unit_s // 25)
    data[entry + 4 : entry + 8] = struct.pack(">i", begin + start * 512)  # 1/12800 s
    path.write_bytes(data)
    full, source = whole(path), source_of(path)
    assert source.video_info(0).num_frames == len(full) == length
    for frame, image in enumerate(full):
        np.testing.assert_array_equal(frames_of(source, frame)[0], image)


def test_frames_that_are_never_shown_are_not_counted(films, tmp_path):
    """VP8's alternate references: packets without a picture."""
    path, _ = films("vp8")
    hidden = tmp_path / "hidden.webm"
    with av.open(str(path)) as film, av.open(str(hidden), "w") as out:
        template = film.streams.video[0]
        stream = out.add_stream_from_template(template)
        for packet in film.demux(template):
            if packet.dts is None:
                continue
            data = bytes(packet)
            if not packet.is_keyframe and packet.pts % 3:
                # The same change to the picture, once unseen and once more shown.
                unseen = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                unseen.pts = unseen.dts = packet.pts - 15
                unseen.time_base, unseen.stream = packet.time_base, stream
                out.mux(unseen)
            packet.stream = stream
            out.mux(packet)
    with av.open(str(hidden)) as film:
        assert sum(bool(p.size) for p in film.demux(film.streams.video[0])) > 60
    full, source = whole(hidden), source_of(hidden)
    assert source.video_info(0).num_frames == len(full) == 40
    for frame, image in enumerate(full):
        np.testing.assert_array_equal(frames_of(source, frame)[0], image)


def test_frames_stand_upright(films, tmp_path):
    data = bytearray(films("b_frames")[0].read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30
    )
    path = tmp_path / "lying.mp4"
    path.write_bytes(data)
    source, full = source_of(path), whole(path)
    for frame in (0, 25, 39):
        image = frames_of(source, frame)[0]
        assert image.shape == (64, 48, 3)
        np.testing.assert_array_equal(image, full[frame])


@pytest.mark.skipif(not os.environ.get("RVIT_VIDEOS"), reason="RVIT_VIDEOS names no folder")
def test_real_videos_equal_the_full_decode():
    files = [f for f in os.scandir(os.environ["RVIT_VIDEOS"]) if f.name.endswith((".mp4", ".avi"))]
    assert files
    for file in files:
        full, source = whole(file.path), source_of(file.path)
        assert source.video_info(0).num_frames == len(full)
        for frame in (*range(0, len(full), 7), len(full) - 1):
            np.testing.assert_array_equal(frames_of(source, frame)[0], full[frame])


def test_what_choose_is_told_and_may_answer(films):
    source = source_of(films("b_frames")[0])
    told = []
    source.read(0, lambda info: told.append(info) or np.array([0]))
    assert told == [VideoInfo(num_frames=40, frame_rate=25.0)]
    for wrong, message in (([40], "no frame 40"), ([-1], "no frame -1"), ([], "n from 1")):
        with pytest.raises(ValueError, match=message) as error:
            source.read(0, lambda info, wrong=wrong: np.array(wrong, int))
        assert "b_frames.mp4" in str(error.value)
    with pytest.raises(RuntimeError, match=r"b_frames\.mp4"):
        source.read(0, lambda info: next(iter(())))


def test_threads_share_a_source_and_processes_get_it(films):
    names = sorted(FILMS)[:6]
    source = source_of(*(films(name)[0] for name in names))
    frames_of(source, 3)
    source = pickle.loads(pickle.dumps(source))
    assert source._known == {}
    jobs = [(index, frame) for frame in (0, 11, 25, 30) for index in range(len(names))] * 2

    def read(job):
        return source.read(job[0], lambda info: np.array([job[1]]))[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for (index, frame), image in zip(jobs, pool.map(read, jobs), strict=True):
            np.testing.assert_array_equal(image, films(names[index])[1][frame])


def test_regular_times_take_no_memory(films):
    source = source_of(films("b_frames")[0], films("uneven")[0])
    for index in range(2):
        source.video_info(index)
    regular, uneven = (source._known[path].stamps for path in source.paths)
    assert isinstance(regular, range)
    assert uneven.dtype == np.int32
    assert len(regular) == len(uneven) == 40


# --- Damage and strangers' files ------------------------------------------------------------------


def test_cut_files_are_errors_that_name_them(films, tmp_path):
    whole_mp4 = write_video(
        tmp_path / "whole.mp4", container={"movflags": "faststart"}, **B_FRAMES
    ).read_bytes()
    cases = {
        "cut.mp4": (whole_mp4[: len(whole_mp4) * 2 // 3], "damaged|cut short"),
        "cut_between.mp4": (whole_mp4[: start_of_packet(tmp_path / "whole.mp4", 30)], "cut short"),
        "no_index.mp4": (films("b_frames")[0].read_bytes()[:2000], "cannot be read as a video"),
        "cut.mkv": (films("matroska")[0].read_bytes()[:-9000], "cut short"),
        "empty.mp4": (b"", "the file is empty"),
        "page.mp4": (b"<html>404</html>" * 99, "cannot be read as a video"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            frames_of(source_of(tmp_path / name), 0)
        assert name in str(error.value)
        assert "on_error=skip" in str(error.value)


def start_of_packet(path, number):
    with av.open(str(path)) as film:
        return [packet.pos for packet in film.demux(film.streams.video[0])][number]


def test_damage_within_names_the_frame(tmp_path):
    data = bytearray(
        write_video(
            tmp_path / "a.mp4", container={"movflags": "faststart"}, **B_FRAMES
        ).read_bytes()
    )
    middle = len(data) // 2
    data[middle : middle + 800] = bytes(800)
    (tmp_path / "bad.mp4").write_bytes(data)
    source = source_of(tmp_path / "bad.mp4")
    assert len(frames_of(source, 0, 1)) == 2  # what lies before it can be read
    with pytest.raises(ValueError, match=r"bad\.mp4: frame \d+ (cannot be decoded|is damaged)"):
        frames_of(source, *range(40))


def test_a_gone_file_is_named(films, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(films("b_frames")[0].read_bytes())
    source = source_of(path)
    frames_of(source, 0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.mp4 is gone"):
        frames_of(source, 0)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile b_frames.mp4\n", "#EXTM3U\n#EXTINF:1,\nb_frames.mp4\n"]
)
def test_a_list_of_other_files_is_not_followed(films, tmp_path, monkeypatch, text):
    target, _ = films("b_frames")
    monkeypatch.chdir(target.parent)
    for folder in (tmp_path, target.parent):
        path = folder / "list.mp4"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"list\.mp4 cannot be read as a video"):
            frames_of(source_of(path), 0)
        path.unlink()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["b_frames", "matroska", "vp9", "mpeg4_avi"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
    keep=st.floats(0.2, 1),
)
def test_broken_bytes_give_frames_or_a_named_error(films, tmp_path, name, places, keep):
    data = bytearray(films(name)[0].read_bytes())
    for place, value in places:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path / f"broken{films(name)[0].suffix}"
    path.write_bytes(data[: int(keep * len(data))])
    source = source_of(path)
    with contextlib.suppress(ValueError), naming(path.name):
        images = source.read(0, lambda info: np.arange(min(info.num_frames, 500)))
        assert all(image.shape[-1] == 3 for image in images)


@contextlib.contextmanager
def naming(name):
    """A ValueError must name the file; other errors and results are not its business."""
    try:
        yield
    except ValueError as error:
        if name not in str(error):
            raise AssertionError(f"{name} is not named: {error}") from error
        raise


# --- Layouts --------------------------------------------------------------------------------------


def grey(path, level):
    """A video of 3 frames of one grey level: what was read tells which file it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(3):
            image = np.full((16, 16, 3), level, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def levels(source):
    """The grey level of each clip, rounded to tens."""
    return [
        round(float(source.read(i, lambda info: np.array([2]))[0].mean()) / 10) * 10
        for i in range(len(source.ids))
    ]


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_a_folder_of_folders(tmp_path):
    for split, name, file, level in (
        ("train", "wave", "b.mp4", 40),
        ("train", "wave", "a.avi", 20),
        ("train", "clap", "z.mp4", 80),
        ("val", "wave", "v.mkv", 120),
    ):
        grey(tmp_path / split / name / file, level)
    train = read_split("video_folder", tmp_path, "train")
    assert train.class_names == ("clap", "wave")
    assert train.ids == ("clap/z.mp4", "wave/a.avi", "wave/b.mp4")
    assert train.labels.tolist() == [0, 1, 1]
    assert train.labels.dtype == np.int32
    assert levels(train) == [80, 20, 40]
    validation = read_split("video_folder", tmp_path, "validation")
    assert (validation.name, validation.class_names) == ("validation", ("clap", "wave"))
    assert (validation.labels.tolist(), levels(validation)) == ([1], [120])
    chosen = read_split("video_folder", tmp_path, "train", classes=("wave",))
    assert (chosen.ids, chosen.labels.tolist()) == (("wave/a.avi", "wave/b.mp4"), [0, 0])
    with pytest.raises(ValueError, match=r"'wav' is no class .* did you mean 'wave'"):
        read_split("video_folder", tmp_path, "train", classes=("wav",))
    with pytest.raises(FileNotFoundError, match=r"no folder of the split 'test'.*train, val"):
        read_split("video_folder", tmp_path, "test")
    touch(tmp_path / "test" / "x.mp4")
    assert read_split("video_folder", tmp_path, "test").labels is None


def test_selecting_keeps_files_and_labels_together(tmp_path):
    for level in (20, 40, 80):
        grey(tmp_path / "train" / f"class{level}" / f"{level}.mp4", level)
    source = read_split("video_folder", tmp_path, "train")
    some = source.select(["class80/80.mp4", "class20/20.mp4"])
    assert (levels(some), some.labels.tolist()) == ([80, 20], [2, 0])
    assert some.class_names == source.class_names
    for ids, message in ((["class8/80.mp4"], "no clip"), ([source.ids[0]] * 2, "twice")):
        with pytest.raises(ValueError, match=message):
            source.select(ids)


@pytest.mark.parametrize("header", [(), ("path,label",)])
def test_a_list_with_commas(tmp_path, header):
    grey(tmp_path / "v" / "one.mp4", 20)
    grey(tmp_path / "a, b.mp4", 60)
    text(tmp_path / "train.csv", *header, "v/one.mp4,wave", '"a, b.mp4","clap, twice"', "")
    source = read_split("video_list", tmp_path, "train")
    assert source.ids == ("v/one.mp4", "a, b.mp4")
    assert source.class_names == ("clap, twice", "wave")
    assert (source.labels.tolist(), levels(source)) == ([1, 0], [20, 60])


def test_a_list_with_blanks_and_indices(tmp_path):
    for name in ("a b.mp4", "c.mp4", "d.mp4"):
        touch(tmp_path / name)
    text(tmp_path / "train.txt", "a b.mp4 2", "c.mp4 0")
    text(tmp_path / "val.txt", "d.mp4 1")
    text(tmp_path / "test.txt", "a b.mp4", "c.mp4")
    train = read_split("video_list", tmp_path, "train")
    assert (train.ids, train.labels.tolist()) == (("a b.mp4", "c.mp4"), [2, 0])
    assert train.class_names == ("0", "1", "2")
    assert read_split("video_list", tmp_path, "validation").labels.tolist() == [1]
    assert read_split("video_list", tmp_path, "test").labels is None
    text(tmp_path / "classes.txt", "wave", "clap", "point")
    named = read_split("video_list", tmp_path, "train")
    assert (named.class_names, named.labels.tolist()) == (("wave", "clap", "point"), [2, 0])
    part = read_split("video_list", tmp_path, "train", classes=("point",))
    assert (part.ids, part.labels.tolist()) == (("a b.mp4",), [0])


def test_a_list_of_several_labels(tmp_path):
    for name in "abc":
        touch(tmp_path / f"{name}.mp4")
    entries = (("a", ["sit", "eat"]), ("b", "walk"), ("c", []))
    text(
        tmp_path / "train.jsonl",
        *(json.dumps({"path": f"{name}.mp4", "label": label}) for name, label in entries),
    )
    source = read_split("video_list", tmp_path, "train")
    assert source.class_names == ("eat", "sit", "walk")
    assert source.labels.dtype == np.float32
    assert source.labels.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    part = read_split("video_list", tmp_path, "train", classes=("walk", "eat"))
    assert part.labels.tolist() == [[0, 1], [1, 0], [0, 0]]
    # One label each, but the training split says that there may be several.
    text(tmp_path / "validation.jsonl", json.dumps({"path": "a.mp4", "label": "sit"}))
    assert read_split("video_list", tmp_path, "validation").labels.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "train.csv is empty"),
        (("path,label",), "train.csv is empty"),
        (("a.mp4,x", "b.mp4,x,y"), r"train.csv:2: expected 'path,label'"),
        (("a.mp4,x", ",y"), r"train.csv:2: expected 'path,label'"),
        (("a.mp4,x", "b.mp4,"), r"train.csv:2: .* no label"),
        (("a.mp4,x", '"b.mp4,y'), r"train.csv:2: .*expected 'path,label'"),
        (("a.mp4,x", "b.mp4,y", "a.mp4,y"), r"train.csv:3: .* stands in .*train.csv:1 already"),
        (("a.mp4,x", "../b.mp4,y"), r"train.csv:2: .* leads out of dataset.data_dir"),
        (("a.mp4,0", "b.mp4,99999999999"), r"train.csv:2: 99999999999 can be no class index"),
        (('{"path": "a.mp4", "label": "x"}', '{"path": 3}'), r"train.csv:2: expected"),
        (('{"path": "a.mp4", "label": "x"}', "{path}"), r"train.csv:2: no JSON"),
        (('{"path": "a.mp4", "label": [true]}',), r"train.csv:1: the label True"),
    ],
)
def test_wrong_lines_of_a_list_are_named(tmp_path, lines, message):
    for name in "ab":
        touch(tmp_path / f"{name}.mp4")
    text(tmp_path / "train.csv", *lines)
    with pytest.raises(ValueError, match=message):
        read_split("video_list", tmp_path, "train")


def test_a_label_that_train_lacks_is_named_with_the_nearest(tmp_path):
    touch(tmp_path / "a.mp4")
    text(tmp_path / "train.csv", "a.mp4,waving")
    text(tmp_path / "val.csv", "a.mp4,wavng")
    with pytest.raises(ValueError, match=r"val.csv:1: unknown label 'wavng'; did you .* 'waving'"):
        read_split("video_list", tmp_path, "validation")


def test_where_annotations_lie_can_be_said(tmp_path):
    touch(tmp_path / "a.mp4")
    text(tmp_path / "lists" / "train_clips.csv", "a.mp4,wave")
    text(tmp_path / "lists" / "validation.csv", "a.mp4,wave")
    by_name = read_split("video_list", tmp_path, "train", labels="lists/{split}_clips.csv")
    assert by_name.ids == ("a.mp4",)
    assert read_split("video_list", tmp_path, "validation", labels="lists").ids == ("a.mp4",)
    with pytest.raises(ValueError, match=r"write \{split\}"):
        read_split("video_list", tmp_path, "train", labels="lists/train_clips.csv")
    with pytest.raises(FileNotFoundError, match=r"looked for train\.csv"):
        read_split("video_list", tmp_path, "train")


def make_ssv2(root, ids=("9", "10", "7"), ending="webm"):
    templates = ("Moving [something] up", "Holding [something]", "Dropping [something]")
    names = {"Holding something": "0", "Dropping something": "2", "Moving something up": "1"}
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "labels.json").write_text(json.dumps(names))
    rows = [
        {"id": clip, "label": "x", "template": template, "placeholders": ["x"]}
        for clip, template in zip(ids, templates, strict=True)
    ]
    body = ",\n".join(map(json.dumps, rows))
    (root / "labels" / "train.json").write_text(f"[\n{body}\n]")
    (root / "labels" / "test.json").write_text(json.dumps([{"id": "7"}]))
    for level, clip in zip((30, 60, 90), ids, strict=True):
        grey(root / "20bn-something-something-v2" / f"{clip}.{ending}", level)
    return root


@pytest.mark.parametrize("ending", ["webm", "mp4"])
def test_something_something(tmp_path, ending):
    make_ssv2(tmp_path, ending=ending)
    source = read_split("ssv2", tmp_path, "train")
    assert source.class_names == ("Holding something", "Moving something up", "Dropping something")
    assert source.ids == ("9", "10", "7")
    assert source.labels.tolist() == [1, 0, 2]
    assert levels(source) == [30, 60, 90]
    test = read_split("ssv2", tmp_path, "test")
    assert (test.ids, test.labels) == (("7",), None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Holding [something]", "Holdin [something]", r"train.json:3: unknown .* 'Holding someth"),
        ('"id": "10"', '"id": "9"', r"train.json:3: the clip '9' stands in .*train.json:2 already"),
        ('"id": "10"', '"id": ""', r"train.json: entry 1: no id"),
        ('"id": "10"', '"id": "../10"', r"train.json: entry 1: no id"),
        ("},\n", "}\n", r"train.json:3: no JSON"),
    ],
)
def test_wrong_entries_of_something_something_are_named(tmp_path, old, new, message):
    file = make_ssv2(tmp_path) / "labels" / "train.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_split("ssv2", tmp_path, "train")


def test_a_wrong_list_of_classes_is_named(tmp_path):
    file = make_ssv2(tmp_path) / "labels" / "labels.json"
    for names, message in (
        ({"a": "0", "b": "0"}, "'a' and 'b' both have the index 0"),
        ({"a": "0", "b": "2"}, "no class has the index 1"),
        ({"a": "x"}, "'a' has no index"),
        ([], "expected"),
    ):
        file.write_text(json.dumps(names))
        with pytest.raises(ValueError, match=message):
            read_split("ssv2", tmp_path, "train")


KINETICS = "label,youtube_id,time_start,time_end,split"


def make_kinetics(root):
    text(
        root / "train.csv",
        KINETICS,
        "zumba,-aaaaaaaaaa,3,13,train",
        '"tying knot (not on a tie)",b_bbbbbbbbb,1210,1220,train',
        "zumba,ccccccccccc,0,10,train",
    )
    text(root / "val.csv", KINETICS, "zumba,ddddddddddd,5,15,validate")
    grey(root / "train" / "zumba" / "-aaaaaaaaaa_000003_000013.mp4", 30)
    grey(root / "train" / "b_bbbbbbbbb_001210_001220.mp4", 60)
    text(root / "train" / "notes.txt", "no video")
    grey(root / "val" / "zumba" / "ddddddddddd_000005_000015.mp4", 90)
    return root


def test_kinetics_leaves_out_and_counts_what_is_gone(tmp_path):
    make_kinetics(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        read_split("kinetics400", tmp_path, "train")
    for part in ("1 of the 3 videos", "ccccccccccc_000000_000010", "dataset.missing=skip"):
        assert part in str(error.value)
    source = read_split("kinetics400", tmp_path, "train", missing="skip")
    assert source.missing == ("ccccccccccc_000000_000010",)
    assert source.ids == ("-aaaaaaaaaa_000003_000013", "b_bbbbbbbbb_001210_001220")
    assert source.class_names == ("tying knot (not on a tie)", "zumba")
    assert (source.labels.tolist(), levels(source)) == ([1, 0], [30, 60])
    validation = read_split("kinetics400", tmp_path, "validation")
    assert (validation.labels.tolist(), levels(validation)) == ([1], [90])
    assert validation.missing == ()


def test_skipping_everything_is_an_error(tmp_path):
    text(tmp_path / "train.csv", KINETICS, "zumba,ccccccccccc,0,10,train")
    with pytest.raises(FileNotFoundError, match=r"1 of the 1 videos .* set dataset\.data_dir"):
        read_split("kinetics400", tmp_path, "train", missing="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zumba,ccccccccccc,zero,10,train", r"train.csv:5: time_start and time_end"),
        ("zumba,cc/../cccccc,0,10,train", r"train.csv:5: 'cc/../cccccc' is no YouTube id"),
        ("../x,ccccccccccd,0,10,train", r"train.csv:5: '../x' cannot be the name of a folder"),
        ("zumba,ccccccccccd,0,10,val", r"train.csv:5: a clip of the split 'val'"),
        ("zumba,ccccccccccd,0,10", r"train.csv:5: 4 fields, the header has 5"),
        (
            "zumba,ccccccccccc,0,10,train",
            r"train.csv:5: the clip .* stands in .*train.csv:4 already",
        ),
        (",ccccccccccd,0,10,train", r"train.csv:5: .* no label"),
    ],
)
def test_wrong_lines_of_kinetics_are_named(tmp_path, line, message):
    make_kinetics(tmp_path)
    with (tmp_path / "train.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_split("kinetics400", tmp_path, "train", missing="skip")


def test_a_missing_column_is_named(tmp_path):
    text(tmp_path / "train.csv", "label,id,time_start,time_end", "zumba,c,0,10")
    with pytest.raises(ValueError, match=r"train\.csv:1: no column youtube_id"):
        read_split("kinetics400", tmp_path, "train")


CHARADES = "id,subject,script,actions,length"


def make_charades(root, *lines):
    text(
        root / "Charades_v1_classes.txt", "c000 Holding a cup", "c001 Sitting", "c002 Running away"
    )
    text(
        root / "Charades_v1_train.csv",
        CHARADES,
        'AAAAA,S1,"She says, ""no"".\nThen sits.",c001 11.90 21.20;c000 0.00 12.60,30.00',
        "BBBBB,S2,x,,12.5",
        "CCCCC,S2,x,c002 3.00 4.00;c002 8.00 9.00;c001 12.60 14.00,12.5",
        *lines,
    )
    text(root / "Charades_v1_test.csv", CHARADES, "DDDDD,S1,x,c000 1 2,9")
    for level, name in enumerate(("AAAAA", "BBBBB", "CCCCC", "DDDDD")):
        grey(root / "Charades_v1_480" / f"{name}.mp4", 20 + 40 * level)
    return root


def test_charades_has_several_labels_with_their_times(tmp_path):
    source = read_split("charades", make_charades(tmp_path), "train")
    assert source.ids == ("AAAAA", "BBBBB", "CCCCC")
    assert source.class_names == ("Holding a cup", "Sitting", "Running away")
    assert source.labels.dtype == np.float32
    # The last action of CCCCC begins after its end.
    assert source.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert source.spans == (
        ((1, 11.9, 21.2), (0, 0.0, 12.6)),
        (),
        ((2, 3.0, 4.0), (2, 8.0, 9.0), (1, 12.6, 14.0)),
    )
    assert levels(source) == [20, 60, 100]
    part = read_split("charades", tmp_path, "train", classes=("Running away", "Sitting"))
    assert part.labels.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert part.spans[0] == ((1, 11.9, 21.2),)
    assert part.select(["CCCCC"]).spans == (((0, 3.0, 4.0), (0, 8.0, 9.0), (1, 12.6, 14.0)),)
    validation = read_split("charades", tmp_path, "validation")
    assert (validation.ids, validation.labels.tolist()) == (("DDDDD",), [[1, 0, 0]])
    with pytest.raises(ValueError, match="--split=validation"):
        read_split("charades", tmp_path, "test")


def test_an_action_that_ends_before_it_starts_is_told(tmp_path, caplog):
    make_charades(tmp_path, "EEEEE,S,x,c001 5.5 2.5,9")
    grey(tmp_path / "Charades_v1_480" / "EEEEE.mp4", 10)
    with caplog.at_level("WARNING", logger="absl"):
        source = read_split("charades", tmp_path, "train")
    assert source.spans[-1] == ((1, 2.5, 5.5),)
    assert "1 actions end before they start" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("EEEEE,S,x,c009 0 1,9", r"train.csv:6: unknown class 'c009'; did you mean 'c00"),
        ("EEEEE,S,x,c001 0,9", r"train.csv:6: expected 'CLASS START END', got 'c001 0'"),
        ("EEEEE,S,x,c001 0 x,9", r"train.csv:6: 'x' is no time"),
        ("EEEEE,S,x,c001 nan 1,9", r"train.csv:6: 'nan' is no time"),
        ("AAAAA,S,x,,9", r"train.csv:6: the clip 'AAAAA' stands in"),
    ],
)
def test_wrong_lines_of_charades_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_split("charades", make_charades(tmp_path, line), "train")


def test_wrong_arguments_and_places_are_named(tmp_path):
    for arguments, message in (
        (("ssv3", tmp_path, "train"), "dataset.name is 'ssv3'; choose one of: video_folder"),
        (("ssv2", tmp_path, "dev"), "split is 'dev'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_split(*arguments)
    with pytest.raises(ValueError, match=r"dataset\.missing is 'ignore'"):
        read_split("ssv2", tmp_path, "train", missing="ignore")
    for name in video_files.NAMES:
        with pytest.raises(
            FileNotFoundError, match=r"no folder .*nowhere; expected .*set --config"
        ):
            read_split(name, tmp_path / "nowhere", "train")
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            read_split(name, tmp_path, "train")
    with pytest.raises(ValueError, match=r"dataset\.labels is for lists"):
        read_split("video_folder", tmp_path, "train", labels="x")


def test_no_text_is_named(tmp_path):
    for name, file in (
        ("kinetics400", "train.csv"),
        ("video_list", "train.csv"),
        ("ssv2", "labels/labels.json"),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"\xff\xfe\x00label")
        with pytest.raises(ValueError, match="no UTF-8 text"):
            read_split(name, tmp_path, "train")


@pytest.mark.parametrize("name", ["ssv2", "kinetics400", "charades"])
def test_the_experiments_load(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config.dataset.name == name
    assert name in video_files.NAMES
    with pytest.raises(ValueError, match="no variant 'x'"):
        importlib.import_module(f"configs.{name}").get_config("x")


def listed(tmp_path, text, names=("0.mp4", "1.mp4"), missing="fail"):
    (tmp_path / "v").mkdir(exist_ok=True)
    for name in names:
        (tmp_path / "v" / name).write_bytes(b"x")
    (tmp_path / "train.csv").write_text(text)
    return read_split("video_list", tmp_path, "train", missing=missing)


@pytest.mark.parametrize("between", [" ", "\t", ","])
def test_labels_of_several_words(tmp_path, between):
    text = f"v/0.mp4{between}Swiping Left\nv/1.mp4{between}Thumb Up\n"
    source = listed(tmp_path, text, missing="skip")
    assert source.class_names == ("Swiping Left", "Thumb Up")
    assert (source.ids, source.missing) == (("v/0.mp4", "v/1.mp4"), ())


@pytest.mark.parametrize("header", ["name,label", "id,class", "Path,Category"])
def test_a_header_is_no_clip(tmp_path, header):
    source = listed(tmp_path, f"{header}\nv/0.mp4,2\nv/1.mp4,10\n", missing="skip")
    assert source.missing == ()
    assert source.class_names == tuple(map(str, range(11)))
    assert source.labels.tolist() == [2, 10]


def test_one_file_under_two_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train.csv:2: .* stands in .*train.csv:1 already"):
        listed(tmp_path, "v/0.mp4,1\nv/../v/0.mp4,0\n")


def test_numbers_that_may_be_names_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("2\n1\n0\n")
    with pytest.raises(ValueError, match="whether a label is a name or an index cannot be told"):
        listed(tmp_path, "v/0.mp4,0\nv/1.mp4,2\n")
