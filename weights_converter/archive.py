"""Reads a PyTorch file's weights without running anything in it: no torch, no pickle.

`torch.jit.load` runs code of the file while it loads, and unpickling calls what the file names.
Here a small interpreter of pickle's opcodes builds tensors, plain containers and TorchScript's
module tree, and refuses everything else by name. Of the zip around it every checksum is verified
and every size checked before anything is read.

bytes -> zip members -> values -> named tensors, module attributes, code text, optimizer state
"""

import dataclasses
import hashlib
import json
import math
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

# Far above any RViT (the XL with its optimizer state: 1.3 GB, 1,000 tensors), far below what hurts.
MAX_FILE_BYTES = 8 << 30
MAX_MEMBERS = 20_000
MAX_DIRECTORY_BYTES = 4 << 20
MAX_TEXT_BYTES = 32 << 20  # pickles and code, inflated, in all
MAX_OPCODES = 400_000
MAX_VALUES = 200_000  # met on a walk through what was read: shared parts count each time
MAX_DEPTH = 64  # of modules or containers
MAX_RANK = 8

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


def read(path: str | os.PathLike) -> Source:
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


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------- safetensors


def _looks_like_safetensors(start: bytes, size: int) -> bool:
    return size > 9 and struct.unpack("<Q", start[:8])[0] <= size - 8 and start[8:9] == b"{"


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """By the format's own library, which checks every offset; bfloat16 by hand."""
    import safetensors

    tensors = {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_TEXT_BYTES)))
        with safetensors.safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dictionary
                kind = opened.get_slice(name).get_dtype()
                if kind == "BF16":
                    begin, end = header[name]["data_offsets"]
                    raw = np.fromfile(path, "<u2", (end - begin) // 2, offset=8 + length + begin)
                    tensors[name] = _widen_bfloat16(raw).reshape(header[name]["shape"])
                elif kind in ("F16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL"):
                    tensors[name] = opened.get_tensor(name)
                else:
                    raise FileRefused(f"the tensor {name!r} is {kind}, which no RViT has")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, FileRefused):
            raise
        raise FileRefused(f"a damaged safetensors file: {_one_line(error)}") from error
    return tensors


def _widen_bfloat16(raw: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers -> float32: exact."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


# --------------------------------------------------------------------------- the zip


def _read_zip_file(path: Path, file: BinaryIO, size: int) -> Source:
    try:
        members = _read_members(file, size)
    except FileRefused:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,  # a compression or version that zipfile does not know
        RuntimeError,  # encrypted
        struct.error,
        ValueError,
        OverflowError,
        UnicodeDecodeError,
    ) as error:
        raise FileRefused(f"damaged or cut off: {_one_line(error)}") from error
    if "data.pkl" not in members:
        older = "model.json" in members
        raise FileRefused(
            "a TorchScript archive from before PyTorch 1.4: load and save it anew with a later one"
            if older
            else "a zip file without data.pkl: PyTorch wrote none such"
        )
    if members.get("byteorder", b"little").strip() != b"little":
        raise FileRefused("its numbers are not little-endian; save it anew on another machine")
    root = _Pickle(members).load("data.pkl")
    sha256 = _sha256(file)
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        return _torchscript(path, sha256, root, members)
    return _saved(path, sha256, root)


