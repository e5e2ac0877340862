"""PyTorch files to converted models and back: recognised, proven, exact."""

import dataclasses
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from torch import Tensor

import input_pipeline
import rvit_jax
from configs.base import get_config
from rvit_jax import checkpoint, losses, optimizer, sharding, steps, stopping, train
from rvit_jax.initialise import initialise
from rvit_jax.seal import DamagedError
from tests import jester_folder
from tests.faulty import flip, largest
from tests.small import saved_model, small_config, small_model
from weights_converter import adamw, archive, convert, mapping, prove, verify
from weights_converter.__main__ import main
from weights_converter.convert import to_torch
from weights_converter.recognise import Finding, Recognised, recognise
from weights_converter.run_archive import for_torch, seeded_clips
from weights_converter.torch_rvit import TorchRViT

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VARIANTS = [
    {"attention": attention, "readout": readout, "head": head, "unused_reattention": unused}
    for attention, readout, head, unused in (
        *itertools.product(
            ("linear", "softmax", "reattention"),
            ("class_token", "class_and_hidden_tokens"),
            ("linear", "mlp"),
            (False,),
        ),
        ("softmax", "class_and_hidden_tokens", "mlp", True),
        ("linear", "class_token", "linear", True),
    )
]
UNUSED = VARIANTS[-2]
FRAMES = 5


def variant_id(variant: dict) -> str:
    return "-".join(str(value) for value in variant.values() if value is not False)


def make_oracle(**model) -> TorchRViT:
    torch.manual_seed(0)
    return TorchRViT(small_config(**model).model).eval()


def save(module: torch.nn.Module, file: Path, how: str, num_frames: int = FRAMES) -> Path:
    """Writes a file of the given kind."""
    if how == "script":
        torch.jit.script(module).save(file)
    elif how == "trace":
        video = for_torch(seeded_clips(2, num_frames, 16))
        torch.jit.trace(module, (video, module.initial_state(2))).save(file)
    else:
        torch.save(module.state_dict(), file)
    return file


def without_evidence(found: Recognised) -> Recognised:
    """What shapes tell, and no more."""
    heads = found.num_heads if found.num_heads.certain else Finding(None)
    return dataclasses.replace(found, attention=Finding(None), num_heads=heads)


def quiet(_: str) -> None:
    """Takes the report's lines."""


def to_flax(file: Path, out_dir: Path, **options) -> convert.Converted:
    return convert.to_flax(file, out_dir, say=quiet, **options)


# --------------------------------------------------------------------------- recognised


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_evidence(tmp_path, variant, how):
    module = make_oracle(**variant, num_layers=3, hidden_size=24, num_heads=3, mlp_dim=40)
    found = recognise(archive.read(save(module, tmp_path / "a.pth", how)))
    assert found.attention.value == variant["attention"]
    assert found.num_heads.value == 3
    config = found.model_config(variant["attention"], 3)
    expected = small_config(**variant, num_layers=3, hidden_size=24, num_heads=3, mlp_dim=40)
    assert config == expected.model


