"""Exported programs, run without this package, are the model; a failed export leaves nothing."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import rvit_jax
from input_pipeline.files import write_json
from rvit_jax import export, run_export
from rvit_jax.checkpoint import describe_model
from rvit_jax.model import CompiledRViT, normalise
from tests.small import small_config, small_model

BAR = 1e-5  # x the largest value
CLASS_NAMES = [f"class {index}" for index in range(5)]
# With JAX and NumPy alone, as the docstring says; prints what could be imported of this package.
FRESH = """
import importlib.util, sys
import numpy as np, jax
folder, cases, answers = sys.argv[1:]
load = lambda name: jax.jit(
    jax.export.deserialize(bytearray(open(f"{folder}/{name}.jaxexport", "rb").read())).call)
step, clip, results = load("step"), load("clip"), {}
for name, video in np.load(cases).items():
    results[f"{name}_clip_logits"], results[f"{name}_clip_hidden"] = clip(video)
    hidden = np.repeat(np.load(f"{folder}/initial_hidden.npy"), len(video), axis=1)
    for t in range(video.shape[1]):
        logits, hidden = step(video[:, t], hidden)
    results[f"{name}_step_logits"], results[f"{name}_step_hidden"] = logits, hidden
np.savez(answers, **results)
print(importlib.util.find_spec("rvit_jax"), "flax" in sys.modules)
"""


@pytest.fixture(scope="module", autouse=True)
def _as_users_call():
    """Without the tests' own check of shapes, for which a symbolic size is no number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model on disk, as a conversion leaves it."""
    folder = tmp_path_factory.mktemp("model")
    config = small_config(readout="class_and_hidden_tokens", head="mlp", attention="softmax")
    config.dataset.num_frames = 4
    model = rvit_jax.RViT(config.model, rngs=nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", nnx.to_pure_dict(nnx.state(model)))
    write_json(folder / "model.json", describe_model(config, CLASS_NAMES))
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "new" / "folder"
    assert run("--checkpoint", checkpoint, "--output", folder) == 0
    return folder


def run(*arguments) -> int:
    """The command's exit status."""
    return export.main(["export", *map(str, arguments)])


def pixels(batch_size: int, num_frames: int) -> np.ndarray:
    """uint8 [B, T, H, W, 3]."""
    shape = (batch_size, num_frames, 16, 16, 3)
    return np.random.default_rng(batch_size).integers(0, 256, shape, np.uint8)


def assert_close(ours, expected):
    error = np.abs(np.asarray(ours) - np.asarray(expected)).max()
    assert error <= BAR * np.abs(expected).max(), float(error)


def refused(capsys, status: int, *arguments) -> str:
    """The one line on stderr of a command that ends with `status`."""
    capsys.readouterr()
    assert run(*arguments) == status
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith(("writing", "running"))]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_fresh_process_without_this_package_gets_the_models_answers(
    checkpoint, exported, tmp_path
):
    cases = {f"{b}x{t}": pixels(b, t) for b, t in ((1, 6), (3, 2))}
    np.savez(tmp_path / "cases.npz", **cases)
    command = [sys.executable, "-I", "-c", FRESH, exported]
    command += [tmp_path / "cases.npz", tmp_path / "answers.npz"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "False"]
    answers = np.load(tmp_path / "answers.npz")
    model = rvit_jax.load(checkpoint).model
    for name, video in cases.items():
        logits, hidden = model(video)
        for program in ("clip", "step"):  # as many steps as frames
            assert_close(answers[f"{name}_{program}_logits"], logits)
            assert_close(answers[f"{name}_{program}_hidden"], hidden)


def test_the_folder_says_how_to_use_it(exported):
    description = json.loads((exported / "export.json").read_text())
    assert description["class_names"] == CLASS_NAMES
    step, clip = description["programs"]["step"], description["programs"]["clip"]
    shapes = {a["name"]: (a["dtype"], a["shape"]) for a in step["inputs"] + step["outputs"]}
    assert shapes == {
        "frame": ("uint8", ["b", 16, 16, 3]),
        "hidden": ("float32", [2, "b", 5, 16]),
        "logits": ("float32", ["b", 5]),
        "new_hidden": ("float32", [2, "b", 5, 16]),
    }
    assert [a["shape"] for a in clip["inputs"]] == [["b", "t", 16, 16, 3]]
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert 0 <= max(description["check"]["errors"]["stablehlo"].values()) <= BAR
    files = {path.name for path in exported.iterdir()}
    assert files == {"export.json", "initial_hidden.npy", "step.jaxexport", "clip.jaxexport"}
    assert set(description["files"]) == files - {"export.json"}
    for name, recorded in description["files"].items():
        content = (exported / name).read_bytes()
        assert recorded == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_no_path_of_this_machine_is_exported(exported):
    for name in ("step", "clip"):
        assert b"/rvit_jax/" not in (exported / f"{name}.jaxexport").read_bytes()


@pytest.mark.parametrize(("attention", "dtype"), [("linear", "uint8"), ("reattention", "float32")])
def test_every_attention_is_exported(attention, dtype):
    model = CompiledRViT(small_model(attention=attention))
    video = pixels(2, 3)
    (clip,) = export.make_programs(model, ["clip"], dtype)
    exported = jax.export.export(jax.jit(clip.with_weights), platforms=["cpu"])(*clip.specs())
    ours = exported.call(video if dtype == "uint8" else normalise(video))
    for answer, expected in zip(ours, model(video), strict=True):
        assert_close(answer, expected)


def test_a_savedmodel_runs_without_jax(checkpoint, tmp_path):
    arguments = ("--what=step", "--format=savedmodel")
    assert run("--checkpoint", checkpoint, "--output", tmp_path / "out", *arguments) == 0
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert 0 <= description["check"]["errors"]["savedmodel"]["step"] <= BAR
    assert (tmp_path / "out" / "savedmodel" / "saved_model.pb").is_file()