def _read_members(file: BinaryIO, size: int) -> dict[str, bytes]:
    """Every member's bytes by its name below the archive's one folder; checksums verified.

    PyTorch stores numbers uncompressed, so that only text may inflate.
    """
    _check_directory(file, size)
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(e.file_size for e in entries if e.compress_type == zipfile.ZIP_STORED) > size:
            largest = max(entries, key=lambda e: e.file_size)
            raise FileRefused(
                f"its members claim more bytes than the file has ({largest.filename!r} alone "
                f"{largest.file_size:,} of {size:,})"
            )
        text_bytes = sum(e.file_size for e in entries if e.compress_type != zipfile.ZIP_STORED)
        if text_bytes > MAX_TEXT_BYTES:
            raise FileRefused(
                f"its compressed members would inflate to {text_bytes:,} bytes, more than "
                f"{MAX_TEXT_BYTES:,}"
            )
        prefix = entries[0].filename.partition("/")[0] if entries else ""
        for entry in entries:
            folder, _, name = entry.filename.partition("/")
            parts = name.split("/")
            if folder != prefix or not name or ".." in parts or "\\" in name or "\0" in name:
                raise FileRefused(
                    f"the member {entry.filename!r} is not where PyTorch puts its members"
                )
            if name in members:
                raise FileRefused(f"the member {entry.filename!r} is there twice")
            if name.startswith("data/") and entry.compress_type != zipfile.ZIP_STORED:
                raise FileRefused(f"the member {entry.filename!r} is compressed; PyTorch's are not")
            data = archive.read(entry)  # verifies the CRC
            if len(data) != entry.file_size:
                raise FileRefused(f"the member {entry.filename!r} is cut off")
            members[name] = data
    return members


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuses a directory of members too long to be read at all, before zipfile reads it."""
    tail = min(size, 22 + 65_535)
    file.seek(size - tail)
    end = file.read(tail)
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or len(end) < at + 22:
        raise FileRefused("damaged or cut off: the zip's directory is missing at its end")
    directory_bytes = struct.unpack("<L", end[at + 12 : at + 16])[0]
    locator = end.rfind(b"PK\x06\x07", 0, at)
    if directory_bytes == 0xFFFFFFFF and locator >= 0:
        (offset,) = struct.unpack("<Q", end[locator + 8 : locator + 16])
        if offset + 56 > size:
            raise FileRefused("damaged or cut off: the zip's directory lies outside the file")
        file.seek(offset)
        directory_bytes = struct.unpack("<Q", file.read(56)[40:48])[0]
    if directory_bytes > min(size, MAX_DIRECTORY_BYTES):
        raise FileRefused(f"the zip's directory claims {directory_bytes:,} bytes")
    file.seek(0)


# --------------------------------------------------------------------------- the pickle


class _Global(NamedTuple):
    """A class or function by name; looked at, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

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


_MARK = object()
# Functions that give back their first argument, as far as values go, and what it is.
_PASSED_THROUGH = {
    "_rebuild_parameter": np.ndarray,
    "build_intlist": list,
    "build_doublelist": list,
    "build_boollist": list,
    "build_tensorlist": list,
    "restore_type_tag": object,
}


