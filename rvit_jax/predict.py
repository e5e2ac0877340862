"""Streaming prediction: python -m rvit_jax.predict --checkpoint=results/gestures --input=FILE

Reads videos frame by frame and answers after every frame: a video file, a folder of images, a
camera (camera:0) or raw frames on standard input (-). Several inputs go through the model as one
batch. Frames are taken at the rate that the model was trained on. Memory does not grow.

Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after signal n, with the result
so far.
"""

from input_pipeline.command_line import (
    ArgumentError,
    Parser,
    check_output_file,
    leave_at_once,
    run,
)

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.video import IMAGE_SUFFIXES, Frame, RateSampler, Video, open_video

if TYPE_CHECKING:  # imported where they are needed: a wrong argument is told at once
    from rvit_jax.annotate import Curves, Film
    from rvit_jax.checkpoint import LoadedModel
    from rvit_jax.events import Event, EventDetector
    from rvit_jax.streaming import Streams

TIMED_FRAMES = 10_000  # the latest so many are what the percentiles are of
BAR_WIDTH = 30


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m rvit_jax.predict",
        description="Reads videos frame by frame and answers after every frame.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir (its best checkpoint), one checkpoint folder or a converted model",
    )
    add(
        "--input",
        required=True,
        action="append",
        metavar="FILE|FOLDER|camera:N|-",
        help="a video; -: raw RGB frames on standard input. Given again: one more stream, in the "
        "same batch",
    )
    add("--top_k", type=_number(int, 1), default=5, metavar="N", help="classes to show")
    add(
        "--every",
        type=_number(int, 1),
        default=1,
        metavar="N",
        help="report every N-th frame that the model reads",
    )
    add("--json", action="store_true", help="one JSON line per report, and one for the result")
    add("--events", action="store_true", help="report classes with their begin and end")
    add(
        "--save",
        type=Path,
        metavar="OUT.mp4",
        help="write the film with its answers, and OUT.png with their probability over time",
    )
    add("--frame_size", type=_frame_size, metavar="WxH", help="of raw frames, in pixels")
    add(
        "--frame_rate",
        type=_number(float, 1e-3),
        metavar="FPS",
        help="of the input, if it does not say (folders, raw frames) or says wrongly",
    )
    add(
        "--window",
        type=_number(int, 0),
        metavar="N",
        help="frames that a state may see before it begins anew; 0: no end, the raw recurrence. "
        "By default the training clips' length for a camera and -, else 0",
    )
    add(
        "--states",
        type=_number(int, 1),
        metavar="R",
        help="states that begin in turn within a window; by default one per frame, at most 16",
    )
    add(
        "--decay",
        type=_number(float, 1e-6, 1.0),
        default=1.0,
        metavar="F",
        help="forget: the state shrinks towards the initial one by this factor at every frame",
    )
    add(
        "--state",
        type=Path,
        metavar="FILE",
        help="go on from the state in FILE, if it exists, and write it there at the end",
    )
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _number(
    kind: type[int] | type[float], least: int | float, most: int | float = 1e9
) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value: int | float | None
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            limit = f" to {most:g}" if most < 1e9 else ""
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from {least:g}{limit}")
        return value

    return parse


def _frame_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT, as in 176x100")
    return int(match[1]), int(match[2])


class _Stopped(Exception):  # noqa: N818  no error
    """A signal came."""


