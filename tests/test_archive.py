"""PyTorch files read without running anything in them; damaged and hostile ones refused."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.small import small_config
from weights_converter import archive
from weights_converter.archive import FileRefused
from weights_converter.recognise import recognise
from weights_converter.torch_rvit import TorchRViT


def oracle(**model) -> TorchRViT:
    torch.manual_seed(0)
    return TorchRViT(small_config(**model).model).eval()


def inputs(module: TorchRViT, num_clips: int = 2, num_frames: int = 3):
    return torch.rand(num_clips * num_frames, 3, 16, 16), module.initial_state(num_clips)


def script(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


def assert_same(tensors: dict[str, np.ndarray], state: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        array = tensor.detach().numpy()
        assert tensors[name].dtype == array.dtype
        assert np.array_equal(tensors[name], array), name


# --------------------------------------------------------------------------- files that are read


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path, how):
    module = oracle(attention="reattention")
    file = tmp_path / "a.pth"
    made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, inputs(module))
    made.save(file)
    source = archive.read(file)
    assert source.kind == "TorchScript archive"
    assert_same(source.tensors, module.state_dict())
    assert any("to_qkv" in text for text in source.code.values())
    if how == "script":
        name = "transformer.layers.1.0.attention.scale"
        assert source.attributes[name] == pytest.approx(0.5)


def test_state_dict_and_training_checkpoint(tmp_path):
    module = oracle()
    torch.save(module.state_dict(), tmp_path / "a.pth")
    source = archive.read(tmp_path / "a.pth")
    assert source.kind == "state dict"
    assert_same(source.tensors, module.state_dict())

    adamw = torch.optim.AdamW(module.parameters(), 0.5)
    module(*inputs(module))[0].sum().backward()
    adamw.step()
    saved = {"net": module.state_dict(), "optimizer_state_dict": adamw.state_dict(), "epoch": 7}
    torch.save(saved, tmp_path / "b_3.pth")
    source = archive.read(tmp_path / "b_3.pth")
    assert source.kind == "training checkpoint"
    assert source.epoch == 7
    assert_same(source.tensors, module.state_dict())
    group = source.optimizer["param_groups"][0]
    assert (group["lr"], group["betas"]) == (0.5, (0.9, 0.999))
    assert np.array_equal(
        source.optimizer["state"][4]["exp_avg"], adamw.state_dict()["state"][4]["exp_avg"].numpy()
    )


def test_safetensors(tmp_path):
    module = oracle()
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    source = archive.read(tmp_path / "a.safetensors")
    assert source.kind == "safetensors"
    state = module.state_dict()
    assert set(source.tensors) == set(state)
    assert all(np.array_equal(source.tensors[n], t.numpy()) for n, t in state.items())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype, ending):
    state = {name: tensor.to(dtype) for name, tensor in oracle().state_dict().items()}
    file = tmp_path / f"a.{ending}"
    (save_file if ending == "safetensors" else torch.save)(state, file)
    weights = recognise(archive.read(file)).weights
    for name, tensor in state.items():
        assert weights[name].dtype == np.float32
        assert np.array_equal(weights[name], tensor.float().numpy())


def test_views_and_shared_storages(tmp_path):
    """What is saved as a view, transposed or in part, is read as that view."""
    whole = torch.arange(60.0)
    state = {
        "transposed": whole[:12].view(3, 4).T,
        "part": whole[20:32:3],
        "shared": whole[20:32:3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "parameter": nn.Parameter(whole[40:44]),
    }
    torch.save(state, tmp_path / "a.pth")
    assert_same(archive.read(tmp_path / "a.pth").tensors, state)


class HasPlainTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(2))
        self.table = torch.ones(4)  # in no state dict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum() + self.table.sum()


def test_only_parameters_and_buffers_of_torchscript(tmp_path):
    module = HasPlainTensor()
    source = archive.read(script(module, tmp_path / "a.pth"))
    assert_same(source.tensors, module.state_dict())


def test_reading_imports_neither_torch_nor_jax(tmp_path):
    file = script(oracle(), tmp_path / "a.pth")
    code = (
        "import sys; from weights_converter import archive, recognise;"
        f"recognise.recognise(archive.read({str(file)!r}));"
        "print([m for m in ('torch', 'jax', 'pickle_machine') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------- files that are not


class WritesAFile(nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(state[0], state[1])


class LoopsForEver(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        while True:
            self.weight = self.weight + 1.0


def zip_with(path: Path, **changed: bytes) -> Path:
    """A state dict's zip with members replaced: `data_pkl=` is `data.pkl`."""
    torch.save({"weight": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as old:
        members = {entry.filename: old.read(entry) for entry in old.infolist()}
    for name, data in changed.items():
        members[f"{path.stem}/{name.replace('_', '.')}"] = data
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    return path


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


STORAGE = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ"
)


def tensor_pickle(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A state dict of one view of the three numbers in `data/0`."""

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    head, tail = STORAGE[:2], STORAGE[2:]
    view = b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(strides) + b"\x89}tR"
    return head + b"}X\x06\x00\x00\x00weight" + tail + view + b"s."


def in_a_dictionary(value: bytes) -> bytes:
    """A pickle of {"net": value}."""
    return b"\x80\x02}X\x03\x00\x00\x00net" + value + b"s."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def compressed(path: Path, kind: int) -> Path:
    """An archive with a member that inflates to 50 MB and claims 100 bytes."""
    with zipfile.ZipFile(zip_with(path), "a", kind) as file:
        file.writestr(f"{path.stem}/more/a", bytes(50_000_000))
        file.getinfo(f"{path.stem}/more/a").file_size = 100
    return path


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


def laughs(level: int = 20) -> bytes:
    """A list of ten times a list of ten times a list ...: small on disk, endless to walk."""
    inner = laughs(level - 1) + b"h%c" % (level - 1) * 9 if level > 1 else b"K\x01"
    return b"]q%c(" % level + inner + b"e"


def refused_files(folder: Path) -> dict[str, Path]:
    """Hostile, broken and foreign files by what they are."""
    folder.mkdir(exist_ok=True)
    marker = folder / "executed"
    good = script(oracle(), folder / "good.pth")
    data = good.read_bytes()
    files: dict[str, Path] = {}

    def put(name: str, content: bytes) -> None:
        files[name] = folder / f"{name.replace(' ', '_')}.pth"
        files[name].write_bytes(content)

    def put_pickle(name: str, content: bytes) -> None:
        files[name] = zip_with(folder / f"{name.replace(' ', '_')}.pth", data_pkl=content)

    files["setstate writes"] = script(WritesAFile(str(marker)), folder / "writes.pth")
    files["setstate loops"] = script(LoopsForEver(), folder / "loops.pth")
    for name, function, *arguments in (
        ("os.system", os.system, f"touch {marker}"),
        ("eval", eval, f"open({str(marker)!r}, 'w')"),
        ("torch function", torch.save, torch.ones(2), str(marker)),
        ("torch.load", torch.load, "other.pth"),
    ):
        put_pickle(f"pickle {name}", pickle.dumps({"weight": Call(function, *arguments)}, 2))
        put(f"bare pickle {name}", pickle.dumps(Call(function, *arguments), 2))
    put("protocol 4", pickle.dumps(Call(os.system, f"touch {marker}"), 4))
    put_pickle("stack global", pickle.dumps({"w": Call(os.system, f"touch {marker}")}, 4))
    for index in range(20):
        put(f"truncated {index}", data[: len(data) * index // 20])
    directory = data.rfind(b"PK\x01\x02")
    put("directory offset", data[:directory] + b"\xff" * 46 + data[directory + 46 :])
    put("no directory", data[: data.find(b"PK\x01\x02")])
    put("claims 100 GB", claim_size(data, 100 << 30))
    plain = zip_with(folder / "plain.pth").read_bytes()  # PyTorch's own say it in zip64 records
    put("endless directory", plain[:-10] + b"\xff\xff\xff\x7f" + plain[-6:])
    put("text", b"these are no weights\n" * 30)
    put("html", b"<!DOCTYPE html><html><body>404</body></html>")
    put("empty", b"")
    put("zip of nothing", b"PK\x05\x06" + b"\0" * 18)
    put_pickle("stride 0 bomb", tensor_pickle(0, (1 << 30, 1 << 30), (0, 0)))
    put_pickle("past the end", tensor_pickle(1, (3,), (1,)))
    put_pickle("negative offset", tensor_pickle(-1, (2,), (1,)))
    put_pickle("negative stride", tensor_pickle(2, (2,), (-1,)))
    put_pickle("deep", in_a_dictionary(nested(100_000)))
    put_pickle("laughs", in_a_dictionary(laughs()))
    put_pickle("itself", in_a_dictionary(b"]q\x00h\x00a"))
    put_pickle("flood", in_a_dictionary(b"(" + b"K\x01" * 2_000_000 + b"t"))
    shape = b"(J\3\0\0\0t"
    put_pickle("deep shape", tensor_pickle(0, (3,), (1,)).replace(shape, nested(99_999), 1))
    put_pickle("deep reference", in_a_dictionary(nested(100_000) + b"Q"))
    put_pickle("laughing reference", in_a_dictionary(b"(" + laughs() + b"tQ"))
    put_pickle("laughing function", in_a_dictionary(text("s") + laughs() + b"\x85R"))
    same_hash = b"".join(whole(i * (2**61 - 1)) + b"N" for i in range(1, 60_000))
    put_pickle("keys of one hash", in_a_dictionary(b"}(" + same_hash + b"u"))
    put_pickle("mark as a value", in_a_dictionary(b"}(q\x05K\x01h\x05s"))
    put_pickle("long name", b"\x80\x02c" + b"A" * 3_000_000 + b"\nb\n.")
    put_pickle("control characters", b"\x80\x02c\x1b[31m\nb\n.")
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        files[f"bomb of kind {kind}"] = compressed(folder / f"bomb_{kind}.pth", kind)
    negated = torch.view_as_complex(torch.ones(3, 2)).conj().imag
    torch.save({"weight": negated}, folder / "negated.pth")
    files["lazily negated"] = folder / "negated.pth"
    put_pickle("no pickle", b"\xff\xfe\xfd")
    put_pickle("empty pickle", b"")
    put_pickle("memo", b"\x80\x02h\x07.")
    put_pickle("big byte order", b"\x80\x02}.")
    files["big byte order"] = zip_with(folder / "big.pth", byteorder=b"big")
    torch.save(oracle().state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    files["legacy"] = folder / "old.pth"
    torch.save(oracle(), folder / "module.pth")
    files["pickled module"] = folder / "module.pth"
    torch.jit.freeze(torch.jit.script(oracle())).save(folder / "frozen.pth")
    files["frozen"] = folder / "frozen.pth"
    files["duplicate member"] = duplicate_member(folder / "twice.pth")
    files["member outside"] = zip_with(folder / "outside.pth", **{"../evil": b"x"})
    files["folder"] = folder
    for name, length in (("short header", 10), ("long header", 1 << 62)):
        put(f"safetensors {name}", struct.pack("<Q", length) + b'{"a":{"dtype":"F32"}}')
    header = b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
    put("safetensors past the end", struct.pack("<Q", len(header)) + header + b"\0" * 16)
    return files


def claim_size(data: bytes, size: int) -> bytes:
    """The first stored member of the directory says that it has `size` bytes (zip64)."""
    source = io.BytesIO(data)
    with zipfile.ZipFile(source) as old:
        members = {entry.filename: old.read(entry) for entry in old.infolist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
        new.filelist[0].file_size = size
        new.filelist[0].compress_size = size
    return out.getvalue()


def duplicate_member(path: Path) -> Path:
    torch.save({"weight": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(f"{path.stem}/data/0", struct.pack("<3f", 9.0, 9.0, 9.0))
    return path


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, Path]:
    return refused_files(tmp_path_factory.mktemp("files"))


def test_refused(refused):
    for name, file in refused.items():
        with pytest.raises(ValueError, match=r".") as caught:  # noqa: PT012
            recognise(archive.read(file))
            pytest.fail(f"{name} was read")
        assert isinstance(caught.value, FileRefused), name
        message = str(caught.value)
        assert message.startswith(str(file)), name
        assert len(message) < 600, name
        assert "\x1b" not in message, name
    assert not (refused["folder"] / "executed").exists()


def test_storage_keys_of_older_pytorch(tmp_path):
    """Up to 1.8 torch.save named a storage by its address."""
    data = tensor_pickle(0, (3,), (1,)).replace(text("0"), text("94183920123456"), 1)
    file = zip_with(tmp_path / "a.pth", data_pkl=data)
    with zipfile.ZipFile(file, "a") as older:
        older.writestr("a/data/94183920123456", struct.pack("<3f", 1, 2, 3))
    assert archive.read(file).tensors["weight"].tolist() == [1.0, 2.0, 3.0]


def test_schedulers_and_devices_are_plain_values(tmp_path):
    module = nn.Linear(2, 2)
    optim = torch.optim.AdamW(module.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optim, [3, 5])
    saved = {
        "net": module.state_dict(),
        "optimizer_state_dict": optim.state_dict(),
        "scheduler": schedule.state_dict(),
        "device": torch.device("cuda:0"),
        "size": torch.Size([2, 2]),
    }
    torch.save(saved, tmp_path / "a.pth")
    assert_same(archive.read(tmp_path / "a.pth").tensors, module.state_dict())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such"):
        archive.read(tmp_path / "no_such.pth")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pickle os.system", "posix.system|os.system"),
        ("pickle eval", "builtin.*eval"),
        ("setstate writes", "__setstate__"),
        ("frozen", "constants without names"),
        ("legacy", "before PyTorch 1.6.*torch.save"),
        ("claims 100 GB", "107,374,182,400"),
        ("pickled module", "save model.state_dict"),
        ("truncated 0", "empty"),
        ("text", "not a PyTorch zip"),
        ("deep", "nested more than 64 deep"),
        ("laughs", "more than 100,000 values"),
        ("itself", "nested more than 64 deep"),
        ("keys of one hash", "a key of type int"),
        ("bomb of kind 8", "Bad CRC|size it claims"),
        ("lazily negated", "in a way that is not known"),
        ("flood", "opcodes"),
        ("stride 0 bomb", "reaches past its storage"),
        ("duplicate member", "there twice"),
        ("endless directory", "directory claims"),
    ],
)
def test_refusal_names_the_reason(refused, name, says):
    with pytest.raises(FileRefused, match=says):
        archive.read(refused[name])


def test_nan_and_other_networks_are_refused(tmp_path):
    state = oracle().state_dict()

    def refuse(says: str, **changed) -> None:
        new = OrderedDict({**state, **changed})
        torch.save({k: v for k, v in new.items() if v is not None}, tmp_path / "a.pth")
        with pytest.raises(FileRefused, match=says):
            recognise(archive.read(tmp_path / "a.pth"))

    bias = "transformer.layers.1.0.mlp.net.3.bias"
    refuse(f"NaN.*{bias}", **{bias: torch.full((16,), float("nan"))})
    refuse("inf", **{bias: torch.full((16,), float("inf"))})
    refuse(f"missing: {bias}", **{bias: None})
    refuse(r"\[15\], expected \[16\]", **{bias: torch.zeros(15)})
    refuse("extra: more", more=torch.ones(2))
    refuse("int64", **{bias: torch.zeros(16, dtype=torch.int64)})
    missing_layer = {n: None for n in state if n.startswith("transformer.layers.0.")}
    refuse("missing: transformer.layers.0.*, transformer.layers.0", **missing_layer)
    refuse(
        "missing: .*embedding.bias.*classifier.1.weight",
        **{"embedding.bias": None, "classifier.1.weight": None},
    )
    qkv = "transformer.layers.0.0.attention.to_qkv.weight"
    refuse("misshapen", **{qkv: state[qkv].T.contiguous()})
    refuse("no square", pos_embedding=torch.ones(1, 4, 16))

    convolutions = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 7), bn1=nn.BatchNorm2d(8)))
    torch.save(convolutions.state_dict(), tmp_path / "b.pth")
    with pytest.raises(FileRefused, match=r"no RViT.*conv1\.weight"):
        recognise(archive.read(tmp_path / "b.pth"))


def mutations(data: bytes, count: int, seed: int = 0):
    """Copies of `data` with one byte changed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        yield bytes(changed)


def count_read(file: Path, num_mutations: int) -> int:
    """How many mutations are read, to the same weights; all others are refused."""
    weights = recognise(archive.read(file)).weights
    changed = file.with_name("changed.pth")
    read = 0
    for data in mutations(file.read_bytes(), num_mutations):
        changed.write_bytes(data)
        try:
            found = recognise(archive.read(changed))
        except FileRefused:
            continue
        read += 1
        assert found.weights.keys() == weights.keys()
        assert all(found.weights[n].tobytes() == w.tobytes() for n, w in weights.items())
    return read


@pytest.mark.parametrize(
    "num_mutations", [150, pytest.param(2000, marks=pytest.mark.slow)], ids=str
)
def test_no_single_byte_changes_the_weights(tmp_path, num_mutations):
    read = count_read(script(oracle(num_layers=1), tmp_path / "a.pth"), num_mutations)
    assert 0 < read < num_mutations  # padding and time stamps matter to nobody
