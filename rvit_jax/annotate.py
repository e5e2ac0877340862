"""What a stream's answers look like: bars on its frames as a film, and curves over its time."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FILM_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")
FRAME_HEIGHT = 360  # pixels; smaller frames are enlarged, larger ones stay
PANEL_WIDTH = 300
CURVE_POINTS = 4096  # an endless stream's curves are thinned to at most so many points
CURVES = 6
_BACKGROUND, _TEXT, _BAR, _BEST = (24, 26, 31), (235, 235, 235), (86, 106, 137), (242, 166, 60)


_font = functools.cache(ImageFont.load_default)  # or it is read anew for every frame


def draw_answer(image: np.ndarray, top: Sequence[tuple[str, float]], caption: str) -> np.ndarray:
    """A frame with its answer beside it.

    Args:
        image: uint8 [H, W, 3].
        top: class names and probabilities, best first.
        caption: a line above them.

    Returns:
        uint8 [H', W', 3], both even, as video codecs want them.
    """
    height, width = image.shape[:2]
    scale = max(1.0, min(FRAME_HEIGHT / height, 2 * FRAME_HEIGHT / width))
    new_height, new_width = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
    canvas = Image.new("RGB", (new_width + PANEL_WIDTH, new_height), _BACKGROUND)
    canvas.paste(Image.fromarray(image).resize((new_width, new_height)), (0, 0))
    draw = ImageDraw.Draw(canvas)
    font, small = _font(15), _font(13)
    left, right = new_width + 14, new_width + PANEL_WIDTH - 14
    draw.text((left, 10), caption, fill=_TEXT, font=small)
    row = max(34, min(52, (new_height - 40) // max(len(top), 1)))
    for rank, (name, probability) in enumerate(top):
        y = 38 + rank * row
        if y + 30 > new_height:
            break
        draw.text((left, y), shortened(draw, name, font, right - left - 48), _TEXT, font)
        draw.text((right, y), f"{100 * probability:.0f} %", fill=_TEXT, font=font, anchor="ra")
        draw.rectangle((left, y + 20, right, y + 25), fill=(52, 56, 64))
        colour = _BEST if rank == 0 else _BAR
        end = left + round((right - left) * probability)
        if end > left:
            draw.rectangle((left, y + 20, end, y + 25), fill=colour)
    return np.asarray(canvas)


def shortened(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
) -> str:
    """`text`, cut to `width` pixels with an ellipsis."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def check_film(path: Path) -> None:
    """Raises ValueError for another ending than those of `FILM_SUFFIXES`."""
    if path.suffix.lower() not in FILM_SUFFIXES:
        raise ValueError(f"{path}: films are written with the ending {', '.join(FILM_SUFFIXES)}")


class Film:
    """An H.264 film, written aside and renamed when it is closed.

    Args:
        path: where it goes; the ending chooses the container (.mp4, .mkv, ...).
        frame_rate: frames per second.

    Raises:
        OSError: the file cannot be written.
        ValueError: as `check_film`.
    """

    def __init__(self, path: Path, frame_rate: float):
        import av

        self.path = Path(path).expanduser()
        check_film(self.path)
        self.aside = self.path.with_name(f".tmp.{self.path.name}")
        self._open = True
        with self._named_errors():
            self._container = av.open(f"file:{self.aside}", "w")
            rate = Fraction(frame_rate).limit_denominator(1001)
            self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._sized = False

    def add(self, image: np.ndarray) -> None:
        """Appends uint8 [H, W, 3]; H and W are even and the same for all."""
        import av

        with self._named_errors():
            if not self._sized:
                self._stream.height, self._stream.width = image.shape[:2]
                self._sized = True
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finishes the file and gives it its name; without frames there is none."""
        if not self._sized:
            self.discard()
        if not self._open:
            return
        with self._named_errors():
            self._container.mux(self._stream.encode())
            self._container.close()
            os.replace(self.aside, self.path)
        self._open = False

    def discard(self) -> None:
        """Leaves nothing; after `close`, does nothing."""
        import av

        if self._open:
            self._open = False
            with contextlib.suppress(av.FFmpegError, OSError, ValueError):
                self._container.close()
            self.aside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """FFmpeg's errors name no file, or the one aside. What was begun is taken away."""
        import av

        try:
            yield
        except (av.FFmpegError, OSError, ValueError) as error:
            self._open = False
            self.aside.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise OSError(f"{self.path} cannot be written: {reason}") from error


class Curves:
    """Probabilities over time, kept in bounded memory and drawn at the end.

    Args:
        class_names: K names, in index order.
    """

    def __init__(self, class_names: Sequence[str]):
        self._class_names = tuple(class_names)
        self._times: list[float] = []
        self._points: list[np.ndarray] = []
        self._every, self._seen = 1, 0

    def add(self, time_s: float, probabilities: np.ndarray) -> None:
        """Appends the answer [K] after the frame at `time_s`."""
        if self._seen % self._every == 0:
            if len(self._times) == CURVE_POINTS:
                self._times, self._points = self._times[::2], self._points[::2]
                self._every *= 2
            if self._seen % self._every == 0:
                self._times.append(time_s)
                self._points.append(probabilities.astype(np.float32))
        self._seen += 1

    def draw(self, path: Path, title: str) -> None:
        """Writes a PNG: the classes that were ever likeliest, most of the time first."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from rvit_jax.figures import write_png

        points = np.stack(self._points)  # [n, K]
        wins = np.bincount(points.argmax(axis=1), minlength=points.shape[1])
        order = np.lexsort((points.max(axis=0), wins))[::-1][:CURVES]
        figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        marker = "o" if len(points) < 60 else None
        for index in order:
            axes.plot(
                self._times, points[:, index], marker=marker, ms=3, label=self._class_names[index]
            )
        axes.set(xlabel="time [s]", ylabel="probability", ylim=(-0.02, 1.02))
        readable = os.fsencode(title).decode(errors="replace")
        axes.set_title(readable, parse_math=False)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        write_png(figure, Path(path).expanduser(), dpi=120)
