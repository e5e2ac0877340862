"""20BN-Jester as it is downloaded: parts of one .tar.gz, read as one stream.

Nothing is unpacked to disk, and memory holds one clip at a time. The reader goes forward only and
checks everything: every header, that each clip's frames lie together, and the archive to its end.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from input_pipeline import jester
from input_pipeline.source import few

PART_STEM = "20bn-jester-v1-"
_PART_NAME = re.compile(re.escape(PART_STEM) + r"(\d{2,})")
LABEL_FOLDERS = ("annotations", "label")  # beside the clips, and no clips themselves
_CHUNK = 256 << 10  # bytes read, and at most inflated, at a time
_MOST_CLIP_BYTES = 128 << 20  # Jester's have about 150 kB; more is no clip, and memory is finite
_MOST_CLIP_FRAMES = 100_000
_MOST_HEADER_BYTES = 1 << 20  # of a tar header's long name


@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip as it lies in the data.

    Attributes:
        clip_id: the name of its folder.
        names: file names of its frames, in the order of their numbers.
        frames: their bytes, or () where the clip is not wanted.
    """

    clip_id: str
    names: tuple[str, ...]
    frames: tuple[bytes, ...]


@dataclasses.dataclass
class Findings:
    """What else was met while the clips were read.

    Attributes:
        empty: ids whose folder holds no frame.
        unread: ids that are there but were not looked into.
        num_other_files: files that are no frames of a clip.
        other_files: some of their names.
    """

    empty: list[str] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)
    num_other_files: int = 0
    other_files: list[str] = dataclasses.field(default_factory=list)

    def add_other_file(self, name: str) -> None:
        """Counts a file that is no frame, and keeps the first names."""
        self.num_other_files += 1
        if len(self.other_files) < 20:
            self.other_files.append(name)


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of the archive.

    Attributes:
        name: its file name.
        size: bytes that it must have.
        open: opens it for reading, from its start.
    """

    name: str
    size: int
    open: Callable[[], BinaryIO]


def find_parts(source: Path) -> list[Part]:
    """The parts in a folder, in their order; [] where there is none.

    Raises:
        ValueError: a number is missing or twice there, or a part is empty.
    """
    numbers: dict[int, Path] = {}
    others = []
    for path in sorted(source.iterdir()):
        match = _PART_NAME.fullmatch(path.name)
        if match and path.is_file():
            if int(match[1]) in numbers:
                raise ValueError(
                    f"{path} and {numbers[int(match[1])].name} have the same number: remove one"
                )
            numbers[int(match[1])] = path
        elif path.name.startswith(PART_STEM):
            others.append(path.name)
    missing = [n for n in range(max(numbers, default=-1) + 1) if n not in numbers]
    if missing:
        near = f" (there is {few(others)})" if others else ""
        raise ValueError(
            f"{source} lacks {few([f'{PART_STEM}{n:02d}' for n in missing])}{near} of the "
            f"parts {PART_STEM}00 to {numbers[max(numbers)].name}: download the missing ones"
        )
    parts = []
    for _, path in sorted(numbers.items()):
        size = path.stat().st_size
        if not size:
            raise ValueError(f"{path} is empty: download it again")
        parts.append(Part(path.name, size, functools.partial(_open, path)))
    return parts


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


class PartsSource:
    """The archive's parts, read as the one .tar.gz that they are. Nothing is extracted.

    A clip's frames must lie together in the archive, as `tar` writes the files of a folder: then
    one clip at a time is all that memory holds.
    """

    unit = "B"

    def __init__(self, parts: Sequence[Part], csv_clips: int = 0):
        """Opens nothing yet; `csv_clips` is how many clips the archive should hold, 0: unknown."""
        self._parts = list(parts)
        self._csv_clips = csv_clips
        self._part = self._parts[0]  # being read, from `_offset` on
        self._offset = 0
        self.description = {"kind": "parts", "parts": [[p.name, p.size] for p in self._parts]}

    def total(self, wanted: Collection[str]) -> int:
        """The bytes of all parts."""
        del wanted  # everything is read, whatever is taken
        return sum(part.size for part in self._parts)

    def num_bytes(self, wanted: Collection[str]) -> int:
        """The share of the archive's bytes that the wanted clips are of all clips."""
        return self.total(wanted) * len(wanted) // max(self._csv_clips, len(wanted), 1)

    def clips(
        self, wanted: Collection[str], findings: Findings, progress: Callable[[int], Any]
    ) -> Iterator[StoredClip]:
        """Yields the clips in the archive's order; those not wanted without their bytes.

        Raises:
            ValueError: the archive is damaged or incomplete, or a clip's frames lie apart.
        """
        tar = _TarStream(self._inflate(progress), self._damaged)
        folders: set[str] = set()
        begun: set[str] = set()  # ids
        clip = None  # the one being read
        for name, kind in tar.members():
            folder, _, file = name.rpartition("/")
            if kind == "folder":
                folders.add(name)
                continue
            folders.add(folder)
            if not folder or jester.frame_number(file) is None:
                findings.add_other_file(name)
                continue
            if clip is None or folder != clip.folder:
                if clip is not None:
                    yield clip.stored()
                clip_id = folder.rpartition("/")[2]
                if clip_id in begun:
                    self._lies_apart(clip_id, name)
                begun.add(clip_id)
                clip = _OpenClip(folder, clip_id, clip_id in wanted)
            where = f"{self._part.name}: {name}"
            if kind != "file":  # unpacking would follow it; an empty frame would be a lie
                raise ValueError(
                    f"{where} is a link or the like, no file: unpack the archive (cat "
                    f"{PART_STEM}?? | tar zx) and prepare from the folders"
                )
            clip.add(file, tar, where)
        if clip is not None:
            yield clip.stored()
        findings.empty.extend(sorted(_empty_folders(folders) - begun))

    def _lies_apart(self, clip_id: str, name: str) -> NoReturn:
        raise ValueError(
            f"the frames of the clip {clip_id!r} do not lie together in the archive ({name} in "
            f"{self._part.name} comes after other clips): unpack it (cat {PART_STEM}?? | tar zx) "
            "and prepare from the folders"
        )

    def _chunks(self, progress: Callable[[int], Any]) -> Iterator[bytes]:
        """The bytes of all parts, a piece at a time; each piece is of one part."""
        for part in self._parts:
            self._part, self._offset = part, 0
            with part.open() as file:
                while True:
                    try:
                        chunk = file.read(_CHUNK)
                    except OSError as error:
                        raise ValueError(
                            f"cannot read {part.name} at byte {self._offset:,}: {error.strerror}"
                        ) from error
                    if not chunk:
                        break
                    yield chunk
                    self._offset += len(chunk)
                    progress(len(chunk))
            if self._offset != part.size:
                raise ValueError(
                    f"{part.name} had {part.size:,} bytes when it was found and {self._offset:,} "
                    "when it was read: wait until its download has ended"
                )

    def _inflate(self, progress: Callable[[int], Any]) -> Iterator[bytes]:
        """The tar archive's bytes; zlib checks each gzip member's length and CRC at its end."""
        inflater = None
        for chunk in self._chunks(progress):
            while chunk:
                if inflater is None:
                    if not chunk.strip(b"\0"):  # padding after the archive
                        break
                    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
                try:
                    yield from _inflated(inflater, chunk)
                except zlib.error as error:
                    self._damaged(str(error))
                chunk = b""
                if inflater.eof:
                    chunk, inflater = inflater.unused_data, None
        if inflater is not None:
            raise ValueError(
                f"the archive ends too early, in {self._part.name}: it is cut short, or parts "
                f"after it are missing ({len(self._parts)} are here; 20BN-Jester has 23, 00 "
                f"to 22); download them again{self._size_hint()}"
            )

    def _damaged(self, reason: str) -> NoReturn:
        """Raises what names the part; zlib's words tell where the damage can lie."""
        index = self._parts.index(self._part)
        if "incorrect data check" in reason or "incorrect length check" in reason:
            raise ValueError(
                f"the archive's checksum is wrong at its end ({self._part.name}): a byte in one of "
                f"the parts {self._parts[0].name} to {self._part.name} is not as it was made; "
                "compare their checksums with the download's, and download the odd one again"
                + self._size_hint()
            )
        before = ""
        if index and self._offset < 4 << 20:  # a cut shows where the next part begins
            before = f", or {self._parts[index - 1].name} before it is cut short"
        raise ValueError(
            f"{self._part.name} is damaged near byte {self._offset:,} ({reason}){before}: "
            f"download it again{self._size_hint()}"
        )

    def _size_hint(self) -> str:
        largest = max(part.size for part in self._parts)
        small = [part for part in self._parts[:-1] if part.size < largest]
        if not small:
            return ""
        sizes = few([f"{part.name} with {part.size:,} bytes" for part in small])
        return f". Smaller than the largest part ({largest:,} bytes): {sizes}"