def test_onnx_answers_as_the_model(checkpoint, tmp_path):
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    assert run("--checkpoint", checkpoint, "--output", tmp_path / "out", "--format=onnx") == 0
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    errors = description["check"]["errors"]["onnx"]
    assert set(errors) == {"step", "clip"}
    assert 0 <= max(errors.values()) <= BAR


def test_a_missing_converter_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(
        capsys, 1, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--format=onnx"
    )
    assert "pip install --no-deps jax2onnx" in line
    assert not list(tmp_path.iterdir())


def test_for_another_machine_alone_it_says_that_nothing_was_checked(checkpoint, tmp_path, capsys):
    arguments = ("--what=step", "--platforms=tpu")
    assert run("--checkpoint", checkpoint, "--output", tmp_path / "out", *arguments) == 0
    printed = capsys.readouterr()
    assert "NOT CHECKED" in printed.err
    assert "not checked" in printed.out
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert description["check"]["errors"] == {"stablehlo": None}


class TestNothingIsLeft:
    @pytest.fixture(autouse=True)
    def _without_cases(self, monkeypatch):
        """What a fresh process would be given; computing it takes a while."""
        monkeypatch.setattr(export, "_cases", lambda *_: {})

    def test_when_the_answers_differ(self, checkpoint, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(export, "_run_fresh", lambda *_: {"step": 1e-7, "clip": 2e-5})
        output = tmp_path / "new" / "out"
        line = refused(capsys, 1, "--checkpoint", checkpoint, "--output", output)
        assert "clip (stablehlo) is not the model: it differs by 2.0e-05" in line
        assert not list(tmp_path.iterdir())

    def test_when_there_is_no_answer(self, checkpoint, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(export, "_run_fresh", lambda *_: {"step": float("nan"), "clip": 0.0})
        refused(capsys, 1, "--checkpoint", checkpoint, "--output", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_when_a_file_is_broken(self, checkpoint, tmp_path, capsys, monkeypatch):
        def broken(programs, folder, _):
            (folder / "step.jaxexport").write_bytes(b"\0" * 64)
            return {"step": "step.jaxexport"}

        monkeypatch.setitem(export.WRITERS, "stablehlo", broken)
        arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "out", "--what=step")
        assert "do not run in a fresh process" in refused(capsys, 1, *arguments)
        assert not list(tmp_path.iterdir())

    def test_when_it_is_interrupted(self, checkpoint, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(export, "_run_fresh", interrupted)
        assert run("--checkpoint", checkpoint, "--output", tmp_path / "out", "--what=step") == 130
        assert not list(tmp_path.iterdir())


class TestRefusals:
    def test_a_folder_with_other_files_even_with_overwrite(self, checkpoint, tmp_path, capsys):
        (tmp_path / "mine").touch()
        for more in ((), ("--overwrite",)):
            line = refused(capsys, 1, "--checkpoint", checkpoint, "--output", tmp_path, *more)
            assert "holds other files" in line
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_an_earlier_export_unless_overwrite(self, checkpoint, tmp_path, capsys, monkeypatch):
        write_json(tmp_path / "out" / "export.json", {})
        (tmp_path / "out" / "clip.jaxexport").touch()
        arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "out", "--what=step")
        assert "--overwrite" in refused(capsys, 1, *arguments)
        monkeypatch.setattr(export, "_run_fresh", lambda *_: {"step": 0.0})
        assert run(*arguments, "--overwrite") == 0
        assert not (tmp_path / "out" / "clip.jaxexport").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_no_checkpoint(self, tmp_path, capsys):
        arguments = ("--checkpoint", tmp_path / "none", "--output", tmp_path / "out")
        assert "none does not exist" in refused(capsys, 1, *arguments)

    def test_a_file_in_the_way(self, checkpoint, tmp_path, capsys):
        (tmp_path / "file").touch()
        arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "file" / "out")
        assert "is a file, not a folder" in refused(capsys, 1, *arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--output=x"], "--checkpoint is missing"),
            (["--checkpoint=x"], "--output is missing"),
            (["--checkpoint=x", "--output=y", "--what=frame"], "step, clip"),
            (["--checkpoint=x", "--output=y", "--format=tflite"], "'tflite' is unknown"),
            (["--checkpoint=x", "--output=y", "--platforms=gpu"], "cpu, cuda, rocm, tpu"),
            (["--checkpoint=x", "--output=y", "--format="], "nothing is named"),
            (["--chekpoint=x"], "did you mean --checkpoint"),
            (["x"], "'x' is no flag"),
        ],
    )
    def test_wrong_arguments(self, arguments, message, capsys):
        assert message in refused(capsys, 2, *arguments)


def test_the_check_finds_a_difference(exported):
    """What stands between a wrong export and the user, itself tested."""
    video = pixels(1, 2)
    programs = run_export.load(exported, "stablehlo")
    logits, hidden = (np.asarray(answer) for answer in programs["clip"](video))
    first = np.load(exported / "initial_hidden.npy")
    first_logits, _ = programs["step"](video[:, 0], first)
    cases = {
        "video_0": video,
        "logits_0": logits,
        "hidden_0": hidden,
        "step_logits_0": np.stack([first_logits, logits]),
        "step_hidden_0": hidden,
    }
    assert max(run_export.largest_errors(exported, "stablehlo", cases).values()) <= BAR
    worse = {**cases, "logits_0": logits + np.float32(1e-3) * np.abs(logits).max()}
    errors = run_export.largest_errors(exported, "stablehlo", worse)
    assert errors == pytest.approx({"step": 1e-3, "clip": 1e-3}, rel=0.1)
