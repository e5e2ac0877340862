"""What a model costs: counts worked out by hand, and parts that are the whole."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from rvit_jax import profile
from rvit_jax.model import CompiledRViT, RViT
from tests.small import random_video, small_model

# small_model: N = 4 patches of 8 x 8 x 3 = 192 values, S = 5, D = 16, A = 4, C = 4, M = 24, K = 5.
PATCH_EMBEDDING = 2 * 4 * 192 * 16
PROJECTIONS = 2 * (2 * 5 * 16 * 48) + 2 * 5 * 16 * 16  # frame and state to q, k, v; the way out
BETWEEN_TOKENS = {"linear": 1280, "softmax": 1600, "reattention": 1600 + 2 * 4 * 4 * 5 * 5}
MLP_ALL, MLP_ONE = 2 * 5 * 16 * 24 * 2, 2 * 16 * 24 * 2


def shapes_only(**keys) -> RViT:
    """A small model without numbers: counting needs none."""
    return nnx.eval_shape(lambda: small_model(**keys))


@pytest.fixture(scope="module")
def model() -> RViT:
    """In training mode, with dropout."""
    model = small_model(readout="class_and_hidden_tokens", head="mlp", block_dropout_rate=0.5)
    model.train()
    return model


@pytest.fixture(scope="module")
def measured(model) -> dict:
    return profile.profile_model(model, batch_size=2, num_frames=3, seconds=0.0)


@pytest.mark.parametrize("attention", BETWEEN_TOKENS)
def test_flops_by_hand(attention):
    parts = profile.count_parts(shapes_only(attention=attention))
    gate = PROJECTIONS + BETWEEN_TOKENS[attention]
    assert [part.flops for part in parts] == [
        *(PATCH_EMBEDDING, 0),
        *(gate, MLP_ALL),
        *(gate, MLP_ONE),  # the last layer's output is the class token's alone
        2 * 16 * 5,
    ]


def test_flops_of_the_larger_readout():
    read_out = profile.count_parts(shapes_only(readout="class_and_hidden_tokens", head="mlp"))[-1]
    # F = (L + 1) D = 48, inside 192.
    assert read_out.flops == 2 * 48 * 192 + 2 * 192 * 48 + 2 * 48 * 5
    assert not read_out.every_frame


@pytest.mark.parametrize(
    "keys",
    [
        {"attention": "linear"},
        {"attention": "reattention", "head": "mlp"},
        {"attention": "softmax", "unused_reattention": True, "num_layers": 3},
        {"readout": "class_and_hidden_tokens", "num_layers": 1},
    ],
    ids=str,
)
def test_the_parts_hold_every_parameter(keys):
    model = shapes_only(**keys)
    ours = sum(part.parameters for part in profile.count_parts(model))
    assert ours == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("keeps_positions", [True, False])
def test_the_parts_in_a_row_are_the_step(keeps_positions):
    model = small_model(
        attention="reattention",
        readout="class_and_hidden_tokens",
        state_keeps_positions=keeps_positions,
    )
    frame = random_video(2, 1)[:, 0]
    step = CompiledRViT(model).step
    _, hidden = step(frame, model.initial_hidden(2))
    expected, _ = step(frame, hidden)
    names = []

    def call(name, module, function, *inputs):
        names.append(name)
        return function(module, *inputs)

    logits = jax.jit(lambda *inputs: profile.run_parts(model, *inputs, call))(frame, hidden)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    counted = [part.name for part in profile.count_parts(model)]
    assert names == [name for name in counted if name != "tokens, positions"]


def test_the_sums_are_of_the_parts(measured):
    for key, total in measured["total"].items():
        assert total == pytest.approx(sum(part[key] for part in measured["parts"]))
    *every_frame, read_out = measured["parts"]
    assert all(p["flops_per_clip"] == 3 * p["flops_per_frame"] for p in every_frame)
    assert read_out["flops_per_clip"] == read_out["flops_per_frame"]


def test_the_state_is_of_one_stream(measured):
    assert measured["state_bytes_per_stream"] == 2 * 5 * 16 * 4  # L S D floats
    assert measured["parameter_bytes"] == 4 * measured["total"]["parameters"]


def test_times_are_of_what_was_called(measured):
    assert all(part["ms_alone"] > 0 for part in measured["parts"] if part["flops_per_frame"])
    assert measured["step_ms_per_frame"] == measured["step_ms"] / 2
    assert measured["clip_ms_per_frame"] == measured["clip_ms"] / (2 * 3)


def test_xla_counts_what_we_count_and_elementwise_operations(measured):
    assert measured["xla"]["ratio"] > 1.0
    # At a size where the matrix products are nearly all of it.
    wide = {"image_size": 64, "hidden_size": 192, "num_heads": 8, "mlp_dim": 768}
    model = shapes_only(**wide, attention="reattention", head="mlp")
    step, leaves = profile._with_leaves(model, lambda model, *inputs: model.step(*inputs))
    frame = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
    hidden = jax.ShapeDtypeStruct((2, 1, 65, 192), np.float32)
    counted = sum(part.flops for part in profile.count_parts(model))
    xla = profile._xla_flops(step.lower(leaves, frame, hidden).compile())
    assert 1.0 < xla / counted < 1.06


def test_memory_holds_the_parameters(measured):
    assert measured["memory"]["step"]["inputs"] > measured["parameter_bytes"]


def test_the_model_is_left_as_it_is(model, measured):
    assert not model.dropout.deterministic


NARROW = [
    f"--config.model.{key}"
    for key in ("image_size=16", "patch_size=8", "hidden_size=16", "mlp_dim=24", "num_layers=1")
]


def test_the_table(measured, capsys, monkeypatch):
    monkeypatch.setattr(profile, "profile_model", lambda *_, **__: dict(measured))
    assert profile.main(["profile", "--config=configs/gestures.py", *NARROW]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[:18].strip() for line in lines]
    assert names[:2] == ["part", "-" * 18]
    assert names[2:6] == [
        "patch embedding",
        "tokens, positions",
        "layer 0: attention",
        "layer 0: MLP",
    ]
    assert len({len(line) for line in lines[: lines.index("")]}) == 1  # columns under each other
    assert any("batch size 2, 3 frames" in line for line in lines)


def test_json(capsys):
    arguments = ["--config=configs/gestures.py", *NARROW, "--seconds=0", "--frames=7"]
    assert profile.main(["profile", *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_frames"] == 7
    assert document["model"]["hidden_size"] == 16
    assert document["parts"][-1]["name"] == "read-out"


@pytest.mark.parametrize(
    ("status", "arguments", "message"),
    [
        (2, [], "--config=FILE"),
        (2, ["--config=configs/jester.py", "--checkpoint=x"], "either"),
        (2, ["--config=configs/jster.py"], "there is no file"),
        (2, ["--config="], "is empty"),
        (2, ["--config=configs/jester.py:v9"], "no variant 'v9'"),
        (2, ["--config=configs/jester.py", "--config.model.num_head=2"], "'model.num_heads'"),
        (2, ["--config=configs/jester.py", "--config.model.num_heads=5"], "does not divide"),
        (2, ["--checkpoint=x", "--config.model.num_heads=2"], "is for --config"),
        (2, ["--checkpoint=x", "--batchsize=2"], "did you mean --batch_size"),
        (2, ["--checkpoint=x", "--batch_size=0"], "a whole number from 1"),
        (1, ["--checkpoint=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_refusals(status, arguments, message, capsys):
    assert profile.main(["profile", *arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