def test_state_dict_tells_no_attention(tmp_path):
    file = save(make_oracle(), tmp_path / "a.pth", "state dict")
    found = recognise(archive.read(file))
    assert found.attention.value is None
    assert found.num_heads.value is None
    with pytest.raises(ValueError, match=r"--attention=linear\|softmax.*--num_heads=N"):
        to_flax(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    to_flax(file, tmp_path / "out", attention="linear", num_heads=4)
    assert rvit_jax.load(tmp_path / "out").config.model.attention == "linear"


def test_the_users_word_wins_and_is_noted(tmp_path):
    file = save(make_oracle(), tmp_path / "a.pth", "script")  # linear, 4 heads
    found = recognise(archive.read(file), attention="softmax", num_heads=8)
    assert (found.attention.value, found.num_heads.value) == ("softmax", 8)
    assert "says linear" in str(found.attention)
    assert "says 4" in str(found.num_heads)
    with pytest.raises(ValueError, match="3 heads do not divide"):
        recognise(archive.read(file), num_heads=3)
    with pytest.raises(ValueError, match="no re-attention parameters"):
        recognise(archive.read(file), attention="reattention")


CODE = """class Attention(Module):
  __parameters__ = []
  to_qkv : __torch__.Linear
  elu : __torch__.ELU
  def forward(self: __torch__.Attention,
    x: Tensor) -> Tensor:
    qkv = (self.to_qkv).forward(x, )
    q = torch.reshape(torch.slice(qkv), {sizes})
    w = torch.{call}(q)
    return w
"""


@pytest.mark.parametrize(
    ("sizes", "call", "heads", "attention"),
    [
        ("[4, 5, 3, 2, 8]", "softmax", 2, "softmax"),
        ("[_1, _2, 3, 8, -1]", "elu", 8, "linear"),
        ("[_1, _2, 3, _3, 8]", "elu", 2, "linear"),
        ("[_1, _2, 4, 4]", "elu", 4, "linear"),
        ("[_1, _2, 16]", "gelu", None, None),
        ("[0, 2, 1, 3]", "log_softmax", None, None),
    ],
)
def test_constants_in_code(tmp_path, sizes, call, heads, attention):
    """D is 16 here; a traced archive of other code than ours has no more than this."""
    source = archive.read(save(make_oracle(), tmp_path / "a.pth", "state dict"))
    code = {"code/__torch__.py": CODE.format(sizes=sizes, call=call)}
    found = recognise(archive.Source(**{**vars(source), "code": code}))
    assert found.num_heads.value == heads
    assert found.attention.value == attention


def test_contradicting_evidence_decides_nothing(tmp_path):
    source = archive.read(save(make_oracle(), tmp_path / "a.pth", "state dict"))
    block = "transformer.layers.0.0.attention."
    said = {block + "num_heads": 2, block + "head_dim": 4, block + "scale": 16**-0.5}
    found = recognise(archive.Source(**{**vars(source), "attributes": said}))
    assert found.num_heads.value is None
    assert "num_heads says 2" in str(found.num_heads)
    assert "head_dim says 4" in str(found.num_heads)
    # Some write D^-0.5 whatever the number of heads.
    for name, value in (("scale", 16**-0.5), ("num_heads", float("inf")), ("scale", 1e200)):
        odd = archive.Source(**{**vars(source), "attributes": {block + name: value}})
        assert recognise(odd).num_heads.value is None


class RenamedRoots(TorchRViT):
    """Root parameters under other names."""

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        for name in ("pos_embedding", "_cls", "_seq"):
            self.register_parameter(f"other{name}", getattr(self, name))
            delattr(self, name)


def test_roots_of_other_names(tmp_path):
    torch.manual_seed(0)
    config = small_config().model
    module = RenamedRoots(config)
    file = save(module, tmp_path / "a.pth", "state dict")
    found = recognise(archive.read(file))
    assert found.names["_seq"] == "other_seq"
    assert np.array_equal(found.weights["_seq"], module.other_seq.detach().numpy())
    assert any("taken for pos_embedding" in note for note in found.notes)


# --------------------------------------------------------------------------- exact


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("variant", [VARIANTS[0], UNUSED], ids=variant_id)
def test_there_and_back_bit_for_bit(tmp_path, variant, ending):
    module = make_oracle(**variant)
    file = save(module, tmp_path / "a.pth", "script")
    to_flax(file, tmp_path / "out")
    back = convert.to_torch(tmp_path / "out", tmp_path / f"b.{ending}")
    state = module.state_dict()
    if ending == "pth":
        tensors = torch.load(back, weights_only=True)
        assert list(tensors) == list(state)  # by which an optimizer numbers them
        TorchRViT(small_config(**variant).model).load_state_dict(tensors, strict=True)
        tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    else:
        tensors = load_file(back)
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].tobytes() == tensor.numpy().tobytes(), name


def test_converted_model_is_complete(tmp_path):
    """The folder alone is enough to load, and says where it came from."""
    module = make_oracle(**UNUSED)
    file = save(module, tmp_path / "a.pth", "script")
    to_flax(file, tmp_path / "made", class_names=["a", "b", "c", "d", "e"])
    (tmp_path / "made").rename(tmp_path / "moved")
    loaded = rvit_jax.load(tmp_path / "moved")
    assert loaded.class_names == ("a", "b", "c", "d", "e")
    assert loaded.config.model == small_config(**UNUSED).model
    video = seeded_clips(2, FRAMES, 16)
    with torch.no_grad():
        theirs, _ = module(for_torch(video), module.initial_state(2))
    ours, _ = loaded.model(video)
    assert prove.relative_error(ours, theirs.numpy()) < 1e-5
    origin = json.loads((tmp_path / "moved" / "model.json").read_text())["converted_from"]
    assert origin["sha256"] == archive.read(file).sha256
    assert origin["parity"] == {"proven": False, "reason": origin["parity"]["reason"]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "moved"]


def test_jester_names_for_27_classes(tmp_path):
    file = save(make_oracle(num_classes=27), tmp_path / "a.pth", "script")
    to_flax(file, tmp_path / "out")
    names = rvit_jax.load(tmp_path / "out").class_names
    assert (names[0], names[26]) == ("Swiping Left", "Doing other things")


# --------------------------------------------------------------------------- proven


class AddsH(torch.nn.Module):
    """An encoder whose new state lacks the positions."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.layers = encoder.layers

    def forward(
        self, x: Tensor, hidden: list[Tensor], pos_embedding: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        new_hidden: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            for block in layer:
                x, state = block(x + pos_embedding, hidden[index] + pos_embedding)
                new_hidden.append(state - pos_embedding)
        return x, new_hidden


def in_process(monkeypatch) -> None:
    """Runs files here: a child's imports take seconds."""
    from weights_converter import run_archive

    def run(file: Path, request: dict, timeout: float) -> tuple[dict, dict]:
        folder = Path(file).with_suffix(".run")
        folder.mkdir(exist_ok=True)
        (folder / "request.json").write_text(json.dumps(request))
        run_archive.main(str(file), str(folder / "request.json"), str(folder))
        result = json.loads((folder / "result.json").read_text())
        if "failed" in result:
            raise prove.NotRun(result["failed"])
        return result, {f.stem: np.load(f) for f in folder.glob("*.npy")}

    monkeypatch.setattr(prove, "run_in_child", run)


