"""Chosen frames of a video file, equal to those of a full decode, frame by frame.

A file's index (how many frames, when each is shown, where decoding may begin) is read from its
packets without decoding where that is exact, else by decoding it once. Formats that name other
files are refused.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from input_pipeline.source import ChooseFrames, VideoInfo
from input_pipeline.video import reason_of, upright

# What FFmpeg may take a file for. Others, as the text of an ffconcat or m3u8 list, name further
# files and addresses, and FFmpeg would follow.
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,gif"
# Containers whose packets are frames as they are stored; the others are cut up by guessing.
_PACKETED = ("mov", "matroska", "avi")
# Codecs with one shown frame per (shown) packet.
_ONE_FRAME_A_PACKET = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "h263", "msmpeg4v3")
# Of those, where decoding from a key frame on gives the same as decoding from the start.
_CLEAN_KEYS = ("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg")
_EXACT_STAMPS = ("mov", "matroska")  # each frame's own time of display; AVI has none
_REMEDY = (
    "get the file again, take it out of the annotations, or set dataset.on_error=skip to leave out "
    "what cannot be read"
)


@dataclasses.dataclass(frozen=True)
class _Key:
    """A key frame that decoding may begin with."""

    packet: int  # its place in the file's order, which is that of decoding
    pts: int  # its time of display, in the stream's unit
    until: int  # the last time before the next key frame's


_START = _Key(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """What is known of a file without decoding it again.

    `stamps` holds each frame's time of display, ascending, in the stream's unit; None where
    frames can only be counted. A million videos may be known: regular stamps are a `range`.
    """

    num_frames: int
    frame_rate: float | None
    stamps: range | np.ndarray | None = None
    keys: tuple[_Key, ...] = ()

    @property
    def info(self) -> VideoInfo:
        """What must be known to choose frames."""
        return VideoInfo(self.num_frames, self.frame_rate)


class _WrongFrames(Exception):  # noqa: N818  raised and caught here
    """What came out of the decoder is not what the index says; the reason."""


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """Opens a file's film, to be decoded by the calling thread alone: (container, stream)."""
    import av

    av.logging.set_level(av.logging.PANIC)  # its lines name no file; our errors do
    with _open_file(path) as file:
        try:
            container = av.open(
                file,
                "r",
                container_options={"format_whitelist": _CONTAINERS},
                buffer_size=1 << 18,
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            empty = os.fstat(file.fileno()).st_size == 0
            raise ValueError(
                f"{path} cannot be read as a video: "
                f"{'the file is empty' if empty else reason_of(error)}; expected a whole MP4, "
                f"MOV, WebM, Matroska, AVI, MPEG or GIF file: {_REMEDY}"
            ) from error
        with container:
            yield container, _film(container, path)


def _open_file(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the video {path} is gone since the data was opened: put it back, or start anew with "
            "dataset.missing=skip"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot open the video {path}: {error.strerror}") from error


def _film(container: Any, path: str) -> Any:
    from av.stream import Discard, Disposition

    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not films or films[0].codec_context is None:
        kinds = sorted({s.type for s in container.streams} - {"video"}) or ["nothing"]
        what = "a codec unknown here" if films else f"no film, only {' and '.join(kinds)}"
        raise ValueError(f"{path} has {what}, or is cut short: {_REMEDY}")
    stream = films[0]
    stream.thread_type, stream.thread_count = "NONE", 1  # the loader reads many files at a time
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all  # sound is not even read
    return stream


@dataclasses.dataclass(frozen=True)
class _Packet:
    pts: int | None
    is_key: bool  # and decoding may begin there
    is_shown: bool
    end: int | None


def read_index(path: str) -> VideoIndex:
    """Reads a file through without decoding it, if its packets tell how many frames it has."""
    with _opened(path) as (container, stream):
        codec = stream.codec_context.name
        codec = {"libdav1d": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8"}.get(codec, codec)
        kind = container.format.name.split(",")[0]
        rate = stream.average_rate or stream.guessed_rate
        rate = float(rate) if rate else None
        packets = None
        if kind in _PACKETED and codec in _ONE_FRAME_A_PACKET:
            packets = _read_packets(container, stream, codec, path)
            _check_whole(packets, container, stream, kind, path)
    if packets is None or not _begins_clean(packets):
        return VideoIndex(_count_frames(path), rate)
    times = [p.pts for p in packets if p.is_shown]
    num_frames = len(times)
    if not num_frames:
        raise ValueError(f"{path} holds no frames, or is cut short: {_REMEDY}")
    if kind not in _EXACT_STAMPS or None in times or len(set(times)) < num_frames:
        return VideoIndex(num_frames, rate)  # frames can only be counted
    stamps = sorted(pts for pts in times if pts is not None)
    if codec not in _CLEAN_KEYS:
        return VideoIndex(num_frames, rate, _compact(stamps))
    return VideoIndex(num_frames, rate, _compact(stamps), _keys(packets, stamps[-1]))


def _keys(packets: list[_Packet], last: int) -> tuple[_Key, ...]:
    """The key frames, in the order of display, which is theirs in the file too."""
    found = [(p.pts, place) for place, p in enumerate(packets) if p.is_key and p.pts is not None]
    found.sort()
    ends = [pts - 1 for pts, _ in found[1:]] + [last]
    return tuple(_Key(place, pts, end) for (pts, place), end in zip(found, ends, strict=True))


def _read_packets(container: Any, stream: Any, codec: str, path: str) -> list[_Packet]:
    import av

    packets: list[_Packet] = []
    extra = bytes(stream.codec_context.extradata or b"")
    try:
        for packet in container.demux(stream):
            if not packet.size:  # a frame that AVI leaves out; PyAV's last one
                continue
            if packet.is_corrupt:
                raise ValueError(f"{path}: frame {len(packets)} is damaged: {_REMEDY}")
            packets.append(
                _Packet(
                    packet.pts,
                    packet.is_keyframe and _is_clean_key(codec, packet, extra),
                    _is_shown(codec, packet) and not packet.is_discard,
                    None if packet.pts is None else packet.pts + (packet.duration or 0),
                )
            )
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} is damaged or cut short after {len(packets)} frames: {reason_of(error)}; "
            f"{_REMEDY}"
        ) from error
    return packets


def _check_whole(packets: list[_Packet], container: Any, stream: Any, kind: str, path: str) -> None:
    """Compares with what the file announces, where it is known to announce rightly."""
    announced, found = stream.frames, len(packets)
    # Not `stream.frames`: an edit list may leave some of them out.
    if kind == "mov" and len(stream.index_entries) > found:
        raise ValueError(
            f"{path} is cut short: it has {found} of its {len(stream.index_entries)} frames; "
            f"{_REMEDY}"
        )
    if kind == "avi" and announced > found:
        logging.warning("%s announces %d frames and has %d", path, announced, found)
    # Without sound, Matroska's length is the film's.
    if kind == "matroska" and len(container.streams) == 1 and container.duration:
        ends = [p.end for p in packets if p.end is not None]
        end_s = float(max(ends, default=0) * stream.time_base)
        missing_s = container.duration / 1e6 - end_s
        if missing_s > max(0.5, 2.0 * end_s / max(found, 1)):
            raise ValueError(
                f"{path} is cut short: its {found} frames end {missing_s:.1f} s before its "
                f"announced end; {_REMEDY}"
            )


def _begins_clean(packets: list[_Packet]) -> bool:
    """Whether every packet can be decoded: none of them needs one before the file's first.

    A film cut out of a longer one may begin with frames that a decoder silently leaves out.
    """
    if not packets or not packets[0].is_key:
        return False
    times = [p.pts for p in packets if p.pts is not None]
    return not times or packets[0].pts == min(times)


def _is_shown(codec: str, packet: Any) -> bool:
    """False for VP8's and VP9's frames that only serve to predict others."""
    if codec == "vp8":
        return bool(memoryview(packet)[0] & 0x10)
    if codec == "vp9":
        data = memoryview(packet)
        if data[-1] & 0xE0 == 0xC0:  # a superframe; the last frame in it is shown
            return True
        first = int.from_bytes(bytes(data[:2]).ljust(2, b"\0"), "big")
        flags = first << 1 if first & 0x3000 == 0x3000 else first  # profile 3 has one bit more
        show_existing, show = flags & 0x0800, flags & 0x0200
        return bool(show_existing or show)
    return True


def _is_clean_key(codec: str, packet: Any, extra: bytes) -> bool:
    """Whether no frame shown after this key frame needs one before it.

    In H.264 only an IDR picture promises that; files mark other places too, from which a decoder
    recovers by and by.
    """
    if codec == "h264":
        return any(unit & 0x1F == 5 for unit in _units(memoryview(packet), extra, 4))
    if codec == "hevc":
        return any(16 <= unit >> 1 & 0x3F <= 21 for unit in _units(memoryview(packet), extra, 21))
    return True


def _units(data: memoryview, extra: bytes, size_at: int) -> Iterator[int]:
    """The first byte of each unit of an H.264 or H.265 packet.

    Where the codec's extra data has a version, byte `size_at` of it says how many bytes a unit's
    length takes; else start codes stand between units, as in AVI.
    """
    if extra[:1] != b"\x01" or len(extra) <= size_at:
        for match in re.finditer(rb"\x00\x00\x01(.)", data, re.DOTALL):
            yield match[1][0]
        return
    size = (extra[size_at] & 3) + 1
    place = 0
    while place + size < len(data):
        yield data[place + size]
        place += size + int.from_bytes(data[place : place + size], "big")


def _compact(stamps: list[int]) -> range | np.ndarray:
    steps = np.diff(stamps)
    if len(steps) and (steps == steps[0]).all():
        return range(stamps[0], stamps[-1] + 1, int(steps[0]))
    return np.array(stamps, np.int32 if abs(stamps[0]) + stamps[-1] < 2**31 else np.int64)


def _count_frames(path: str) -> int:
    """Counts by decoding everything: the files whose packets do not tell."""
    try:
        with _opened(path) as (container, stream):
            count = sum(1 for _ in _decoded(container, stream, path))
    except _WrongFrames as error:
        raise ValueError(f"{error}: {_REMEDY}") from error
    if not count:
        raise ValueError(f"{path} holds no frames, or is cut short: {_REMEDY}")
    return count


def _decoded(container: Any, stream: Any, path: str) -> Iterator[Any]:
    """The frames from where the container stands on.

    Raises:
        _WrongFrames: one is damaged.
    """
    import av

    count = 0
    try:
        for packet in container.demux(stream):
            if not packet.size and packet.dts is not None:
                continue  # AVI: "the last frame again"; a decoder would take it for the end
            for frame in _decode_packet(packet):
                if frame.is_corrupt:
                    raise _WrongFrames(f"{path}: frame {count} is damaged")
                count += 1
                yield frame
    except av.FFmpegError as error:
        raise _WrongFrames(
            f"{path}: frame {count} cannot be decoded ({reason_of(error)})"
        ) from error


def _decode_packet(packet: Any) -> list[Any]:
    return packet.decode()


def _decode(path: str, film: VideoIndex, wanted: list[int]) -> dict[int, np.ndarray]:
    """Decodes the frames `wanted`, ascending: number -> uint8 [H, W, 3]."""
    try:
        if film.stamps is None:
            return _decode_counting(path, wanted)
        runs = _runs(film, wanted)
        if runs[-1][0].packet > 0:
            try:
                return _decode_by_time(path, film, runs)
            except _WrongFrames as error:
                # The container's seeking is off, or the key frame is none: from the start, then.
                logging.debug("%s; decoding from the start", error)
        return _decode_by_time(path, film, [(_START, wanted)])
    except _WrongFrames as error:
        raise ValueError(
            f"{error}; the file announces {film.num_frames} frames and is damaged or cut short: "
            f"{_REMEDY}"
        ) from error


def _runs(film: VideoIndex, wanted: list[int]) -> list[tuple[_Key, list[int]]]:
    """Groups frames by the last key frame that is shown no later than they are."""
    assert film.stamps is not None
    keys = film.keys or (_START,)
    times = [key.pts for key in keys]
    runs: dict[_Key, list[int]] = {}
    for frame in wanted:
        place = bisect.bisect_right(times, film.stamps[frame]) - 1
        runs.setdefault(keys[max(place, 0)], []).append(frame)
    return list(runs.items())


def _decode_by_time(
    path: str, film: VideoIndex, runs: list[tuple[_Key, list[int]]]
) -> dict[int, np.ndarray]:
    """Decodes runs of frames, each from its key frame on; frames are known by their times."""
    assert film.stamps is not None
    numbers = {int(film.stamps[frame]): frame for _, frames in runs for frame in frames}
    images: dict[int, np.ndarray] = {}
    with _opened(path) as (container, stream):
        reached = 0  # packets
        for key, frames in runs:
            pending = set(frames) - images.keys()
            first = None
            if pending and key.packet > reached:
                first, reached = _seek(container, stream, key, path), key.packet
            last = int(film.stamps[frames[-1]])
            packets = _packets_from(container, stream, first, path)
            while pending:
                decoded = next(packets, None)
                if decoded is None:
                    break
                reached += 1
                for frame in decoded:
                    number = numbers.get(frame.pts)
                    if number is not None:
                        images[number] = _pixels(frame)
                        pending.discard(number)
                if any(frame.pts is None or frame.pts > last for frame in decoded):
                    break  # frames come in the order of display: what is missing will not come
            if pending:
                raise _WrongFrames(f"{path}: frame {min(pending)} cannot be decoded")
    return images


def _seek(container: Any, stream: Any, key: _Key, path: str) -> Any:
    """Goes to a key frame and returns its packet.

    Raises:
        _WrongFrames: the container cannot find it.
    """
    import av

    landed = None
    try:
        # MP4 with frames out of order takes some times for the key frame before or after.
        for time in (key.pts, key.until, (key.pts + key.until) // 2):
            container.seek(time, stream=stream, backward=True)
            packet = next(container.demux(stream), None)
            landed = None if packet is None else packet.pts
            if landed == key.pts:
                return packet
    except av.FFmpegError as error:
        raise _WrongFrames(f"{path}: seeking time {key.pts} failed ({reason_of(error)})") from error
    raise _WrongFrames(f"{path}: seeking time {key.pts} led to {landed}")


def _packets_from(container: Any, stream: Any, first: Any, path: str) -> Iterator[list[Any]]:
    """Yields the frames of `first`, if it is given, and of each packet after it.

    Raises:
        _WrongFrames: a frame is damaged.
    """
    import av

    frames = 0  # from the start: what is raised after a seek is tried again from there
    try:
        packets = container.demux(stream)
        for packet in packets if first is None else itertools.chain((first,), packets):
            decoded = _decode_packet(packet)
            if any(frame.is_corrupt for frame in decoded):
                raise _WrongFrames(f"{path}: frame {frames} is damaged")
            frames += len(decoded)
            yield decoded
    except av.FFmpegError as error:
        raise _WrongFrames(
            f"{path}: frame {frames} cannot be decoded ({reason_of(error)})"
        ) from error


def _decode_counting(path: str, wanted: list[int]) -> dict[int, np.ndarray]:
    images: dict[int, np.ndarray] = {}
    count, wanted_set = 0, set(wanted)
    with _opened(path) as (container, stream):
        for frame in _decoded(container, stream, path):
            if count in wanted_set:
                images[count] = _pixels(frame)
            if count == wanted[-1]:
                return images
            count += 1
    raise _WrongFrames(f"{path}: it has {count} frames, frame {wanted[-1]} is wanted")


def _pixels(frame: Any) -> np.ndarray:
    return upright(frame.to_ndarray(format="rgb24"), frame.rotation)


def read_frames(path: str, index: VideoIndex, choose: ChooseFrames) -> list[np.ndarray]:
    """Decodes the frames that `choose` names, and few others.

    Decoding begins at the key frame before the first one wanted where that is known to give the
    same pixels, otherwise at the start, and ends at the last one wanted. The pixels are those of
    `video.VideoFile`, upright.

    Args:
        path: of the file.
        index: its `read_index`.
        choose: given the number of frames and their rate, the frames to read.

    Returns:
        uint8 [H, W, 3], RGB: one per index that `choose` gave, in its order. A frame that is named
        twice is the same array twice.

    Raises:
        ValueError: the file is no video, damaged or cut short, or `choose` names a frame that it
            has not; the message names the file.
        FileNotFoundError: the file is gone.
    """
    wanted = _checked(choose(index.info), index, path)
    images = _decode(path, index, sorted(set(wanted)))
    return [images[frame] for frame in wanted]


def _checked(wanted: np.ndarray, film: VideoIndex, path: str) -> list[int]:
    frames = np.asarray(wanted)
    if frames.ndim != 1 or not len(frames) or frames.dtype.kind not in "iu":
        raise ValueError(f"{path}: frames to read are named by integers [n], n from 1: {wanted!r}")
    if frames.min() < 0 or frames.max() >= film.num_frames:
        outside = frames.min() if frames.min() < 0 else frames.max()
        raise ValueError(
            f"{path} has no frame {outside}: its {film.num_frames} frames are numbered from 0"
        )
    return frames.tolist()