class _Pickle:
    """An interpreter of the opcodes that PyTorch writes. It calls nothing that the file names."""

    def __init__(self, members: dict[str, bytes]):
        self._members = members
        self._arrays: dict[str, np.ndarray] = {}
        self._viewed_bytes = 0
        self._limit = 2 * sum(len(data) for data in members.values())

    def load(self, member: str, folder: str = "data") -> Any:
        """The value that a pickled member describes; its tensors are arrays."""
        self._folder = folder
        data = self._members[member]
        if len(data) > MAX_TEXT_BYTES:
            raise FileRefused(f"{member} has {len(data):,} bytes, more than {MAX_TEXT_BYTES:,}")
        try:
            return self._run(data)
        except FileRefused as error:
            raise FileRefused(f"{member}: {error}") from error
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            # What genops and a wrong order of opcodes raise.
            raise FileRefused(f"{member} is no valid pickle: {_one_line(error)}") from error

    def _run(self, data: bytes) -> Any:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise FileRefused(f"it has more than {MAX_OPCODES:,} opcodes")
            name = opcode.name
            if name == "STOP":
                if len(stack) != 1 or position != len(data) - 1:
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
            elif name in _OPCODES:
                _OPCODES[name](self, stack, argument)
            elif name not in _IGNORED:
                raise FileRefused(f"it uses the opcode {name}, which PyTorch's files do not")
        raise FileRefused("it is cut off")

    def _global(self, stack: list[Any], argument: str) -> None:
        module, _, name = argument.rpartition(" ")
        found = _Global(module, name)
        allowed = (
            found.is_module_class
            or argument == "collections OrderedDict"
            or (module == "torch.jit._pickle" and name in _PASSED_THROUGH)
            or (module == "torch" and name in STORAGES)
            or (module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"))
        )
        if not allowed:
            raise FileRefused(
                f"it refers to {found}, which weights do not need and which could do harm; a "
                "pickled model is not read: save model.state_dict()"
            )
        stack.append(found)

    def _stack_global(self, stack: list[Any], _: None) -> None:
        name, module = stack.pop(), stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise FileRefused("a class is named by something that is no text")
        self._global(stack, f"{module} {name}")

    def _reduce(self, stack: list[Any], _: None) -> None:
        arguments, function = stack.pop(), stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise FileRefused("it calls something that is no function")
        name = function.name
        if name == "OrderedDict" and not arguments:
            stack.append({})
        elif name == "_rebuild_tensor_v2":
            stack.append(self._tensor(*arguments[:4]))
        elif isinstance(arguments[0], _PASSED_THROUGH.get(name, ())):
            stack.append(arguments[0])
        else:
            raise FileRefused(f"it calls {function} in a way that PyTorch does not")

    def _new_object(self, stack: list[Any], _: None) -> None:
        arguments, cls = stack.pop(), stack.pop()
        if not isinstance(cls, _Global) or not cls.is_module_class or arguments != ():
            raise FileRefused("it makes an object of something that is no TorchScript class")
        stack.append(_Object(cls))

    def _build(self, stack: list[Any], _: None) -> None:
        state, target = stack.pop(), stack[-1]
        if isinstance(target, _Object):
            target.state = state
        elif not (
            isinstance(target, dict) and isinstance(state, dict) and set(state) <= {"_metadata"}
        ):
            raise FileRefused("it sets the state of something that is no module")

    def _persistent_id(self, stack: list[Any], _: None) -> None:
        identity = stack.pop()
        match identity:
            case (
                "storage",
                _Global(module="torch", name=kind),
                str(key),
                str(),
                int(numel),
                *rest,
            ):
                if kind not in STORAGES or not re.fullmatch(r"\d{1,9}", key) or any(rest):
                    raise FileRefused(f"a storage of kind {kind!r} and key {key!r}")
                stack.append(_Storage(kind, key, numel))
            case _:
                raise FileRefused(f"a reference that is no storage: {str(identity)[:80]!r}")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        """A checked view, copied out of its storage."""
        if isinstance(shape, list):
            shape, strides = tuple(shape), tuple(strides)
        whole = (offset, *shape, *strides)
        if (
            not isinstance(storage, _Storage)
            or len(shape) != len(strides)
            or len(shape) > MAX_RANK
            or any(type(number) is not int or number < 0 for number in whole)
        ):
            raise FileRefused(
                f"a tensor of shape {str(shape)[:80]} and strides {str(strides)[:80]}"
            )
        array = self._storage_array(storage)
        numel = math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if numel and (last >= len(array) or numel > len(array)):
            raise FileRefused(
                f"a tensor of shape {list(shape)} at {offset} reaches past its storage "
                f"{storage.key} of {len(array):,} numbers"
            )
        if not numel:
            return np.zeros(shape, array.dtype)
        self._viewed_bytes += numel * array.itemsize
        if self._viewed_bytes > self._limit:
            raise FileRefused("its tensors overlap so often that they exceed the file's size")
        steps = tuple(stride * array.itemsize for stride in strides)
        view = np.lib.stride_tricks.as_strided(array[offset:], shape, steps, writeable=False)
        return np.array(view)

    def _storage_array(self, storage: _Storage) -> np.ndarray:
        member = f"{self._folder}/{storage.key}"
        if member not in self._arrays:
            data = self._members.get(member)
            if data is None:
                raise FileRefused(f"the member {member} is missing")
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
            self._arrays[member] = _widen_bfloat16(array) if kind is None else array
        return self._arrays[member]


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise FileRefused("a mark is missing")
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _tuple(length: int | None) -> Callable[[_Pickle, list[Any], Any], None]:
    def build(_pickle: _Pickle, stack: list[Any], _argument: Any) -> None:
        if length is None:
            values = _pop_to_mark(stack)
        else:
            values = stack[-length:]
            if len(values) != length or any(value is _MARK for value in values):
                raise FileRefused("a tuple lacks values")
            del stack[-length:]
        stack.append(tuple(values))

    return build


def _append(values: list[Any], stack: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise FileRefused("it appends to something that is no list")
    stack[-1].extend(values)


def _set_items(values: list[Any], stack: list[Any]) -> None:
    target = stack[-1]
    if not isinstance(target, dict) or len(values) % 2:
        raise FileRefused("it sets items of something that is no dictionary")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int):
            raise FileRefused("a dictionary has a key that is neither text nor a whole number")
        if key in target:
            raise FileRefused(f"a dictionary has the key {key!r} twice")
        target[key] = value


_PUT = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"BINGET", "LONG_BINGET"}
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "MARK": _MARK,
}
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
_OPCODES: dict[str, Callable[[_Pickle, list[Any], Any], None]] = {
    "GLOBAL": _Pickle._global,
    "STACK_GLOBAL": _Pickle._stack_global,
    "REDUCE": _Pickle._reduce,
    "NEWOBJ": _Pickle._new_object,
    "BUILD": _Pickle._build,
    "BINPERSID": _Pickle._persistent_id,
    "EMPTY_DICT": lambda _, stack, __: stack.append({}),
    "EMPTY_LIST": lambda _, stack, __: stack.append([]),
    "TUPLE": _tuple(None),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda _, stack, __: _append([stack.pop()], stack),
    "APPENDS": lambda _, stack, __: _append(_pop_to_mark(stack), stack),
    "SETITEM": lambda _, stack, __: _set_items([stack.pop(-2), stack.pop()], stack),
    "SETITEMS": lambda _, stack, __: _set_items(_pop_to_mark(stack), stack),
}