@pytest.mark.parametrize(
    ("variant", "how"),
    [*((variant, "trace") for variant in VARIANTS), (VARIANTS[0], "script"), (UNUSED, "script")],
    ids=lambda value: value if isinstance(value, str) else variant_id(value),
)
def test_proof(tmp_path, monkeypatch, variant, how):
    in_process(monkeypatch)
    module = make_oracle(**variant, num_layers=1)
    file = save(module, tmp_path / "a.pth", how)
    proof = prove.prove(without_evidence(recognise(archive.read(file))))
    assert proof.candidate == prove.Candidate(variant["attention"], 4)
    assert proof.logits <= 1e-5
    assert proof.state <= 1e-5
    assert proof.clips == ((1, 36) if how == "script" else (1, FRAMES))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_proof_in_half_precision(tmp_path, monkeypatch, dtype):
    """The Flax model is float32; the file is as far from it as its own rounding is."""
    in_process(monkeypatch)
    module = make_oracle(attention="softmax", num_layers=1).to(dtype)
    video = for_torch(seeded_clips(2, FRAMES, 16)).to(dtype)
    file = tmp_path / "a.pth"
    torch.jit.trace(module, (video, module.initial_state(2))).save(file)
    proof = prove.prove(recognise(archive.read(file)))
    assert proof.candidate == prove.Candidate("softmax", 4)
    assert 1e-5 < proof.logits <= prove.ROUNDING_FACTOR * proof.rounding < 0.1


def full_size_cases() -> list:
    """Every variant at the released size, and the workdirs that RVIT_TRAINED names."""
    folders = [f for f in os.environ.get("RVIT_TRAINED", "").split(os.pathsep) if f]
    return [*VARIANTS, *folders]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(
    "case", full_size_cases(), ids=lambda c: c if isinstance(c, str) else variant_id(c)
)
def test_archives_at_full_size(tmp_path, case, how):
    """36 frames: the right variant by evidence alone and by proof alone, and the same logits."""
    if isinstance(case, str):
        loaded = rvit_jax.load(case)
        config = loaded.config.model
        config.block_dropout_rate = get_config().model.block_dropout_rate  # no file tells it
        weights = mapping.to_torch(mapping.flatten(loaded.model.module), config)
        module = TorchRViT(config).eval()
        module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    else:
        config = get_config().model
        config.update(case)
        torch.manual_seed(1)
        module = TorchRViT(config).eval()
    file = tmp_path / "a.pth"
    if how == "script":
        torch.jit.script(module).save(file)
    else:
        video = for_torch(seeded_clips(2, 36, config.image_size))
        torch.jit.trace(module, (video, module.initial_state(2))).save(file)
    found = recognise(archive.read(file))
    assert found.model_config(found.attention.value, found.num_heads.value) == config
    proof = prove.prove(without_evidence(found))
    print(f"proof: {case} {how}: logits {proof.logits:.1e}, state {proof.state:.1e}")
    assert proof.candidate == prove.Candidate(config.attention, config.num_heads)
    assert proof.clips[1] == 36
    assert proof.logits <= 1e-5
    assert proof.state <= 1e-5


def traced(module: torch.nn.Module, file: Path, *, num_clips: int = 2) -> Recognised:
    video = for_torch(seeded_clips(num_clips, FRAMES, 16))
    state = torch.zeros(module._seq.shape[0], num_clips, 4, 16)
    torch.jit.trace(module, (video, state)).save(file)
    return recognise(archive.read(file))


def test_wrong_evidence_is_overcome(tmp_path, monkeypatch):
    in_process(monkeypatch)
    found = traced(make_oracle(attention="softmax", num_heads=2, num_layers=1), tmp_path / "a.pth")
    wrong = dataclasses.replace(
        found, num_heads=Finding(8, ("a name",)), attention=Finding("linear", ("a name",))
    )
    assert prove.prove(wrong).candidate == prove.Candidate("softmax", 2)


class Changed(TorchRViT):
    """An archive of other habits."""

    def __init__(self, habit: str, **model):
        torch.manual_seed(0)
        super().__init__(small_config(num_layers=1, attention="softmax", **model).model)
        self.habit = habit

    def forward(self, video: Tensor, state: Tensor):
        if self.habit == "baked batch":
            video = video.reshape(3 * FRAMES, 3, 16, 16)
        if self.habit == "reads four frames":
            batch = state.shape[1]
            video = video.unflatten(0, (batch, -1))[:, :4].flatten(0, 1)
        logits, new_state = super().forward(video, state)
        if self.habit == "logits alone":
            return logits
        if self.habit == "state without token":
            return logits, new_state[:, :, 1:]
        if self.habit == "features":
            return logits, new_state[0, 0]
        if self.habit == "NaN":
            return logits / 0.0 - logits / 0.0, new_state
        return logits, new_state


def prove_changed(tmp_path: Path, monkeypatch, habit: str, num_clips: int = 2) -> prove.Proof:
    in_process(monkeypatch)
    return prove.prove(traced(Changed(habit).eval(), tmp_path / "a.pth", num_clips=num_clips))


@pytest.mark.parametrize("habit", ["logits alone", "state without token", "features"])
def test_proof_by_what_can_be_compared(tmp_path, monkeypatch, habit):
    proof = prove_changed(tmp_path, monkeypatch, habit)
    assert proof.candidate == prove.Candidate("softmax", 4)
    assert proof.logits <= 1e-5
    if habit == "state without token":
        assert proof.state <= 1e-5
    else:
        assert proof.state is None
    assert len(proof.notes) == (habit == "features")


