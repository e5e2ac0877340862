"""Frames of one video after the other: from a file, a folder of images, a camera or a pipe.

`open_video` is the public name. Nothing is read ahead but what a decoder holds, so that a video may
be endless. A frame's time is the source's own where it has one: frames are chosen by time
(`RateSampler`), not by counting, and a variable frame rate does no harm.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

CAMERA_PATIENCE_S = 5.0
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FILM_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")  # to be named in a message


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        index: its place in the video, from 0; frames that a live source dropped are counted.
        time_s: seconds since the first frame; None where the source has neither times nor a rate.
        image: uint8 [H, W, 3], RGB; films upright, images as they are stored, as in training.
    """

    index: int
    time_s: float | None
    image: np.ndarray


class Video(ABC):
    """A video being read, frame by frame, once; a context manager.

    Attributes:
        name: what the user called it.
        frame_rate: frames per second, where known.
        live: frames come at their own time, and wait for nobody.
        endless: nobody knows when it ends.
        dropped: frames of a live source that came while nobody looked.
        problem: what was wrong with a video that could be read in part; known at its end.
    """

    live = endless = False

    def __init__(self, name: str, frame_rate: float | None = None):
        if frame_rate is not None and not 0.0 < frame_rate < 1e6:
            raise ValueError(f"{name}: a rate of {frame_rate} frames per second cannot be")
        self.name = name
        self.frame_rate = frame_rate
        self.dropped = 0
        self.problem: str | None = None

    def __iter__(self) -> Iterator[Frame]:
        """Yields the frames.

        Raises:
            ValueError: there is none, one is of another size than the first, or one is unreadable.
        """
        shape = None
        for frame in self._frames():
            if shape is None:
                shape = frame.image.shape
            elif frame.image.shape != shape:
                (height, width, _), (new_height, new_width, _) = shape, frame.image.shape
                raise ValueError(
                    f"{self.name}: frame {frame.index} has {new_width} x {new_height} pixels, the "
                    f"frames before it {width} x {height}; a video has frames of one size: split "
                    "it there, or scale it first"
                )
            yield frame
        if shape is None:
            raise ValueError(f"{self.name} holds no frames{_because(self.problem)}")

    @abstractmethod
    def _frames(self) -> Iterator[Frame]:
        """The frames, whatever their sizes."""

    def _time(self, index: int) -> float | None:
        return None if self.frame_rate is None else index / self.frame_rate

    def close(self) -> None:  # noqa: B027  nothing to do for most
        """Lets go of the file or device."""

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_video(
    source: str, *, frame_rate: float | None = None, frame_size: tuple[int, int] | None = None
) -> Video:
    """Opens a video.

    Args:
        source: a video file, a folder of images (read in the order of the numbers in their names),
            "camera:N", or "-" for raw frames on standard input (R, G, B bytes, row by row).
        frame_rate: frames per second, where the source does not say or says wrongly.
        frame_size: width and height of raw frames, in pixels.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is no video, has no picture, or a size is missing or cannot be.
    """
    if source == "-":
        if frame_size is None:
            raise ValueError("raw frames on standard input need --frame_size=WIDTHxHEIGHT")
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        return RawVideo(sys.stdin.buffer, frame_size, frame_rate)
    camera = re.fullmatch(r"camera:(\d{1,4})", source)
    if camera:
        return Camera(int(camera[1]), frame_rate)
    if not source:
        raise ValueError("an input has no name")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return ImageFolder(path, frame_rate)
    if not path.exists():
        hint = "; a camera is named by its number: camera:0" if source.startswith("camera") else ""
        raise FileNotFoundError(f"there is no file or folder {path}{hint}")
    return VideoFile(path, frame_rate)


def _because(problem: str | None) -> str:
    return f": {problem}" if problem else ""


# What FFmpeg may take a file for. Others, such as the text of an ffconcat or m3u8 list, name
# further files and addresses, which FFmpeg would open.
CONTAINERS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,gif,asf,flv,ogg,nut,mxf,yuv4mpegpipe,h264,hevc,m4v,"
    "h263,h261,vc1,mjpeg,ivf,obu,av1,dv,rm,wtv,apng,swf,3gp"
)


