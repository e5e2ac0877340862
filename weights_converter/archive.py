"""Reads a PyTorch file's weights without running anything in it: no torch, no pickle.

`torch.jit.load` runs code of the file while it loads, and unpickling calls what the file names.
Here a small interpreter of pickle's opcodes builds tensors, plain containers and TorchScript's
module tree, and refuses everything else by name. Of the zip around it every checksum is verified
and every size checked before anything is read.

bytes -> zip members -> values -> named tensors, module attributes, code text, optimizer state
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from input_pipeline.command_line import one_line

# Far above any RViT (the XL with its optimizer state: 1.3 GB, 1,000 tensors), far below what hurts.
MAX_FILE_BYTES = 4 << 30
MAX_MEMBERS = 20_000
MAX_DIRECTORY_BYTES = 4 << 20
MAX_TEXT_BYTES = 32 << 20  # pickles and code, inflated, in all
MAX_HEADER_BYTES = 4 << 20  # of safetensors
MAX_OPCODES = 250_000
MAX_TENSORS = 10_000
MAX_VALUES = 100_000  # met on a walk through what was read: shared parts count each time
MAX_DEPTH = 64  # of modules or containers
MAX_RANK = 8
MAX_EXTENT = 2**40  # of an offset, a side or a stride, in elements
MAX_NAME = 500  # characters of a dotted name
CHUNK_BYTES = 1 << 20

# A storage's class in the file -> numpy's type; None: bfloat16, which numpy lacks.
STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": None,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}

# What a top-level dictionary calls the model's and the optimizer's part.
MODEL_KEYS = ("net", "state_dict", "model_state_dict", "model")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer")


class FileRefused(ValueError):  # noqa: N818 - says what happened
    """The file is damaged, hostile, or none that weights are read from; the message says why."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file holds.

    Attributes:
        path: of the file.
        kind: "TorchScript archive", "state dict", "training checkpoint" or "safetensors".
        sha256: of the whole file, hexadecimal.
        tensors: by name as the file has them, in its order.
        attributes: of TorchScript's modules, by dotted name: numbers, truth values, texts.
        code: TorchScript's code by file name in the archive.
        optimizer: the optimizer's state dict; its tensors are arrays.
        epoch: as a training checkpoint says it.
    """

    path: Path
    kind: str
    sha256: str
    tensors: dict[str, np.ndarray]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    epoch: int | None = None

    @functools.cached_property
    def classes(self) -> dict[str, str]:
        """The text of each class in `code`, by its qualified name."""
        return class_texts(self.code)


def read(path: str | os.PathLike[str]) -> Source:
    """Reads a TorchScript archive, state dict, training checkpoint or safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: see there.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise FileRefused(f"{path} is a folder; expected a file of PyTorch weights")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise FileRefused(f"{path} is no regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if not size:
                raise FileRefused("the file is empty")
            if size > MAX_FILE_BYTES:
                raise FileRefused(f"the file has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
            start = file.read(512)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                return _read_zip_file(path, file, size)
            if _looks_like_safetensors(start, size):
                return Source(path, "safetensors", _sha256(file), _read_safetensors(path))
            raise FileRefused(_what_it_is_instead(start))
        except FileRefused as error:
            raise FileRefused(f"{path}: {error}") from error
        except (RecursionError, MemoryError, ArithmeticError, TypeError) as error:
            raise FileRefused(f"{path}: damaged, or made to do harm ({_reason(error)})") from error


def _what_it_is_instead(start: bytes) -> str:
    again = (
        "load it in PyTorch where you trust it and save it anew: "
        "torch.save(model.state_dict(), 'weights.pth')"
    )
    if start.startswith(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"):
        return f"torch.save's format from before PyTorch 1.6, which is no zip; {again}"
    if start[257:262] == b"ustar":
        return f"a tar file, torch.save's format from before PyTorch 0.4 perhaps; {again}"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return f"a bare pickle, which may run code when it is loaded; {again}"
    return (
        "not a PyTorch zip archive nor a safetensors file (damaged, cut off at its start, "
        "or of another kind)"
    )


def _sha256(file: io.BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------- safetensors


def _looks_like_safetensors(start: bytes, size: int) -> bool:
    return size > 9 and struct.unpack("<Q", start[:8])[0] <= size - 8 and start[8:9] == b"{"


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """By the format's own library, which checks every offset; bfloat16 by hand."""
    import safetensors

    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise FileRefused(f"its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
        header = file.read(length)
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dictionary
                kind = opened.get_slice(name).get_dtype()
                if kind == "BF16":
                    told = json.loads(header)[name]
                    begin, end = told["data_offsets"]
                    raw = np.fromfile(path, "<u2", (end - begin) // 2, offset=8 + length + begin)
                    tensors[name] = _widen_bfloat16(raw).reshape(told["shape"])
                elif kind in ("F16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL"):
                    tensors[name] = opened.get_tensor(name)
                else:
                    raise FileRefused(f"the tensor {_clip(name)} is {kind}, which no RViT has")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, FileRefused):
            raise
        raise FileRefused(f"a damaged safetensors file: {_reason(error)}") from error
    return tensors


def _widen_bfloat16(raw: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers -> float32: exact."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


# --------------------------------------------------------------------------- the zip


def _read_zip_file(path: Path, file: io.BufferedReader, size: int) -> Source:
    _check_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = _Members(archive, size)
            source = _read_archive(path, members)
            members.check_the_rest()
    except FileRefused:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,  # a compression or version that zipfile does not know
        RuntimeError,  # encrypted
        struct.error,
        ValueError,
    ) as error:
        raise FileRefused(f"damaged or cut off: {_reason(error)}") from error
    return dataclasses.replace(source, sha256=_sha256(file))


def _read_archive(path: Path, members: "_Members") -> Source:
    if "data.pkl" not in members:
        older = "model.json" in members
        raise FileRefused(
            "a TorchScript archive from before PyTorch 1.4: load and save it anew with a later one"
            if older
            else "a zip file without data.pkl: PyTorch wrote none such"
        )
    if "byteorder" in members and members.text("byteorder").strip() != b"little":
        raise FileRefused("its numbers are not little-endian; save it anew on another machine")
    root = _Pickle(members).load("data.pkl")
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        return _torchscript(path, root, members)
    return _saved(path, root)


class _Members:
    """A zip's members by their name below the archive's one folder.

    Names and claimed sizes are checked at once, each checksum when the member is read. PyTorch
    stores numbers uncompressed, so that only text may inflate.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive = archive
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._unread: set[str] = set()
        self.size = size
        entries = archive.infolist()
        if len(entries) > MAX_MEMBERS:
            raise FileRefused(f"it has {len(entries):,} members, more than {MAX_MEMBERS:,}")
        prefix = entries[0].filename.partition("/")[0] if entries else ""
        folded = set()
        for entry in entries:
            self._check_claim(entry)
            folder, _, name = entry.filename.partition("/")
            odd = ".." in name.split("/") or "\\" in name or entry.orig_filename != entry.filename
            if folder != prefix or not name or odd:
                raise FileRefused(
                    f"the member {_clip(entry.filename)} is not where PyTorch puts its members"
                )
            if name.casefold() in folded:
                raise FileRefused(f"the member {_clip(entry.filename)} is there twice")
            folded.add(name.casefold())
            self._entries[name] = entry
            self._unread.add(name)
        stored = sum(e.file_size for e in entries if e.compress_type == zipfile.ZIP_STORED)
        inflated = sum(e.file_size for e in entries if e.compress_type != zipfile.ZIP_STORED)
        if stored > size:
            raise FileRefused(f"its members claim {stored:,} bytes, the file has {size:,}")
        if inflated > MAX_TEXT_BYTES:
            raise FileRefused(f"its compressed members would inflate to {inflated:,} bytes")

    def _check_claim(self, entry: zipfile.ZipInfo) -> None:
        name = _clip(entry.filename)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FileRefused(f"the member {name} is compressed in a way that PyTorch is not")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size > self.size:
            raise FileRefused(
                f"the member {name} claims {entry.file_size:,} bytes, the file has {self.size:,}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def text(self, name: str) -> bytes:
        """A member that may be compressed."""
        entry = self._entries[name]
        if entry.file_size > MAX_TEXT_BYTES:
            raise FileRefused(f"{name} has {entry.file_size:,} bytes, more than {MAX_TEXT_BYTES:,}")
        return b"".join(self._chunks(name))

    def numbers(self, name: str) -> bytes:
        """A member that must not be."""
        if self._entries[name].compress_type != zipfile.ZIP_STORED:
            raise FileRefused(f"the member {name} is compressed; PyTorch's are not")
        return b"".join(self._chunks(name))

    def check_the_rest(self) -> None:
        """Verifies the checksums of the members that nobody read."""
        for name in sorted(self._unread):
            for _ in self._chunks(name):
                pass

    def _chunks(self, name: str) -> Iterator[bytes]:
        """The member's bytes, never more than it claims; its checksum is verified at the end."""
        entry = self._entries[name]
        left = entry.file_size
        with self._archive.open(entry) as file:
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk
            if left or file.read(1):
                raise FileRefused(f"the member {_clip(entry.filename)} has not the size it claims")
        self._unread.discard(name)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuses a directory of members too long to be read at all, before zipfile reads it."""
    tail = min(size, 22 + 65_535)
    file.seek(size - tail)
    end = file.read(tail)
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) < at + 22:
        raise FileRefused("damaged or cut off: the zip's directory is missing at its end")
    (claimed,) = struct.unpack("<L", end[at + 12 : at + 16])
    # zipfile takes a zip64 record, wherever there is one, from right before.
    record = size - tail + at - 20 - 56
    if end[at - 20 : at - 16] == b"PK\x06\x07" and record >= 0:
        file.seek(record)
        (claimed,) = struct.unpack("<Q", file.read(56)[40:48])
    elif claimed == 0xFFFFFFFF:
        raise FileRefused("damaged or cut off: the zip's directory has no end")
    file.seek(0)
    if claimed > min(size, MAX_DIRECTORY_BYTES):
        raise FileRefused(f"the zip's directory claims {claimed:,} bytes")


# --------------------------------------------------------------------------- the pickle


class _Global(NamedTuple):
    """A class or function by name; looked at, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".removeprefix(".")

    @property
    def is_module_class(self) -> bool:
        """Whether it is a class of the archive's own TorchScript code."""
        return self.module == "__torch__" or self.module.startswith("__torch__.")


class _Object:
    """An instance of one of the archive's TorchScript classes."""

    def __init__(self, cls: _Global):
        self.cls = cls
        self.state: Any = None


class _Storage(NamedTuple):
    """Numbers in the member `data/KEY`."""

    kind: str  # key of STORAGES
    key: str
    numel: int


# Functions that give back their first argument, as far as values go, and what that must be.
_PASSED_THROUGH = {
    "torch._utils._rebuild_parameter": np.ndarray,
    "torch._utils._rebuild_parameter_with_state": np.ndarray,
    "torch.jit._pickle.build_intlist": list,
    "torch.jit._pickle.build_doublelist": list,
    "torch.jit._pickle.build_boollist": list,
    "torch.jit._pickle.build_tensorlist": list,
    "torch.jit._pickle.restore_type_tag": object,
    "torch.device": str,
    "torch.Size": tuple,
}
_DICTIONARIES = ("collections.OrderedDict", "collections.Counter", "collections.defaultdict")
_REBUILD = "torch._utils._rebuild_tensor_v2"


class _Pickle:
    """An interpreter of the opcodes that PyTorch writes. It calls nothing that the file names."""

    def __init__(self, members: _Members):
        self._members = members
        self._arrays: dict[str, tuple[_Storage, np.ndarray]] = {}
        self._tensors = 0
        self._viewed_bytes = 0
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below each open mark
        self._memo: dict[int, Any] = {}

    def load(self, member: str) -> Any:
        """The value that a pickled member describes; its tensors are arrays."""
        try:
            return self._run(self._members.text(member))
        except FileRefused as error:
            raise FileRefused(f"{member}: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            # What genops and a wrong order of opcodes raise.
            raise FileRefused(f"{member} is no valid pickle: {_reason(error)}") from error

    def _run(self, data: bytes) -> Any:
        stack, memo = self._stack, self._memo
        argument: Any  # of the opcode's kind
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise FileRefused(f"it has more than {MAX_OPCODES:,} opcodes")
            name = opcode.name
            if name == "STOP":
                if len(stack) != 1 or self._outer or position != len(data) - 1:
                    raise FileRefused("it does not end where its value ends")
                return stack[0]
            if name in _PUT:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in _GET:
                stack.append(memo[argument])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _PLAIN:
                stack.append(argument)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name in _OPCODES:
                _OPCODES[name](self, argument)
                stack = self._stack
            elif name not in _IGNORED:
                raise FileRefused(f"it uses the opcode {name}, which PyTorch's files do not")
        raise FileRefused("it is cut off")

    # Each of the following is an opcode; `argument` is what follows it in the file.

    def _mark(self, argument: None) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _last(self, count: int) -> list[Any]:
        values = self._stack[-count:]
        if len(values) != count:
            raise FileRefused("a value is missing")
        del self._stack[-count:]
        return values

    def _tuple(self, argument: None) -> None:
        values = self._since_mark()
        self._stack.append(tuple(values))

    def _append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise FileRefused("it appends to something that is no list")
        self._stack[-1].extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise FileRefused("it sets items of something that is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bool) and not (type(key) is int and 0 <= key < 2**31):
                raise FileRefused(f"a dictionary has a key of type {type(key).__name__}")
            if key in target:
                raise FileRefused(f"a dictionary has the key {_clip(key)} twice")
            target[key] = value

    def _global(self, argument: str) -> None:
        module, _, name = argument.rpartition(" ")
        found = _Global(module, name)
        allowed = (
            found.is_module_class
            or str(found) in _PASSED_THROUGH
            or str(found) in _DICTIONARIES
            or str(found) == _REBUILD
            or (module == "torch" and name in STORAGES)
        )
        if not allowed:
            raise FileRefused(
                f"it refers to {_clip(str(found))}, which weights do not need and which could do "
                "harm: save model.state_dict() alone, or a dictionary of it and the optimizer's"
            )
        self._stack.append(found)

    def _stack_global(self, argument: None) -> None:
        module, name = self._last(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise FileRefused("a class is named by something that is no text")
        self._global(f"{module} {name}")

    def _reduce(self, argument: None) -> None:
        function, arguments = self._last(2)
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise FileRefused("it calls something that is no function")
        name = str(function)
        if name in _DICTIONARIES and (not arguments or [type(a) for a in arguments] == [dict]):
            self._stack.append(dict(*arguments))
        elif name == _REBUILD and len(arguments) in (6, 7) and not any(arguments[6:]):
            self._stack.append(self._tensor(*arguments[:4]))
        elif arguments and isinstance(arguments[0], _PASSED_THROUGH.get(name, ())):
            self._stack.append(arguments[0])
        else:
            raise FileRefused(f"it calls {_clip(name)} in a way that is not known here")

    def _new_object(self, argument: None) -> None:
        cls, arguments = self._last(2)
        if not isinstance(cls, _Global) or not cls.is_module_class or arguments != ():
            raise FileRefused("it makes an object of something that is no TorchScript class")
        self._stack.append(_Object(cls))

    def _build(self, argument: None) -> None:
        (state,) = self._last(1)
        target = self._stack[-1]
        if isinstance(target, _Object):
            target.state = state
        elif not (type(target) is dict and type(state) is dict and set(state) <= {"_metadata"}):
            raise FileRefused("it sets the state of something that is no module")

    def _persistent_id(self, argument: None) -> None:
        (identity,) = self._last(1)
        match identity:
            case ("storage", _Global(module="torch", name=kind), str(key), str(), int(numel)) | (
                "storage",
                _Global(module="torch", name=kind),
                str(key),
                str(),
                int(numel),
                None,
            ) if kind in STORAGES and re.fullmatch(r"[0-9]{1,20}", key):
                self._stack.append(_Storage(kind, key, numel))
            case _:
                raise FileRefused("it refers to something outside that is no storage of numbers")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        """A checked view; copied out of its storage unless it is the whole."""
        if not (
            isinstance(storage, _Storage)
            and type(shape) in (tuple, list)
            and type(strides) in (tuple, list)
            and len(shape) == len(strides) <= MAX_RANK
            and all(type(n) is int and 0 <= n < MAX_EXTENT for n in (offset, *shape, *strides))
        ):
            raise FileRefused("a tensor's shape, strides or offset are not to be believed")
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise FileRefused(f"it has more than {MAX_TENSORS:,} tensors")
        array = self._storage_array(storage)
        numel = math.prod(shape)
        if not numel:
            return np.zeros(shape, array.dtype)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if last >= len(array) or numel > len(array):
            raise FileRefused(
                f"a tensor of shape {list(shape)} at {offset} reaches past its storage "
                f"{storage.key} of {len(array):,} numbers"
            )
        self._viewed_bytes += numel * array.itemsize
        if self._viewed_bytes > 4 * self._members.size + CHUNK_BYTES:
            raise FileRefused("its tensors overlap so often that they exceed the file's size")
        steps = tuple(
            stride * array.itemsize if n > 1 else 0
            for n, stride in zip(shape, strides, strict=True)
        )
        view = np.lib.stride_tricks.as_strided(array[offset:], shape, steps, writeable=False)
        return np.array(view)

    def _storage_array(self, storage: _Storage) -> np.ndarray:
        member = f"data/{storage.key}"
        if member in self._arrays:
            known, array = self._arrays[member]
            if known != storage:
                raise FileRefused(f"the member {member} is taken for numbers of two kinds")
            return array
        if member not in self._members:
            raise FileRefused(f"the member {member} is missing")
        data = self._members.numbers(member)
        kind = STORAGES[storage.kind]
        itemsize = np.dtype(kind or "<u2").itemsize
        if len(data) != storage.numel * itemsize:
            raise FileRefused(
                f"the member {member} has {len(data):,} bytes, expected {storage.numel:,} "
                f"numbers of {itemsize}"
            )
        if storage.kind == "BoolStorage" and data.translate(None, b"\0\1"):
            raise FileRefused(f"the member {member} holds bytes that are no truth values")
        array = np.frombuffer(data, kind or "<u2")
        array = _widen_bfloat16(array) if kind is None else array
        self._arrays[member] = storage, array
        return array


_PUT = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"BINGET", "LONG_BINGET"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PLAIN = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
_IGNORED = {"PROTO", "FRAME"}
_OPCODES: dict[str, Callable[[_Pickle, Any], None]] = {
    "MARK": _Pickle._mark,
    "TUPLE": _Pickle._tuple,
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._last(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._last(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._last(3))),
    "APPEND": lambda machine, _: machine._append(machine._last(1)),
    "APPENDS": lambda machine, _: machine._append(machine._since_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._last(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._since_mark()),
    "GLOBAL": _Pickle._global,
    "STACK_GLOBAL": _Pickle._stack_global,
    "REDUCE": _Pickle._reduce,
    "NEWOBJ": _Pickle._new_object,
    "BUILD": _Pickle._build,
    "BINPERSID": _Pickle._persistent_id,
}


# --------------------------------------------------------------------------- what it describes


def _torchscript(path: Path, root: Any, members: _Members) -> Source:
    if not isinstance(root, _Object):
        raise FileRefused("a TorchScript archive whose root is no module")
    names = [name for name in members if name.startswith("code/") and name.endswith(".py")]
    code = {name: members.text(name).decode("utf-8", errors="replace") for name in names}
    tensors, attributes = _walk_modules(root, class_texts(code))
    if not tensors:
        raise FileRefused(
            "a TorchScript archive without parameters. A frozen one (torch.jit.freeze, "
            "optimize_for_inference) keeps its weights as constants without names: convert the "
            "file that it was frozen from"
        )
    return Source(path, "TorchScript archive", "", tensors, attributes, code)


def _walk_modules(
    root: _Object, texts: dict[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State-dict names are the attribute paths."""
    tensors: dict[str, np.ndarray] = {}
    attributes: dict[str, Any] = {}
    # Tensors that are neither parameters nor buffers belong to no state dict.
    declared = {name: declared_tensors(text) for name, text in texts.items()}
    own_way = {name for name, text in texts.items() if "def __setstate__(" in text}
    met = 0

    def walk(module: _Object, prefix: str, depth: int) -> None:
        nonlocal met
        cls = str(module.cls)
        if type(module.state) is not dict or cls in own_way:
            raise FileRefused(
                f"the class {_clip(cls)} saves itself in a way of its own (__getstate__, "
                "__setstate__), which only its code can read: save model.state_dict()"
            )
        if depth > MAX_DEPTH:
            raise FileRefused(f"its modules are nested more than {MAX_DEPTH} deep")
        for key, value in module.state.items():
            met += 1
            if met > MAX_VALUES:
                raise FileRefused(f"its modules have more than {MAX_VALUES:,} attributes")
            if not isinstance(key, str) or "." in key or len(prefix) + len(key) > MAX_NAME:
                raise FileRefused(f"a module has an attribute named {_clip(key)}")
            if isinstance(value, _Object):
                walk(value, f"{prefix}{key}.", depth + 1)
            elif isinstance(value, np.ndarray):
                # An unknown class hides none.
                if cls not in declared or key in declared[cls]:
                    tensors[prefix + key] = value
            elif isinstance(value, bool | int | float | str):
                attributes[prefix + key] = value

    walk(root, "", 0)
    return tensors, attributes


def class_texts(code: Mapping[str, str]) -> dict[str, str]:
    """The text of each of the archive's classes, by its qualified name."""
    texts = {}
    for file, text in code.items():
        module = file.removeprefix("code/").removesuffix(".py").replace("/", ".")
        for part in re.split(r"^(?=class )", text, flags=re.M):
            if found := re.match(r"class (\w+)\(", part):
                texts[f"{module}.{found.group(1)}"] = part
    return texts


def declared_tensors(text: str) -> set[str]:
    """Names of the parameters and buffers that a class declares."""
    lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", text, re.M)
    return set(re.findall(r'"([^"]*)"', " ".join(lists)))


def _saved(path: Path, root: Any) -> Source:
    """What torch.save wrote: a state dict, or a dictionary with one in it."""
    if type(root) is not dict:
        raise FileRefused(f"expected a state dict, found a {_kind(root)}")
    _check_values(root)
    if root and all(isinstance(value, np.ndarray) for value in root.values()):
        return Source(path, "state dict", "", _named(root))
    for key in MODEL_KEYS:
        if type(root.get(key)) is dict:
            model = root[key]
            break
    else:
        raise FileRefused(
            f"neither a state dict nor a dictionary with one under {', '.join(MODEL_KEYS)}; its "
            f"keys are {', '.join(map(_clip, list(root)[:8])) or 'none'}"
        )
    optimizers = [root[key] for key in OPTIMIZER_KEYS if type(root.get(key)) is dict]
    epoch = root.get("epoch")
    return Source(
        path,
        "training checkpoint",
        "",
        _named(model),
        optimizer=optimizers[0] if optimizers else None,
        epoch=epoch if type(epoch) is int else None,
    )


def _named(state: dict[Any, Any]) -> dict[str, np.ndarray]:
    for key, value in state.items():
        if not isinstance(key, str) or len(key) > MAX_NAME or not isinstance(value, np.ndarray):
            raise FileRefused(f"expected tensors by name; {_clip(key)} is a {_kind(value)}")
    return state


def _check_values(root: Any) -> None:
    """Refuses containers nested too deep, without end, or blown up by sharing; and modules."""
    met = 0
    pending: list[Iterator[Any]] = [iter([root])]
    while pending:
        for value in pending[-1]:
            met += 1
            if met > MAX_VALUES:
                raise FileRefused(f"its containers hold more than {MAX_VALUES:,} values")
            if isinstance(value, _Object | _Global | _Storage):
                raise FileRefused("a state dict holds a module, a class or a bare storage")
            if isinstance(value, dict | list | tuple):
                pending.append(iter(value.values() if isinstance(value, dict) else value))
                if len(pending) > MAX_DEPTH:
                    raise FileRefused(f"its containers are nested more than {MAX_DEPTH} deep")
                break
        else:
            pending.pop()


def _kind(value: Any) -> str:
    """A value's type as a reader knows it."""
    return {"ndarray": "tensor", "_Object": "module"}.get(
        type(value).__name__, type(value).__name__
    )


def _clip(text: Any, most: int = 100) -> str:
    """A text of the file in quotes, cut to a readable length; of anything else the type."""
    if not isinstance(text, str | int):
        return f"a {_kind(text)}"
    return repr(text if len(str(text)) <= most else f"{str(text)[:most]}...")


def _reason(error: BaseException) -> str:
    return one_line(str(error), 200) or type(error).__name__