# --------------------------------------------------------------------------- what it describes


def _torchscript(path: Path, sha256: str, root: Any, members: dict[str, bytes]) -> Source:
    if not isinstance(root, _Object):
        raise FileRefused("a TorchScript archive whose root is no module")
    code = {
        name: data.decode("utf-8", errors="replace")
        for name, data in members.items()
        if name.startswith("code/") and name.endswith(".py")
    }
    tensors, attributes = _walk_modules(root, code)
    if not tensors:
        raise FileRefused(
            "a TorchScript archive without parameters. A frozen one (torch.jit.freeze, "
            "optimize_for_inference) keeps its weights as constants without names: convert the "
            "file that it was frozen from"
        )
    return Source(path, "TorchScript archive", sha256, tensors, attributes, code)


def _walk_modules(
    root: _Object, code: dict[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State-dict names are the attribute paths."""
    tensors: dict[str, np.ndarray] = {}
    attributes: dict[str, Any] = {}
    texts = class_texts(code)
    met = 0

    def walk(module: _Object, prefix: str, depth: int) -> None:
        nonlocal met
        text = texts.get(str(module.cls), "")
        if not isinstance(module.state, dict) or "def __setstate__(" in text:
            raise FileRefused(
                f"the class {module.cls} saves itself in a way of its own (__getstate__, "
                "__setstate__), which only its code can read: save model.state_dict()"
            )
        if depth > MAX_DEPTH:
            raise FileRefused(f"its modules are nested more than {MAX_DEPTH} deep")
        # Tensors that are neither belong to no state dict. An unknown class hides none.
        named = declared_tensors(text) if text else None
        for key, value in module.state.items():
            met += 1
            if met > MAX_VALUES:
                raise FileRefused(f"its modules have more than {MAX_VALUES:,} attributes")
            if not isinstance(key, str) or "." in key:
                raise FileRefused(f"a module has an attribute named {str(key)[:80]!r}")
            if isinstance(value, _Object):
                walk(value, f"{prefix}{key}.", depth + 1)
            elif isinstance(value, np.ndarray):
                if named is None or key in named:
                    tensors[prefix + key] = value
            elif isinstance(value, bool | int | float | str):
                attributes[prefix + key] = value

    walk(root, "", 0)
    return tensors, attributes


def class_texts(code: dict[str, str]) -> dict[str, str]:
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


def _saved(path: Path, sha256: str, root: Any) -> Source:
    """What torch.save wrote: a state dict, or a dictionary with one in it."""
    if not isinstance(root, dict):
        raise FileRefused(f"expected a state dict, found a {type(root).__name__}")
    _check_values(root)
    if root and all(isinstance(value, np.ndarray) for value in root.values()):
        return Source(path, "state dict", sha256, _named(root))
    for key in MODEL_KEYS:
        if isinstance(root.get(key), dict):
            model = root[key]
            break
    else:
        raise FileRefused(
            f"neither a state dict nor a dictionary with one under {', '.join(MODEL_KEYS)}; its "
            f"keys are {', '.join(map(repr, list(root)[:8])) or 'none'}"
        )
    optimizers = [root[key] for key in OPTIMIZER_KEYS if isinstance(root.get(key), dict)]
    epoch = root.get("epoch")
    return Source(
        path,
        "training checkpoint",
        sha256,
        _named(model),
        optimizer=optimizers[0] if optimizers else None,
        epoch=epoch if type(epoch) is int and epoch >= 0 else None,
    )


def _named(state: dict[Any, Any]) -> dict[str, np.ndarray]:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise FileRefused(
                f"expected tensors by name; {str(key)[:80]!r} is a {type(value).__name__}"
            )
    return state


def _check_values(root: Any) -> None:
    """Refuses containers nested too deep, without end, or blown up by sharing; and modules."""
    met = 0
    pending: list[tuple[Iterator[Any], int]] = [(iter([root]), 0)]
    while pending:
        values, depth = pending[-1]
        value = next(values, _MARK)
        if value is _MARK:
            pending.pop()
            continue
        met += 1
        if met > MAX_VALUES or depth > MAX_DEPTH:
            raise FileRefused("its containers are nested too deep or hold too many values")
        if isinstance(value, dict):
            pending.append((iter(value.values()), depth + 1))
        elif isinstance(value, list | tuple) and not isinstance(value, _Global | _Storage):
            pending.append((iter(value), depth + 1))
        elif isinstance(value, _Object | _Global | _Storage):
            raise FileRefused("a state dict holds a module, a class or a bare storage")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