class _Signals:
    """Remembers SIGINT and SIGTERM; interrupts only where the program waits for a frame.

    A second one leaves at once, and so does the first while nothing was read yet.

    Attributes:
        signum: the first signal, or 0.
        started: there is something to finish.
        films: what is not finished when leaving at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.started = False
        self.films: list[Film] = []
        self._waiting = False

    def __enter__(self) -> "_Signals":
        self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _take(self, signum: int, _frame: object) -> None:
        if self.signum or not self.started:
            for film in self.films:
                film.aside.unlink(missing_ok=True)
            os._exit(128 + signum)
        self.signum = signum
        if self._waiting:
            raise _Stopped

    def next(self, frames: Iterator[Frame]) -> Frame | None:
        """The next frame; None at the end."""
        if self.signum:
            raise _Stopped
        self._waiting = True
        try:
            return next(frames, None)
        finally:
            self._waiting = False


@dataclasses.dataclass
class _Stream:
    """One input on its way through the model."""

    video: Video
    frames: Iterator[Frame]
    sampler: RateSampler
    default_rate: float  # to tell the time of a video that cannot
    film: "Film | None"
    curves: "Curves | None"
    events: "EventDetector | None"
    active: bool = True
    failure: Exception | None = None  # what ended it before its end
    num_frames: int = 0
    num_steps: int = 0
    frame: Frame = dataclasses.field(init=False)  # the last one read
    probabilities: np.ndarray | None = None  # [K], after the last frame that the model read

    @property
    def answer(self) -> np.ndarray:
        """`probabilities`, once there are some."""
        assert self.probabilities is not None
        return self.probabilities

    def time_of(self, frame: Frame) -> float:
        """Seconds since the first frame."""
        return frame.index / self.default_rate if frame.time_s is None else frame.time_s


class _Report:
    """Everything that is said on standard output."""

    def __init__(self, args: argparse.Namespace, class_names: tuple[str, ...]):
        self._json, self._top_k = args.json, args.top_k
        self._names = class_names
        self._several = len(args.input) > 1
        self._redraw = sys.stdout.isatty() and not args.json
        self._lines = 0  # of the block that the next one is drawn over
        self.closed = False  # nobody reads any more

    def top(self, probabilities: np.ndarray) -> list[tuple[str, float]]:
        """Class names and probabilities, best first."""
        order = np.argsort(-probabilities, kind="stable")[: self._top_k]
        return [(self._names[index], float(probabilities[index])) for index in order]

    def answers(self, answered: list[_Stream], streams: list[_Stream]) -> None:
        """What the last frames of the streams that answered showed.

        A terminal shows all streams, drawn over what it showed before.
        """
        if self._redraw:
            self._draw([stream for stream in streams if stream.probabilities is not None])
            return
        lines = []
        for stream in answered:
            time_s, top = stream.time_of(stream.frame), self.top(stream.answer)
            if self._json:
                self._print_json(
                    stream, {"frame": stream.frame.index, "time_s": round(time_s, 3), "top": top}
                )
            else:
                words = "  ".join(f"{name} {100 * p:.0f} %" for name, p in top)
                lines.append(f"{time_s:9.2f} s  {self._label(stream)}{words}")
        if lines:
            self._print("\n".join(lines))

    def _draw(self, streams: list[_Stream]) -> None:
        width, height = shutil.get_terminal_size()
        lines = []
        for stream in streams:
            lines += self._bars(stream, stream.time_of(stream.frame), self.top(stream.answer))
        lines = [line[: width - 1] for line in lines][: height - 1]
        up = f"\x1b[{self._lines}A\x1b[J" if self._lines else ""
        self._print(up + "\n".join(lines))
        self._lines = len(lines)

    def _bars(self, stream: _Stream, time_s: float, top: list[tuple[str, float]]) -> list[str]:
        widest = max(len(name) for name in self._names)
        name = f"  {stream.video.name}" if self._several else ""  # last, for it may be cut off
        lines = [f"frame {stream.frame.index}, {time_s:.2f} s{name}"]
        for name, probability in top:
            eighths = round(8 * BAR_WIDTH * probability)
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
            lines.append(f"  {name:{widest}} {100 * probability:5.1f} % {bar}")
        return lines

    def event(self, stream: _Stream, event: "Event") -> None:
        """Something that happened, once it is over."""
        self._lines = 0
        if self._json:
            values = dataclasses.asdict(event)
            name = values.pop("class_name")
            rounded = {key: round(value, 4) for key, value in values.items()}
            self._print_json(stream, {"event": name, **rounded})
        else:
            self._print(
                f"event: {self._label(stream)}{event.class_name} from {event.start_s:.2f} s to "
                f"{event.end_s:.2f} s ({100 * event.confidence:.0f} %)"
            )

    def result(self, stream: _Stream, milliseconds: list[float]) -> None:
        """The answer after the last frame."""
        best, probability = self.top(stream.answer)[0]
        p50, p95 = np.percentile(milliseconds, [50, 95])
        if self._json:
            record = {
                "result": best,
                "probability": probability,
                "num_frames": stream.num_frames,
                "num_steps": stream.num_steps,
                "ms_per_frame_p50": round(float(p50), 3),
                "ms_per_frame_p95": round(float(p95), 3),
            }
            if stream.video.live:
                record["num_dropped"] = stream.video.dropped
            self._print_json(stream, record)
            return
        dropped = f", {stream.video.dropped} dropped" if stream.video.live else ""
        self._print(
            f"result: {self._label(stream)}{best} {100 * probability:.1f} % after "
            f"{stream.num_frames} frames, of which the model read {stream.num_steps}{dropped}; "
            f"{p50:.1f} ms per frame read (95 %: {p95:.1f} ms)"
        )

    def _label(self, stream: _Stream) -> str:
        return f"{stream.video.name}: " if self._several else ""

    def _print_json(self, stream: _Stream, record: dict[str, Any]) -> None:
        source = {"input": stream.video.name} if self._several else {}
        self._print(json.dumps(source | record))

    def _print(self, text: str) -> None:
        if not self.closed:
            print(text, flush=True)


def predict(args: argparse.Namespace) -> int:
    """Reads all inputs to their ends; returns the signal that ended them before, or 0.

    Raises:
        ArgumentError: the arguments contradict each other.
        OSError: a file is missing or cannot be read or written.
        ValueError: an input, the checkpoint or a value cannot be used. What fails amid its frames
            does so after the results of the frames before it, and of the other inputs.
    """
    _check_arguments(args)
    _check_outputs(args)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        videos = [
            stack.enter_context(
                open_video(name, frame_rate=args.frame_rate, frame_size=args.frame_size)
            )
            for name in args.input
        ]
        import rvit_jax
        from rvit_jax.streaming import Streams

        loaded = rvit_jax.load(args.checkpoint)
        dataset = loaded.config.dataset
        if dataset.frame_packing == "channel_planes":
            raise ValueError(
                f"{args.checkpoint} was trained with dataset.frame_packing=channel_planes: its "
                "frames hold colours of other moments, and cannot be had one at a time; use "
                "python -m rvit_jax.main --mode=evaluate"
            )
        if dataset.sampling in ("uniform", "random"):
            _warn(
                f"{args.checkpoint} was trained on {dataset.num_frames} frames spread over each "
                f"whole video (dataset.sampling={dataset.sampling}); a stream has no end to spread "
                f"them to: it sees {dataset.frame_rate / dataset.frame_stride:g} a second"
            )
        window = args.window
        if window is None:
            window = dataset.num_frames if any(video.endless for video in videos) else 0
        states = Streams(
            loaded.model,
            len(videos),
            window=window,
            num_states=args.states,
            decay=args.decay,
            multi_label=loaded.config.loss.name == "binary_cross_entropy",
        )
        if args.state is not None and args.state.expanduser().exists():
            states.restore(args.state)
        streams = [
            _open_stream(stack, args, video, index, loaded) for index, video in enumerate(videos)
        ]
        side = loaded.config.model.image_size
        states.compile((side, side))
        signals.films = [stream.film for stream in streams if stream.film is not None]
        signals.started = True
        report = _Report(args, loaded.class_names)
        milliseconds: deque[float] = deque(maxlen=TIMED_FRAMES)
        try:
            _run(args, streams, states, report, signals, loaded.resize, milliseconds)
        except _Stopped:
            pass  # as at the end; `signals` knows which
        except BrokenPipeError:
            report.closed = True
        _finish(args, streams, states, report, list(milliseconds))
        _raise_failures(streams)
        return signal.SIGPIPE if report.closed else signals.signum


def _open_stream(
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    video: Video,
    index: int,
    loaded: "LoadedModel",
) -> _Stream:
    from rvit_jax.annotate import Curves, Film
    from rvit_jax.events import EventDetector

    dataset = loaded.config.dataset
    rate = float(dataset.frame_rate)
    if video.frame_rate is not None and video.frame_rate < 0.9 * rate / dataset.frame_stride:
        _warn(
            f"{video.name} has {video.frame_rate:g} frames per second, the model was trained on "
            f"{rate / dataset.frame_stride:g}: movements look faster to it than they are"
        )
    film = None
    if args.save is not None:
        film = Film(_numbered(args.save, index, len(args.input)), video.frame_rate or rate)
        stack.callback(film.discard)  # unless it was finished
    return _Stream(
        video,
        iter(video),
        RateSampler(video.frame_rate, rate, dataset.frame_stride),
        video.frame_rate or rate,
        film,
        Curves(loaded.class_names) if args.save is not None else None,
        EventDetector(loaded.class_names) if args.events else None,
    )


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises ArgumentError where the flags contradict each other or an input cannot be."""
    pipe, endless = "-" in args.input, any(_is_endless(name) for name in args.input)
    for name in args.input:
        if "://" in name:
            raise ArgumentError(
                f"--input={name}: addresses are not read; let FFmpeg read it: ffmpeg -i {name} -f "
                "rawvideo -pix_fmt rgb24 -s 176x100 - | python -m rvit_jax.predict --checkpoint="
                f"{args.checkpoint} --input=- --frame_size=176x100"
            )
    if args.input.count("-") > 1:
        raise ArgumentError("standard input (-) can be one input only")
    if pipe and args.frame_size is None:
        raise ArgumentError("--input=-: raw frames need --frame_size=WIDTHxHEIGHT")
    if args.frame_size is not None and not pipe:
        raise ArgumentError(
            "--frame_size is for raw frames on standard input (--input=-): files, folders and "
            "cameras tell their own size; leave it out"
        )
    window = args.window if args.window is not None or endless else 0
    if args.states is not None and window == 0:
        raise ArgumentError(
            f"--states={args.states} is for a window, and there is none: say --window=N too, the "
            "frames that a state may see"
        )
    if args.states is not None and window is not None and args.states > window:
        raise ArgumentError(
            f"--states={args.states} is more than --window={window}: states begin in turn within "
            "the window, one per frame at most"
        )