def test_proof_of_a_baked_in_batch(tmp_path, monkeypatch):
    proof = prove_changed(tmp_path, monkeypatch, "baked batch", num_clips=3)
    assert proof.clips == (3, FRAMES)
    assert proof.logits <= 1e-5


def test_proof_of_a_file_that_reads_fewer_frames(tmp_path, monkeypatch):
    proof = prove_changed(tmp_path, monkeypatch, "reads four frames")
    assert proof.clips == (1, 4)


def test_answers_that_are_no_numbers_prove_nothing(tmp_path, monkeypatch):
    with pytest.raises(prove.NotProven, match="NaN"):
        prove_changed(tmp_path, monkeypatch, "NaN")


def test_asked_for_and_proven_must_agree(tmp_path, monkeypatch):
    in_process(monkeypatch)
    file = save(make_oracle(num_layers=1), tmp_path / "a.pth", "trace")
    with pytest.raises(ValueError, match=r"attention=softmax was asked for.*computes linear"):
        to_flax(file, tmp_path / "out", prove=True, attention="softmax")


def test_a_child_process_runs_the_file(tmp_path):
    file = save(make_oracle(**UNUSED, num_layers=1), tmp_path / "a.pth", "trace")
    converted = to_flax(file, tmp_path / "out", prove=True)
    assert converted.proof.candidate.attention == "softmax"
    description = json.loads((tmp_path / "out" / "model.json").read_text())
    parity = description["converted_from"]["parity"]
    assert parity["proven"]
    assert parity["logits"] <= 1e-5


def test_another_function_is_not_proven(tmp_path, monkeypatch):
    in_process(monkeypatch)
    module = make_oracle(num_layers=1)
    module.transformer.layers[0][0].mlp.net[1] = torch.nn.Tanh()
    file = save(module, tmp_path / "a.pth", "trace")
    with pytest.raises(ValueError, match="computes what no candidate does; the closest: linear"):
        to_flax(file, tmp_path / "out", prove=True)
    assert not (tmp_path / "out").exists()


def test_nearly_the_same_function_is_not_proven(tmp_path, monkeypatch):
    """The tanh form of GELU differs by a few 1e-4: more than rounding."""
    in_process(monkeypatch)
    module = make_oracle(num_layers=1, attention="softmax")
    module.transformer.layers[0][0].mlp.net[1] = torch.nn.GELU(approximate="tanh")
    file = save(module, tmp_path / "a.pth", "trace")
    with pytest.raises(ValueError, match="a little different"):
        to_flax(file, tmp_path / "out", prove=True)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "zeros"])