def _inflated(inflater: Any, chunk: bytes) -> Iterator[bytes]:
    """What a piece inflates to, a little at a time, as far as the end of its gzip member."""
    while True:
        data = inflater.decompress(chunk, _CHUNK)
        if data:
            yield data
        chunk = inflater.unconsumed_tail
        if inflater.eof or not (data or chunk):
            return


class _OpenClip:
    """A clip whose frames are still coming, in any order."""

    def __init__(self, folder: str, clip_id: str, wanted: bool):
        self.folder = folder
        self._id = clip_id
        self._wanted = wanted
        self._frames: dict[str, bytes] = {}
        self._num_bytes = 0

    def add(self, file: str, tar: _TarStream, where: str) -> None:
        """Takes the frame at hand, its bytes only if the clip is wanted."""
        if file in self._frames:
            raise ValueError(f"{where} is twice in the archive")
        if len(self._frames) == _MOST_CLIP_FRAMES:
            raise ValueError(f"{where} is of a clip with more than {_MOST_CLIP_FRAMES:,} frames")
        self._num_bytes += tar.size
        if self._wanted and self._num_bytes > _MOST_CLIP_BYTES:
            raise ValueError(
                f"{where} has {tar.size:,} bytes and makes its clip {self._num_bytes:,}; "
                f"expected at most {_MOST_CLIP_BYTES:,}"
            )
        self._frames[file] = tar.read() if self._wanted else b""

    def stored(self) -> StoredClip:
        """The clip, its frames in their order."""
        names = jester.in_order(self._frames)
        frames = tuple(self._frames[name] for name in names) if self._wanted else ()
        return StoredClip(self._id, names, frames)


