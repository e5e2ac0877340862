"""How much memory the preparing of 20BN-Jester takes, on a made-up download of any length.

    python -m tests.long_stream [--clips=148092] [--parts=23] [--keep]

An archive of the download's kind, a .tar.gz in parts, is made on the fly by a second process and
comes through a pipe: no part of it is ever on the disk. It is read by what
`scripts/prepare_jester.py` reads the download with, and written as shards; a shard that is finished
is emptied, unless `--keep` is given, so that the disk holds one at a time (0.3 GB). By default it
is of the download's size: 148,092 clips of 36 frames, 23 parts, 22 GB.

A line per GB tells the seconds since the start and this process's memory; the last line is JSON:
`bytes`, `clips`, `seconds`, `start_mib` (before anything is read), `peak_mib` (of the whole run),
`tensorflow` (whether it was imported).
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from input_pipeline import jester, jester_parts
from input_pipeline import jester_dataset_builder as builder

NUM_CLIPS = 148_092  # of 20BN-Jester
NUM_PARTS = 23
FRAMES_PER_CLIP = 36
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=NUM_CLIPS)
    parser.add_argument("--parts", type=int, default=NUM_PARTS)
    parser.add_argument("--keep", metavar="DIR", help="keep the shards, in this folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="long_stream_") as folder:
        print(json.dumps(measure(args.clips, args.parts, args.keep or folder, bool(args.keep))))
    return 0


def measure(num_clips: int, num_parts: int, out: str, keep: bool) -> dict[str, float]:
    """Prepares the made-up download in `out`; returns what the last line tells."""
    archive = Archive(num_clips)
    rows = tuple(jester.Row(i + 1, str(i), "Thumb Up") for i in range(num_clips))
    ids = frozenset(row.clip_id for row in rows)
    plan = builder.Plan({"train": rows}, {"train": True}, ids, jester.CLASS_NAMES, {"classes": []})
    if not keep:
        builder._Shards._close = emptying(builder._Shards._close)
    start, start_mib = time.monotonic(), memory_mib("VmRSS")
    with archive.through_a_pipe() as pipe:
        stream = Watched(pipe, start)
        size = -(-archive.num_bytes // num_parts)
        sizes = [min(size, archive.num_bytes - i * size) for i in range(num_parts)]
        parts = [
            jester_parts.Part(f"part {i}", n, functools.partial(Piece, stream, n))
            for i, n in enumerate(sizes)
        ]
        source = jester_parts.PartsSource(parts)
        made = builder.Jester(data_dir=out, preparation=(plan, source))
        made.download_and_prepare()
    return {
        "bytes": archive.num_bytes,
        "clips": made.info.splits["train"].num_examples,
        "seconds": round(time.monotonic() - start, 1),
        "start_mib": start_mib,
        "peak_mib": memory_mib("VmHWM"),  # ru_maxrss may be of what began this process
        "tensorflow": "tensorflow" in sys.modules,
    }


def memory_mib(field: str) -> int:
    """MiB by a field of Linux's /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith(f"{field}:"))


def emptying(close: Callable[[builder._Shards], None]) -> Callable[[builder._Shards], None]:
    """`_Shards._close`, which then empties the shard that it wrote."""

    def close_and_empty(shards: builder._Shards) -> None:
        was_open = shards._writer is not None
        close(shards)
        if was_open:
            os.truncate(shards._files[-1], 0)

    return close_and_empty


class Archive:
    """The same frames under the name of every clip, as a .tar.gz whose length is known beforehand.

    The frames' bytes are deflated once, and the tar headers are stored as they are, so that the
    making costs little beside the reading, which inflates all of it and checks its CRC.
    """

    def __init__(self, num_clips: int):
        self.num_clips = num_clips
        self.frames = []  # (size, its bytes with the padding, the same deflated)
        for number in range(FRAMES_PER_CLIP):
            frame = picture(number)
            content = frame + bytes(-len(frame) % tarfile.BLOCKSIZE)
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            deflated = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)
            self.frames.append((len(frame), content, deflated))
        per_clip = sum(len(stored(bytes(512))) + len(deflated) for *_, deflated in self.frames)
        ends = len(GZIP_HEADER) + len(stored(bytes(1024), last=True)) + 8
        self.num_bytes = num_clips * per_clip + ends

    def pieces(self) -> Iterator[bytes]:
        """The archive's bytes, a clip at a time."""
        crc, length = 0, 0
        yield GZIP_HEADER
        for clip in range(self.num_clips):
            pieces = []
            for number, (size, content, deflated) in enumerate(self.frames, 1):
                member = tarfile.TarInfo(f"20bn-jester-v1/{clip}/{number:05d}.jpg")
                member.size = size
                header = member.tobuf()
                crc = zlib.crc32(content, zlib.crc32(header, crc))
                length += len(header) + len(content)
                pieces += [stored(header), deflated]
            yield b"".join(pieces)
        end = bytes(1024)
        crc, length = zlib.crc32(end, crc), length + len(end)
        yield stored(end, last=True) + struct.pack("<II", crc, length & 0xFFFFFFFF)

    def through_a_pipe(self) -> BinaryIO:
        """The archive to read, as a process of its own makes it."""
        read_end, write_end = os.pipe()
        if not os.fork():
            os.close(read_end)
            try:
                with open(write_end, "wb") as pipe:
                    for piece in self.pieces():
                        pipe.write(piece)
            finally:
                os._exit(0)  # a reader that is gone is no news
        os.close(write_end)
        return open(read_end, "rb")


def stored(data: bytes, *, last: bool = False) -> bytes:
    """A deflate block that holds `data` (below 64 KiB) as it is."""
    return struct.pack("<BHH", last, len(data), len(data) ^ 0xFFFF) + data


def picture(number: int) -> bytes:
    """A JPEG of Jester's size and weight: 176 x 100 pixels, about 4 kB."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (18, 32, 3), np.uint8))
    grain = random.normal(0, 4, (100, 176, 3))
    pixels = np.asarray(coarse.resize((176, 100), Image.Resampling.BICUBIC)) + grain
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=50)
    return file.getvalue()


class Watched:
    """The pipe; tells once per GB how far it is."""

    def __init__(self, pipe: BinaryIO, start: float):
        self._pipe, self._start = pipe, start
        self._told, self._num_bytes = 0, 0

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        data = self._pipe.read(count)
        self._num_bytes += len(data)
        if self._num_bytes // 10**9 > self._told:
            self._told = self._num_bytes // 10**9
            seconds, now = time.monotonic() - self._start, memory_mib("VmRSS")
            print(f"{self._told} GB, {seconds:.0f} s, {now} MiB", flush=True)
        return data


class Piece(io.RawIOBase):
    """One part: the next bytes of the stream, so many."""

    def __init__(self, stream: Watched, size: int):
        super().__init__()
        self._stream, self._left = stream, size

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes; b"" at the part's end."""
        data = self._stream.read(min(count, self._left))
        self._left -= len(data)
        return data


if __name__ == "__main__":
    sys.exit(main())