@pytest.mark.parametrize("keeps", [True, False], ids=["a+g", "a+h"])
@pytest.mark.parametrize("attention", ["linear", "softmax", "reattention"])
def test_other_habits_of_the_state_are_found_and_kept(
    tmp_path, monkeypatch, attention, keeps, learned
):
    """Shapes and code text do not tell them; the Flax model then has them too."""
    in_process(monkeypatch)
    module = make_oracle(
        attention=attention, readout="class_and_hidden_tokens", learned_hidden_token=learned
    )
    if not keeps:
        module.transformer = AddsH(module.transformer)
    file = save(module, tmp_path / "a.pth", "trace")
    converted = to_flax(file, tmp_path / "out", prove=True)
    assert converted.proof.candidate == prove.Candidate(attention, 4, keeps, learned)
    assert converted.proof.logits <= 1e-5
    assert converted.proof.state <= 1e-5
    assert converted.config.model.state_keeps_positions == keeps
    assert converted.config.model.learned_hidden_token == learned
    loaded = rvit_jax.load(tmp_path / "out")
    video = seeded_clips(2, FRAMES, 16)
    with torch.no_grad():
        theirs = module(for_torch(video), module.initial_state(2))[0].numpy()
    np.testing.assert_allclose(loaded.model(video)[0], theirs, atol=1e-5 * np.abs(theirs).max())
    parts = list(verify.verify(archive.read(file), tmp_path / "out"))
    assert [part.name for part in parts if not part.equal] == []
    to_torch(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(back[name], tensor)


class WantsCuda(torch.nn.Module):
    """A traced file with its device baked in."""

    def __init__(self, rvit: TorchRViT):
        super().__init__()
        for name, child in rvit.named_children():
            setattr(self, name, child)
        for name, parameter in list(rvit.named_parameters(recurse=False)):
            self.register_parameter(name, parameter)

    def forward(self, video: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._cls.to(torch.device("cuda:0")), state


def test_what_cannot_run_here_is_converted_and_says_so(tmp_path, monkeypatch):
    in_process(monkeypatch)
    file = tmp_path / "a.pth"
    torch.jit.script(WantsCuda(make_oracle())).save(file)
    said = []
    converted = convert.to_flax(file, tmp_path / "out", prove=True, say=said.append)
    assert converted.proof is None
    assert re.search("cuda|nvidia", converted.why_not_proven, re.I)  # by PyTorch's build
    assert any("NOT PROVEN" in line for line in said)


class LoopsForEver(TorchRViT):
    def forward(self, video: Tensor, state: Tensor) -> Tensor:
        while True:
            state = state + 1.0
        return state


def test_a_run_without_end_is_stopped(tmp_path):
    file = tmp_path / "a.pth"
    torch.jit.script(LoopsForEver(small_config().model)).save(file)
    converted = to_flax(file, tmp_path / "out", prove=True, timeout=12, attention="linear")
    assert "did not end within 12 s" in converted.why_not_proven


# --------------------------------------------------------------------------- verified


def parts_of(file: Path, checkpoint: Path, **options) -> dict[str, verify.Part]:
    return {p.name: p for p in verify.verify(archive.read(file), checkpoint, **options)}


@pytest.mark.parametrize("options", [{}, {"prove": True}], ids=["oracle", "own code"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_verify(tmp_path, monkeypatch, options, how):
    in_process(monkeypatch)
    file = save(make_oracle(**UNUSED), tmp_path / "a.pth", how)
    to_flax(file, tmp_path / "out")
    parts = parts_of(file, tmp_path / "out", **options)
    frames = FRAMES if how == "trace" else 36  # baked in
    layers = [f"layers.{i}.{what}" for i in range(2) for what in ("state", "output")]
    expected = ["weights", "embedding", *layers, "read-out", f"logits, {frames} frames"]
    assert list(parts) == expected
    assert all(part.equal for part in parts.values())


def test_verify_names_the_place(tmp_path):
    module = make_oracle()
    right = save(module, tmp_path / "right.pth", "state dict")
    with torch.no_grad():
        module.transformer.layers[1][0].mlp.net[0].weight[3, 5] += 0.5
    wrong = save(module, tmp_path / "wrong.pth", "state dict")
    to_flax(wrong, tmp_path / "out", attention="linear", num_heads=4)
    parts = parts_of(right, tmp_path / "out")
    different = [name for name, part in parts.items() if not part.equal]
    # The last layer's output enters no later state.
    assert different == ["weights", "layers.1.output", "read-out", "logits, 36 frames"]
    assert parts["weights"].where == "layers/1/mlp/dense_in/kernel"


@pytest.mark.parametrize("how", ["state dict", "trace"])
def test_verify_holds_the_checkpoint_against_the_file(tmp_path, monkeypatch, how):
    in_process(monkeypatch)
    module = make_oracle()
    right = save(module, tmp_path / "right.pth", how)
    with torch.no_grad():
        module.classifier[1].weight.neg_()
    to_flax(save(module, tmp_path / "wrong.pth", "script"), tmp_path / "out")
    parts = parts_of(right, tmp_path / "out", prove=how == "trace")
    different = [name for name, part in parts.items() if not part.equal]
    assert different[0] == "weights"
    assert [name.split(",")[0] for name in different[1:]] == ["read-out", "logits"]


def test_verify_in_half_precision(tmp_path, monkeypatch):
    in_process(monkeypatch)
    module = make_oracle(attention="softmax").to(torch.bfloat16)
    video = for_torch(seeded_clips(2, FRAMES, 16)).to(torch.bfloat16)
    file = tmp_path / "a.pth"
    torch.jit.trace(module, (video, module.initial_state(2))).save(file)
    to_flax(file, tmp_path / "out")
    assert all(part.equal for part in parts_of(file, tmp_path / "out", prove=True).values())


def test_verify_says_what_it_could_not_compare(tmp_path, monkeypatch):
    in_process(monkeypatch)
    file = tmp_path / "a.pth"
    traced(Changed("baked batch").eval(), file, num_clips=3)
    to_flax(file, tmp_path / "out")
    monkeypatch.setattr("weights_converter.run_archive.run_parts", lambda *_: 1 / 0)
    parts = parts_of(file, tmp_path / "out", prove=True)
    assert list(parts) == ["weights", "parts", f"logits, {FRAMES} frames"]
    assert "cannot be called" in parts["parts"].where
    with pytest.raises(ValueError, match="no code to run"):
        parts_of(
            save(make_oracle(attention="softmax", num_layers=1), tmp_path / "b.pth", ""),
            tmp_path / "out",
            prove=True,
        )


def test_verify_of_another_size(tmp_path):
    to_flax(save(make_oracle(), tmp_path / "a.pth", "script"), tmp_path / "out")
    other = save(make_oracle(mlp_dim=32), tmp_path / "b.pth", "script")
    with pytest.raises(ValueError, match="mlp_dim is 32 and 24"):
        parts_of(other, tmp_path / "out")


# --------------------------------------------------------------------------- training goes on


def torch_steps(module: TorchRViT, optim: torch.optim.Optimizer, batches) -> list[float]:
    """The loss before each update, without dropout."""
    module.eval()
    curve = []
    for video, label in batches:
        logits, _ = module(for_torch(video), module.initial_state(len(label)))
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(label), label_smoothing=0.1
        )
        optim.zero_grad()
        loss.backward()
        optim.step()
        curve.append(loss.item())
    return curve


def training_batches(count: int, seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        video = rng.uniform(-1, 1, (3, FRAMES, 16, 16, 3)).astype(np.float32)
        yield video, rng.integers(0, 5, 3)


def flax_steps(out_dir: Path, batches) -> list[float]:
    """Goes on from a converted training checkpoint."""
    loaded = rvit_jax.load(out_dir)
    config = loaded.config
    config.model.update(dropout_rate=0.0, block_dropout_rate=0.0)
    model = rvit_jax.RViT(config.model, rngs=nnx.Rngs(0))
    mapping.load_into(model, mapping.flatten(loaded.model.module))
    rate = config.optimizer.learning_rate
    chain = optimizer.make_optimizer(config.optimizer, lambda step: rate)
    graphdef, state = steps.create_train_state(model, chain)
    template = jax.tree.map(
        ocp.utils.to_shape_dtype_struct, {"step": state.step, "state": state.opt_state}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out_dir.absolute() / "optimizer", template)
    state = state.replace(step=restored["step"], opt_state=restored["state"])
    train_step = jax.jit(
        steps.make_train_step(graphdef, chain, losses.make_loss(config.loss), seed=0, ragged=False)
    )
    curve = []
    for video, label in batches:
        batch = {"video": video, "label": label, "mask": np.ones(len(label), bool)}
        state, sums = train_step(state, batch)
        curve.append(float(sums["loss"] / sums["clips"]))
    return curve


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "embedding frozen"])
def test_training_goes_on_where_pytorch_stopped(tmp_path, frozen, prefix):
    module = make_oracle(**UNUSED)
    if frozen:
        module.embedding.requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(trained, 2e-3, betas=(0.8, 0.99), weight_decay=0.05)
    torch_steps(module, optim, training_batches(7, seed=0))
    net = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    file = tmp_path / "rvit_3.pth"
    torch.save({"net": net, "optimizer_state_dict": optim.state_dict()}, file)

    converted = to_flax(file, tmp_path / "out")
    recipe = converted.config.optimizer
    assert recipe.learning_rate == 2e-3
    assert (recipe.betas, recipe.weight_decay) == ((0.8, 0.99), 0.05)
    assert converted.config.model.attention == "softmax"  # re-attention has no Adam state
    description = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (description["step"], description["epoch"]) == (7, 3)

    theirs = torch_steps(module, optim, training_batches(10, seed=1))
    ours = flax_steps(tmp_path / "out", training_batches(10, seed=1))
    assert np.max(np.abs(np.subtract(ours, theirs)) / theirs) <= 1e-4


def test_the_learning_rate_of_a_late_epoch(tmp_path):
    """The reference multiplies by 0.8 at epochs 10, 20, ...; the recipe begins higher."""
    module = make_oracle(attention="reattention")
    optim = torch.optim.AdamW(module.parameters(), 1e-4 * 0.8**2)
    torch_steps(module, optim, training_batches(1, seed=0))
    saved = {"net": module.state_dict(), "optimizer_state_dict": optim.state_dict()}
    torch.save(saved, tmp_path / "a.pth")
    config = to_flax(tmp_path / "a.pth", tmp_path / "out", epoch=25).config
    assert config.optimizer.learning_rate == pytest.approx(1e-4)
    schedule = optimizer.learning_rate_schedule(config.optimizer, 100, 30)
    assert float(schedule(2599)) == pytest.approx(1e-4 * 0.8**2)


def test_a_damaged_optimizer_is_refused(tmp_path):
    module = make_oracle(attention="reattention", num_layers=1)
    optim = torch.optim.AdamW(module.parameters(), 1e-3)
    torch_steps(module, optim, training_batches(1, seed=0))
    saved = {"net": module.state_dict(), "optimizer_state_dict": optim.state_dict()}
    torch.save(saved, tmp_path / "a_3.pth")
    config = to_flax(tmp_path / "a_3.pth", tmp_path / "out").config
    config.init_from = str(tmp_path / "out")
    flip(largest(tmp_path / "out" / "optimizer"))
    _, state = steps.create_train_state(
        rvit_jax.RViT(config.model, rngs=nnx.Rngs(0)),
        optimizer.make_optimizer(config.optimizer, lambda step: 0.0),
    )
    with pytest.raises(DamagedError, match="optimizer"):
        initialise(config, state, 3)


@pytest.mark.parametrize(
    ("name", "epoch", "expected"),
    [("a_3", None, 3), ("a_3", 5, 5), ("a_2022", None, None), ("a_99999", None, None)],
)
def test_epoch(tmp_path, name, epoch, expected):
    """A larger number than the reference's 1,000 epochs is a date or a step."""
    module = make_oracle(attention="reattention", num_layers=1)
    optim = torch.optim.AdamW(module.parameters(), 1e-3)
    torch_steps(module, optim, training_batches(1, seed=0))
    saved = {"net": module.state_dict(), "optimizer_state_dict": optim.state_dict()}
    torch.save(saved, tmp_path / f"{name}.pth")
    recipe = to_flax(tmp_path / f"{name}.pth", tmp_path / "out", epoch=epoch).config.optimizer
    assert json.loads((tmp_path / "out" / "model.json").read_text())["epoch"] == expected
    assert recipe.learning_rate == 1e-3
    assert recipe.schedule == ("step" if expected is not None else "constant")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "no AdamW"),
        (lambda p: torch.optim.AdamW(p, eps=1e-6), "eps is 1e-06"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "max_exp_avg_sq"),
        (lambda p: torch.optim.AdamW(list(p)[:5]), "are not the model's"),
        (lambda p: torch.optim.NAdam(p), "no AdamW"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "coupled"),
        (lambda p: torch.optim.AdamW([{"params": [q]} for q in p]), "in one group"),
    ],
    ids=["sgd", "eps", "amsgrad", "fewer", "nadam", "adam", "groups"],
)
def test_another_optimizer_is_left_behind(tmp_path, make, says):
    module = make_oracle()
    optim = make(module.parameters())
    torch_steps(module, optim, training_batches(1, seed=0))
    saved = {"net": module.state_dict(), "optimizer_state_dict": optim.state_dict()}
    torch.save(saved, tmp_path / "a.pth")
    source = archive.read(tmp_path / "a.pth")
    found = recognise(source, attention="linear", num_heads=4)
    with pytest.raises(ValueError, match=says):
        adamw.read_adamw(source.optimizer, found.weights)
    said = []
    convert.to_flax(
        tmp_path / "a.pth", tmp_path / "out", attention="linear", num_heads=4, say=said.append
    )
    assert any("left behind" in line for line in said)
    assert not (tmp_path / "out" / "optimizer").exists()