def _empty_folders(folders: set[str]) -> set[str]:
    """Names of the folders that hold no other folder: clips, unless they are the labels'."""
    parents = {folder.rpartition("/")[0] for folder in folders}
    leaves = {folder.rpartition("/")[2] for folder in folders - parents}
    return leaves - {"", ".", *LABEL_FOLDERS}


class _TarStream:
    """Reads a tar archive forwards, strictly: Python's `tarfile` takes a broken header for the
    end of the archive, and remembers every member (5 million frames) while it streams.

    Attributes:
        size: bytes of the member at hand.
    """

    def __init__(self, chunks: Iterator[bytes], damaged: Callable[[str], NoReturn]):
        self._chunks = chunks
        self._damaged = damaged
        self._chunk = memoryview(b"")
        self._unread = 0  # of the member at hand, without the padding
        self._padding = 0
        self.size = 0

    def members(self) -> Iterator[tuple[str, str]]:
        """Yields each member's name and what it is: "file", "folder" or, as a link, "other"."""
        long_name, pax = None, {}
        while True:
            self._take(self._unread + self._padding, keep=False)
            header = self._header()
            if header is None:
                self._check_end()
                return
            kind = header.type
            if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_TYPES):
                self._begin(header.size)
                content = self._small()
                if kind == tarfile.GNUTYPE_LONGNAME:
                    long_name = content.split(b"\0")[0]
                elif kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                    pax = self._pax(content)
                continue
            if kind == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse") for k in pax):
                self._damaged(f"{header.name!r} is a sparse file, which a JPEG never is")
            raw = pax.get("path", long_name)
            name = header.name if raw is None else raw.decode("utf-8", "backslashreplace")
            is_file = kind in tarfile.REGULAR_TYPES
            # Links and the like have no content, whatever size they state.
            self._begin(int(pax.get("size", header.size)) if is_file else 0)
            yield _clean(name), "file" if is_file else "folder" if header.isdir() else "other"
            long_name, pax = None, {}

    def read(self) -> bytes:
        """The content of the member at hand."""
        content = self._take(self._unread, keep=True)
        self._unread = 0
        return content

    def _begin(self, size: int) -> None:
        self.size = self._unread = size
        self._padding = -size % tarfile.BLOCKSIZE

    def _small(self) -> bytes:
        if self.size > _MOST_HEADER_BYTES:
            self._damaged(f"a tar header of {self.size:,} bytes")
        return self.read()

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at the archive's end mark."""
        block = self._take(tarfile.BLOCKSIZE, keep=True)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed forgot it
            return None
        except (tarfile.HeaderError, ValueError) as error:
            self._damaged(f"no tar header where one should be: {error}")
        if header.size < 0:
            self._damaged(f"{header.name!r} has a size of {header.size}")
        return header

    def _pax(self, content: bytes) -> dict[str, bytes]:
        """Records "LENGTH KEY=VALUE\\n", the length counting all of itself."""
        records = {}
        while content:
            length, space, _ = content.partition(b" ")
            if (
                not space
                or not length.isdigit()
                or not len(length) + 2 < int(length) <= len(content)
            ):
                self._damaged("a broken pax header")
            record = content[len(length) + 1 : int(length) - 1]
            key, _, value = record.partition(b"=")
            records[key.decode("utf-8", "backslashreplace")] = value
            content = content[int(length) :]
        if not records.get("size", b"0").isdigit():
            self._damaged("a broken pax header")
        return records

    def _check_end(self) -> None:
        """After the end mark come zeros alone; reading them lets zlib check the CRC."""
        while True:
            if bytes(self._chunk).strip(b"\0"):
                self._damaged("more data after the end of the archive")
            self._chunk = memoryview(next(self._chunks, b""))
            if not self._chunk:
                return

    def _take(self, count: int, *, keep: bool) -> bytes:
        """Reads `count` bytes; returns them, or with `keep` False nothing."""
        pieces = []
        while count:
            if not self._chunk:
                self._chunk = memoryview(next(self._chunks, b""))
                if not self._chunk:
                    self._damaged("the tar archive ends without its end mark")
            piece = self._chunk[:count]
            self._chunk = self._chunk[len(piece) :]
            count -= len(piece)
            if keep:
                pieces.append(piece)
        return b"".join(pieces)


_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def _clean(name: str) -> str:
    name = name.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be printed
    return name.rstrip("/").removeprefix("./")