class VideoFile(Video):
    """A file, decoded with FFmpeg's libraries through PyAV.

    A damaged file gives the frames that can be decoded, and says so in `problem`.
    """

    def __init__(self, path: Path, frame_rate: float | None = None):
        import av
        from av.stream import Disposition

        av.logging.set_level(av.logging.PANIC)  # its lines name no file; `problem` does
        try:
            # A file, whatever its name looks like: no protocol.
            self._container = av.open(
                f"file:{path}", container_options={"format_whitelist": CONTAINERS}
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = reason_of(error)
            if path.stat().st_size == 0:
                reason = "the file is empty"
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                reason = "it is one image"
            raise ValueError(
                f"{path} cannot be read as a video: {reason}; expected a whole video file that "
                "FFmpeg can decode, a folder of images, camera:N or -"
            ) from error
        films = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & Disposition.attached_pic  # a record's cover
        ]
        if not films:
            kinds = {str(s.type) for s in self._container.streams} - {"video"}
            kinds = kinds or {"a still picture"}
            self._container.close()
            raise ValueError(
                f"{path} has no film, only {' and '.join(sorted(kinds))}, or is cut short"
            )
        self._stream = films[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate
        super().__init__(str(path), frame_rate or (float(rate) if rate else None))
        self._counts = frame_rate is not None  # frames' own times are not to be used
        self._start_s: float | None = None  # own time of the first frame
        self._time_s: float | None = None  # given to the last frame
        self._end_s = 0.0  # of the last packet, in the file's time
        self._discarded = 0  # packets that an edit list leaves out

    def _frames(self) -> Iterator[Frame]:
        count, damage = 0, None
        for packet, error in self._packets():
            damage = damage or error
            for decoded, error in self._decode(packet) if packet is not None else ():
                damage = damage or error
                if decoded is not None:
                    image = upright(decoded.to_ndarray(format="rgb24"), decoded.rotation)
                    yield Frame(count, self._time_of(decoded.time), image)
                    count += 1
        self.problem = self._what_is_missing(count, damage)

    def _time_of(self, stamp_s: float | None) -> float | None:
        """A frame's own time since the first one; counted on where that cannot be.

        Frames come in the order of display. Where their times go backwards, as in AVI files with
        frames that depend on later ones, they are the times of storage: from there on it counts.
        """
        if stamp_s is not None and self._start_s is None:
            self._start_s = stamp_s
        own_s = None
        if stamp_s is not None and self._start_s is not None:
            own_s = stamp_s - self._start_s
        last_s = self._time_s
        if own_s is None or (last_s is not None and own_s < last_s):
            self._counts = True
        if not self._counts and own_s is not None:
            self._time_s = own_s if last_s is None or own_s > last_s else last_s + 1e-3
        elif self.frame_rate is None:
            return None
        else:
            self._time_s = 0.0 if last_s is None else last_s + 1.0 / self.frame_rate
        return self._time_s

    def _what_is_missing(self, count: int, damage: str | None) -> str | None:
        """Of what the file announces. Formats that announce nothing (.ts, .gif) hide a loss."""
        announced = self._stream.frames - self._discarded
        of_how_many = f" of the {announced} announced" if announced > count else ""
        if damage is not None:
            return f"damaged or cut short ({damage}): {count} frames{of_how_many} could be read"
        if announced > count:
            return f"cut short: it has {count} frames{of_how_many}"
        missing_s = (self._container.duration or 0) / 1e6 - self._end_s
        if missing_s > 0.5:
            return f"cut short: its {count} frames end {missing_s:.1f} s before its announced end"
        return None

    def _packets(self) -> Iterator[tuple[Any, str | None]]:
        """Packets of the film; at an error of the container, the reason, and the end.

        Sound is read along, for the file may be announced as long as that.
        """
        import av

        try:
            for packet in self._container.demux(self._stream, *self._container.streams.audio):
                if packet.pts is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    self._end_s = max(self._end_s, float(end))
                if packet.stream.index == self._stream.index:
                    self._discarded += packet.is_discard
                    yield packet, None
        except av.FFmpegError as error:
            yield None, reason_of(error)

    def _decode(self, packet: Any) -> Iterator[tuple[Any, str | None]]:
        """A packet's frames, or why it has none."""
        import av

        try:
            for decoded in packet.decode():
                damaged = "a damaged frame" if decoded.is_corrupt else None
                yield decoded, damaged
        except av.FFmpegError as error:
            yield None, reason_of(error)

    def close(self) -> None:
        """Closes the file."""
        self._container.close()


def reason_of(error: BaseException) -> str:
    """FFmpeg's own words, without the number and the file that PyAV puts around them."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def upright(image: np.ndarray, degrees: int) -> np.ndarray:
    """Turns a frame as its file asks, counterclockwise; telephones film lying down."""
    turns = round(degrees / 90.0) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class ImageFolder(Video):
    """A folder of images, in the order of the numbers in their names."""

    def __init__(self, folder: Path, frame_rate: float | None = None):
        self._files = sorted(
            (
                file
                for file in folder.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES
                and not file.name.startswith(".")
                and file.is_file()
            ),
            key=_natural,
        )
        if not self._files:
            films = sorted(f for f in folder.iterdir() if f.suffix.lower() in FILM_SUFFIXES)
            hint = f"; it holds video files: name one, such as {films[0]}" if films else ""
            raise ValueError(
                f"{folder} holds no images: expected files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}{hint}"
            )
        super().__init__(str(folder), frame_rate)

    def _frames(self) -> Iterator[Frame]:
        for index, file in enumerate(self._files):
            yield Frame(index, self._time(index), _read_image(file))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 2.jpg before 10.jpg."""
    return [
        (int(part), part) if part.isdecimal() else (-1, part)
        for part in re.findall(r"\d+|\D+", path.name)
    ]


def _read_image(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError("its pixels have more than 8 bits; convert it first")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the frame {file}: {error}") from error


class RawVideo(Video):
    """Raw RGB frames from a pipe, without end if need be."""

    endless = True

    def __init__(
        self, stream: BinaryIO, frame_size: tuple[int, int], frame_rate: float | None = None
    ):
        super().__init__("standard input", frame_rate)
        width, height = frame_size
        self._stream, self._shape = stream, (height, width, 3)

    def _frames(self) -> Iterator[Frame]:
        size, index = int(np.prod(self._shape)), 0
        while data := _read_up_to(self._stream, size):
            if len(data) < size:
                self.problem = (
                    f"ends within a frame: {len(data)} bytes after {index} whole frames, a frame "
                    f"has {size}; is --frame_size right?"
                )
                return
            image = np.frombuffer(data, np.uint8).reshape(self._shape)
            yield Frame(index, self._time(index), image)
            index += 1


def _read_up_to(stream: BinaryIO, size: int) -> bytes:
    """As many bytes as there are up to `size`: a pipe gives what it has, not what was asked for."""
    data = stream.read(size)
    while data and len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            break
        data += more
    return data or b""


class Camera(Video):
    """A camera, through OpenCV. Frames that come while the reader is busy are dropped."""

    live = endless = True

    def __init__(self, number: int, frame_rate: float | None = None):
        import cv2

        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise ValueError(f"camera:{number} is absent, busy or may not be opened")
        self._stop, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        own_rate = self._capture.get(cv2.CAP_PROP_FPS)
        super().__init__(f"camera:{number}", frame_rate or (own_rate if own_rate > 0 else None))

    def _frames(self) -> Iterator[Frame]:
        yield from newest_frames(self._captured(), self)

    def _captured(self) -> Generator[Frame]:
        start, index = None, 0
        self._idle.clear()
        try:
            while not self._stop.is_set():
                there, image = self._capture.read()
                if not there:
                    self.problem = "the camera gives no more frames"
                    return
                now = time.monotonic()
                start = now if start is None else start
                yield Frame(index, now - start, np.ascontiguousarray(image[..., ::-1]))
                index += 1
        finally:
            self._idle.set()

    def close(self) -> None:
        """Gives the camera back, once the thread that reads it has stopped."""
        self._stop.set()
        if self._idle.wait(CAMERA_PATIENCE_S):  # released under a read, OpenCV may crash
            self._capture.release()


def newest_frames(frames: Generator[Frame], video: Video) -> Iterator[Frame]:
    """Reads `frames` in a thread and yields the newest one there is whenever it is asked.

    Frames that were never the newest when asked for are counted in `video.dropped`.
    """
    condition = threading.Condition()
    newest: list[Frame] = []
    ended: list[BaseException | None] = []

    def read() -> None:
        failure: BaseException | None = None
        try:
            for frame in frames:
                with condition:
                    video.dropped += len(newest)
                    newest[:] = [frame]
                    condition.notify()
                    if ended:
                        break
        except Exception as error:  # raised where the frames are asked for
            failure = error
        frames.close()
        with condition:
            ended.append(failure)
            condition.notify()

    threading.Thread(target=read, daemon=True, name="newest_frames").start()
    try:
        while True:
            with condition:
                condition.wait_for(lambda: newest or ended)
                if not newest:
                    if ended[0] is not None:
                        raise ended[0]
                    return
                frame = newest.pop()
            yield frame
    finally:
        with condition:
            ended.append(None)


class RateSampler:
    """Chooses the frames of a video that a model should see.

    Args:
        source_rate: the video's frames per second; None where it has none.
        frame_rate: frames per second of the videos that the model was trained on.
        frame_stride: of those, it saw every k-th.
    """

    def __init__(self, source_rate: float | None, frame_rate: float, frame_stride: int):
        self._stride = frame_stride
        self._target = frame_rate / frame_stride
        self._half_period = 0.0 if source_rate is None else 0.5 / source_rate
        self._due = 0.0

    def take(self, frame: Frame) -> bool:
        """Whether the model should see the frame: the nearest one to each due time.

        Without times, every k-th. A video slower than the model's gives (nearly) all its frames.
        """
        if frame.time_s is None:
            return frame.index % self._stride == 0
        reached = (frame.time_s + self._half_period) * self._target
        if reached < self._due:
            return False
        self._due = np.floor(reached) + 1.0
        return True