# --------------------------------------------------------------------------- the command line


def test_commands(tmp_path, capsys):
    file = save(make_oracle(), tmp_path / "a.pth", "script")
    assert main(["inspect", str(file)]) == 0
    assert "attention: linear" in capsys.readouterr().out
    assert main(["to_flax", str(file), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "NOT PROVEN" in said
    assert "clips: 36 frames, one in 1 of 12 a second, as the reference reads Jester" in said
    as_trained = ["--num_frames=15", "--frame_stride=3"]
    assert main(["to_flax", str(file), str(tmp_path / "slow"), *as_trained]) == 0
    assert "clips: 15 frames, one in 3 of 12 a second\n" in capsys.readouterr().out
    dataset = rvit_jax.load(tmp_path / "slow").config.dataset
    assert (dataset.num_frames, dataset.frame_stride) == (15, 3)
    assert main(["verify", str(file), str(tmp_path / "out")]) == 0
    assert "equal" in capsys.readouterr().out
    assert main(["to_torch", str(tmp_path / "out"), str(tmp_path / "b.pth")]) == 0
    file.with_name("n.txt").write_text("one\ntwo\n")
    capsys.readouterr()

    def fails(*argv: str | Path) -> str:
        assert main([str(a) for a in argv]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    assert "not empty" in fails("to_flax", file, tmp_path / "out")
    assert "exists" in fails("to_torch", tmp_path / "out", tmp_path / "b.pth")
    assert "no file" in fails("inspect", tmp_path / "none.pth")
    assert "b.onnx: expected the ending .pth" in fails(
        "to_torch", tmp_path / "out", tmp_path / "b.onnx"
    )
    assert not (tmp_path / "b.onnx").exists()
    assert "does not exist" in fails("to_torch", tmp_path / "none", tmp_path / "c.pth")
    assert "does not exist" in fails("verify", file, tmp_path / "none")
    with torch.no_grad():
        module = make_oracle()
        module._cls += 1.0
    other = save(module, tmp_path / "c.pth", "script")
    said = fails("verify", other, tmp_path / "out")
    assert "differ, first in weights, most in class_token" in said
    names = ["--class_names", file.with_name("n.txt")]
    assert "--class_names: 2 names" in fails("to_flax", file, tmp_path / "d", *names)
    assert main(["inspect", str(tmp_path / "none.pth"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    for wrong in (
        ["to_flax", str(file), "x", "--num_heads=0"],
        ["to_flax", str(file)],
        ["inspect"],
        ["nothing"],
        [],
    ):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
        capsys.readouterr()


@pytest.mark.parametrize(
    ("error", "status"), [(OSError("no space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch, error, status):
    file = save(make_oracle(), tmp_path / "a.pth", "script")

    def fail(*_):
        raise error

    monkeypatch.setattr("rvit_jax.checkpoint.write_json", fail)
    assert main(["to_flax", str(file), str(tmp_path / "out")]) == status
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


class TestAFullDisk:
    """`RLIMIT_FSIZE` stands in for it: a file that grows beyond it is an error of the system."""

    @pytest.fixture(autouse=True)
    def full(self, tmp_path):
        # Made before: the process itself may write no more than this to a file.
        save(make_oracle(), tmp_path / "a.pth", "script")
        saved_model(tmp_path / "model")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

    def test_of_a_converted_model(self, tmp_path, capfd):
        out = tmp_path / "new" / "out"
        assert main(["to_flax", str(tmp_path / "a.pth"), str(out)]) == 1
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith(f"error: {out} cannot be written: ")
        assert not any("Traceback" in line for line in said)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "model"]

    @pytest.mark.parametrize("ending", ["pth", "safetensors"])
    def test_of_a_pytorch_file(self, tmp_path, capfd, ending):
        out = tmp_path / f"b.{ending}"
        assert main(["to_torch", str(tmp_path / "model"), str(out)]) == 1
        said = capfd.readouterr().err.strip()
        assert said == f"error: {out} cannot be written: File too large (--debug shows where)"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "model"]


def test_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "weights_converter", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = (
        f"error: {tmp_path} is a folder; expected a file of PyTorch weights (--debug shows where)"
    )
    assert done.stderr == f"{said}\n"


def torch_epochs(module, optim, data, num_steps: int) -> list[float]:
    """Losses of PyTorch on the next batches of our own pipeline."""
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    curve = []
    for _ in range(num_steps):
        batch = next(data)
        real = torch.from_numpy(batch["mask"])
        video = for_torch(batch["video"].astype(np.float32) / 127.5 - 1.0)
        logits = module(video, module.initial_state(len(real)))[0]
        value = loss(logits[real], torch.from_numpy(batch["label"])[real].long())
        optim.zero_grad()
        value.backward()
        optim.step()
        curve.append(value.item())
    return curve


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "embedding frozen"])
def test_a_run_goes_on_where_pytorch_stopped(tmp_path, frozen):
    """Weights, moments, epoch and the learning rate's staircase, by `config.init_from`."""
    lines = [f"{i};{jester_folder.CLASSES[i % 3]}" for i in range(1, 11)]
    root = jester_folder.make_set(
        tmp_path / "data", {"train": lines, "validation": lines[:2]}, num_frames=FRAMES
    )
    config = small_config(num_classes=3, attention="softmax", block_dropout_rate=0.0)
    config.dataset.update(
        data_dir=str(root), classes=jester_folder.CLASSES, num_frames=FRAMES, num_workers=0
    )
    config.update(batch_size=4, num_epochs=12)
    config.optimizer.learning_rate = 2e-3
    if frozen:
        config.optimizer.frozen = ("patch_embedding/*",)
    data = input_pipeline.get_dataset(config, "train")
    torch.manual_seed(0)
    module = TorchRViT(config.model)
    module.embedding.requires_grad_(not frozen)
    optim = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 2e-3)
    torch_epochs(module, optim, data, 8 * data.steps_per_epoch)
    file = tmp_path / "rvit_7.pth"
    torch.save({"net": module.state_dict(), "optimizer_state_dict": optim.state_dict()}, file)
    theirs = torch_epochs(module, optim, data, 2 * data.steps_per_epoch)
    for group in optim.param_groups:  # the reference's staircase, at epoch 10
        group["lr"] *= 0.8
    theirs += torch_epochs(module, optim, data, 2 * data.steps_per_epoch)

    names = tmp_path / "names.txt"
    names.write_text("\n".join(jester_folder.CLASSES))
    arguments = ["to_flax", str(file), str(tmp_path / "out"), "--class_names", str(names)]
    assert main([*arguments, "--attention", "softmax", "--num_heads", "4"]) == 0
    config.init_from = str(tmp_path / "out")
    losses_seen = []
    validation = input_pipeline.get_dataset(config, "validation")
    run = train._Run(
        config,
        tmp_path / "run",
        sharding.make_layout(config),
        input_pipeline.get_dataset(config, "train"),
        validation,
    )
    train_step = run.train_step

    def watched(state, batch):
        state, sums = train_step(state, batch)
        losses_seen.append(float(sums["loss"] / sums["clips"]))
        return state, sums

    run.train_step = watched
    description = checkpoint.describe_model(config, jester_folder.CLASSES)
    with checkpoint.Checkpoints(tmp_path / "run", description, keep=1) as checkpoints:
        run.train(checkpoints, stopping.StopRequest(), run.read_start())
    assert len(losses_seen) == len(theirs) == 12
    assert np.max(np.abs(np.subtract(losses_seen, theirs)) / theirs) <= 1e-4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [24, 27, 30, 33, 36]


def test_another_model_cannot_be_started_from(tmp_path):
    config = small_config(attention="linear")
    config.init_from = str(saved_model(tmp_path / "m", attention="softmax", mlp_dim=16))
    _, state = steps.create_train_state(
        rvit_jax.RViT(config.model, rngs=nnx.Rngs(0)),
        optimizer.make_optimizer(config.optimizer, lambda step: 0.0),
    )
    with pytest.raises(ValueError, match=r"attention is 'softmax' there.*mlp_dim is 16 there"):
        initialise(config, state, 3)


def test_weights_alone_start_at_step_zero(tmp_path):
    config = small_config(attention="softmax")
    config.init_from = str(saved_model(tmp_path / "m", seed=3, attention="softmax"))
    _, state = steps.create_train_state(
        rvit_jax.RViT(config.model, rngs=nnx.Rngs(0)),
        optimizer.make_optimizer(config.optimizer, lambda step: 0.0),
    )
    start = initialise(config, state, 3)
    assert (int(start.state.step), start.epochs) == (0, 0)
    expected = nnx.state(small_model(seed=3, attention="softmax"), nnx.Param)
    for ours, theirs in zip(
        jax.tree.leaves(start.state.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_of_an_earlier_version_is_read(tmp_path):
    """Keys that its config lacks take the value that the code had then."""
    folder = saved_model(tmp_path / "m")
    description = json.loads((folder / "model.json").read_text())
    for key in ("state_keeps_positions", "learned_hidden_token"):
        del description["config"]["model"][key]
    del description["config"]["init_from"]
    (folder / "model.json").write_text(json.dumps(description))
    loaded = rvit_jax.load(folder)
    assert loaded.config.model.state_keeps_positions
    assert loaded.config.init_from == ""
