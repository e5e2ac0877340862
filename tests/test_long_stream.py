"""Memory while a long download is prepared; `tests/long_stream.py` tells of the whole length."""

import gzip
import io
import json
import subprocess
import sys
import tarfile

import pytest

from tests.long_stream import FRAMES_PER_CLIP, Archive


def test_the_made_up_archive_is_one():
    archive = Archive(2)
    content = b"".join(archive.pieces())
    assert len(content) == archive.num_bytes
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(content))) as tar:
        members = tar.getmembers()
        frames = [tar.extractfile(member).read() for member in members]
    assert [m.name for m in members[:: FRAMES_PER_CLIP // 2]] == [
        f"20bn-jester-v1/{clip}/{number:05d}.jpg" for clip in (0, 1) for number in (1, 19)
    ]
    assert frames[:FRAMES_PER_CLIP] == frames[FRAMES_PER_CLIP:]
    assert all(frame.startswith(b"\xff\xd8") for frame in frames)


def prepare(num_clips: int, num_parts: int) -> tuple[list[str], dict]:
    """A line for each gigabyte, and the result."""
    arguments = [f"--clips={num_clips}", f"--parts={num_parts}"]
    command = [sys.executable, "-m", "tests.long_stream", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *told, last = done.stdout.splitlines()
    return told, json.loads(last)


def test_memory_stays_flat():
    _, result = prepare(1_500, 7)
    assert (result["clips"], result["tensorflow"]) == (1_500, False)
    assert result["bytes"] > 200e6
    assert result["peak_mib"] - result["start_mib"] < 120


@pytest.mark.slow
def test_memory_stays_flat_over_gigabytes():
    """2.3 GB, a tenth of the real thing."""
    told, result = prepare(15_000, 23)
    assert (result["clips"], result["bytes"] > 2.3e9) == (15_000, True)
    # What a gigabyte more adds is the ledger of clips; the rest is there from the first one on.
    assert result["peak_mib"] < 450
    assert [line.split()[0] for line in told] == ["1", "2"]
    first, second = (float(line.split()[-2]) for line in told)
    assert second - first < 30