def _is_endless(name: str) -> bool:
    return name == "-" or name.startswith("camera:")


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises OSError or ValueError where a file cannot be put: better now than after an hour."""
    from rvit_jax.annotate import check_film

    outputs = [] if args.state is None else [args.state]
    if args.save is not None:
        films = [_numbered(args.save, index, len(args.input)) for index in range(len(args.input))]
        outputs += films + [film.with_suffix(".png") for film in films]
    inputs = [Path(name).expanduser() for name in args.input]
    seen: dict[str, Path] = {}
    for path in (output.expanduser() for output in outputs):
        check_output_file(path)
        if any(path.exists() and name.exists() and path.samefile(name) for name in inputs):
            raise ValueError(f"{path} is an input, and would be replaced: name another file")
        in_input = any(name.is_dir() and name.samefile(path.parent) for name in inputs)
        if in_input and path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(
                f"{path} would become a frame of the input, or replace one: name a file outside of "
                f"{path.parent}"
            )
        if seen.setdefault(os.path.realpath(path), path) is not path:
            raise ValueError(f"{path} is to hold two things: name another file for one of them")
    if args.save is not None:
        check_film(args.save)


def _numbered(path: Path, index: int, count: int) -> Path:
    """OUT.mp4, or OUT_1.mp4, OUT_2.mp4, ... for several inputs."""
    return path if count == 1 else path.with_name(f"{path.stem}_{index + 1}{path.suffix}")


def _run(
    args: argparse.Namespace,
    streams: list[_Stream],
    states: "Streams",
    report: _Report,
    signals: _Signals,
    resize: Callable[[np.ndarray], np.ndarray],
    milliseconds: deque[float],
) -> None:
    """The loop: the next frame of each stream that the model should see, one step, the answers."""
    batch = None
    while True:
        active = np.array([_next_due(stream, report, signals) for stream in streams])
        if not active.any():
            return
        due = [(row, streams[row]) for row in np.flatnonzero(active)]
        start = time.perf_counter()
        for row, stream in due:
            square = resize(stream.frame.image)
            if batch is None:
                batch = np.zeros((len(streams), *square.shape), np.uint8)
            batch[row] = square
        assert batch is not None  # one stream is due
        probabilities = states.step(batch, active)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        for row, stream in due:
            _take_answer(stream, probabilities[row], report)
        to_report = [s for _, s in due if (s.num_steps - 1) % args.every == 0]
        if to_report:
            report.answers(to_report, streams)


def _next_due(stream: _Stream, report: _Report, signals: _Signals) -> bool:
    """Reads on to the next frame that the model should see; False at the end."""
    while stream.active:
        try:
            frame = signals.next(stream.frames)
        except (OSError, ValueError) as error:  # the other streams go on
            stream.failure, frame = error, None
        if frame is None:
            stream.active = False
            return False
        stream.frame = frame
        stream.num_frames += 1
        if stream.sampler.take(frame):
            return True
        _add_to_film(stream, report)
    return False


def _take_answer(stream: _Stream, probabilities: np.ndarray, report: _Report) -> None:
    stream.num_steps += 1
    stream.probabilities = probabilities
    time_s = stream.time_of(stream.frame)
    _add_to_film(stream, report)
    if stream.curves is not None:
        stream.curves.add(time_s, probabilities)
    if stream.events is not None:
        event = stream.events.update(time_s, probabilities)
        if event is not None:
            report.event(stream, event)


def _add_to_film(stream: _Stream, report: _Report) -> None:
    if stream.film is not None:
        from rvit_jax.annotate import draw_answer

        caption = f"{stream.time_of(stream.frame):.2f} s"
        top = report.top(stream.answer)
        stream.film.add(draw_answer(stream.frame.image, top, caption))


def _finish(
    args: argparse.Namespace,
    streams: list[_Stream],
    states: "Streams",
    report: _Report,
    milliseconds: list[float],
) -> None:
    """What is known at the end: open events, results, films, pictures, and always the state."""
    try:
        for index, stream in enumerate(streams):
            if stream.probabilities is not None:  # not stopped before its first frame
                _finish_stream(args, index, stream, report, milliseconds)
    finally:
        if args.state is not None:
            states.save(args.state)


def _raise_failures(streams: list[_Stream]) -> None:
    """What could not be read, once the rest is safe."""
    failures = [stream.failure for stream in streams if stream.failure is not None]
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ValueError(f"{len(failures)} inputs failed: {'; '.join(map(str, failures))}")


def _finish_stream(
    args: argparse.Namespace,
    index: int,
    stream: _Stream,
    report: _Report,
    milliseconds: list[float],
) -> None:
    if stream.video.problem:
        _warn(f"{stream.video.name}: {stream.video.problem}")
    try:
        if stream.events is not None and (event := stream.events.finish()) is not None:
            report.event(stream, event)
        report.result(stream, milliseconds)
    except BrokenPipeError:
        report.closed = True
    if stream.film and stream.curves and stream.failure is None:  # no half films
        film = _numbered(args.save, index, len(args.input))
        picture = film.with_suffix(".png")
        stream.film.close()
        stream.curves.draw(picture, Path(stream.video.name).name)
        print(f"written to {film} and {picture}", file=sys.stderr)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run(_work, ["predict", *(sys.argv[1:] if argv is None else argv)])


def _work(argv: list[str]) -> int:
    signum = predict(_parser().parse_args(argv[1:]))
    if signum == signal.SIGPIPE:  # whoever read our output has enough; nor say so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signum if signum else 0


if __name__ == "__main__":
    sys.exit(main())
