"""Many devices give what one gives. They are simulated, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from rvit_jax import losses, sharding, steps
from rvit_jax.layers import random_uint16
from rvit_jax.model import RViT
from tests.small import small_config

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
NUM_CLIPS, NUM_FRAMES = 16, 5


def on_devices(code: str, num_devices: int = 8) -> dict:
    """What a program prints as its last line, in JSON, with so many devices."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests import test_sharding as t\n{code}"],
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def spread_config(data: int, fsdp: int, *, parts: int = 1):
    config = small_config(hidden_size=64, mlp_dim=128)
    config.batch_size = NUM_CLIPS
    config.mesh.update(data=data, fsdp=fsdp)
    config.optimizer.accumulation_steps = parts
    return config


def random_batch(seed: int) -> dict[str, np.ndarray]:
    """Its last three rows are padding, as at the end of an epoch."""
    random = np.random.default_rng(seed)
    shape = (NUM_CLIPS, NUM_FRAMES, 16, 16, 3)
    return {
        "video": random.integers(0, 256, shape, dtype=np.uint8),
        "label": random.integers(0, 5, NUM_CLIPS).astype(np.int32),
        "num_frames": np.full(NUM_CLIPS, NUM_FRAMES, np.int32),
        "mask": np.arange(NUM_CLIPS) < NUM_CLIPS - 3,
    }


def spread_step(config) -> tuple:
    """The layout, the compiled step and its first state; with dropout."""
    layout = sharding.make_layout(config)
    sgd = optax.sgd(0.05)
    graphdef, state = steps.create_train_state(RViT(config.model, rngs=nnx.Rngs(0)), sgd)
    train_step = steps.make_train_step(
        graphdef,
        sgd,
        losses.make_loss(config.loss),
        seed=1,
        ragged=False,
        accumulation_steps=config.optimizer.accumulation_steps,
        spread=layout.spread,
    )
    return layout, layout.compile_step(train_step), layout.place(state)


def trained(config, num_steps: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sums of each step, and the parameters after the last."""
    layout, step, state = spread_step(config)
    sums = []
    for seed in range(num_steps):
        state, noted = step(state, layout.send(random_batch(seed)))
        sums.append([float(noted[key]) for key in ("clips", "loss", "right", "grad_norm")])
    return np.array(sums), jax.tree.leaves(jax.device_get(state.params))


def differences(layouts: list[tuple[int, int, int]]) -> None:
    """Prints how far each layout (data, fsdp, parts) is from one device, relative."""
    found = {}
    for data, fsdp, parts in layouts:
        sums, params = trained(spread_config(data, fsdp, parts=parts))
        one_sums, one_params = trained(spread_config(1, 1, parts=parts))
        found[f"{data} x {fsdp}, {parts}"] = [
            float(np.max(np.abs(sums / one_sums - 1))),
            max(
                float(np.abs(p - one).max() / np.abs(one).max())
                for p, one in zip(params, one_params, strict=True)
            ),
        ]
    print(json.dumps(found))


def collectives(data: int, fsdp: int) -> None:
    """Prints where the compiled step holds which collective, and over how many numbers."""
    layout, step, state = spread_step(spread_config(data, fsdp))
    program = step.lower(state, layout.send(random_batch(0))).compile().as_text()
    found, where = [], ""
    for line in program.splitlines():
        if opening := re.match(r"(ENTRY )?%?[\w.\-]+ .*\{$", line):
            where = "step" if opening[1] else "inside"
        if operation := re.search(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", operation[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            found.append([where, operation[2], sum(sizes)])
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    cut = [leaf for leaf in jax.tree.leaves(state.params) if layout.spec(leaf) != PartitionSpec()]
    parts = {leaf.addressable_shards[0].data.size * fsdp == leaf.size for leaf in cut}
    cut_size = sum(leaf.size for leaf in cut)
    print(json.dumps({"found": found, "size": size, "cut": cut_size, "parts": list(parts)}))


@pytest.mark.parametrize(
    "layouts",
    [
        [(2, 2, 2)],
        pytest.param(
            [(4, 2, 1), (2, 4, 1), (1, 8, 1), (2, 1, 1), (8, 1, 2), (4, 1, 4)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_many_devices_train_as_one(layouts):
    """Dropout, padding and accumulation included: only the order of sums differs."""
    found = on_devices(f"t.differences({layouts})")
    assert len(found) == len(layouts)
    for layout, (sums, params) in found.items():
        assert sums < 1e-5, layout
        assert params < 1e-5, layout


def test_gradients_are_summed_once():
    """Not after every frame: the step's only collectives are the sums, outside of all loops."""
    program = on_devices("t.collectives(8, 1)")
    assert {where for where, *_ in program["found"]} == {"step"}
    assert {name for _, name, _ in program["found"]} == {"all-reduce"}
    numbers = sum(size for *_, size in program["found"])
    # Every gradient once, the loss, the right answers and the clips; then sums of single numbers.
    assert program["size"] < numbers <= program["size"] + 8
    assert program["cut"] == 0


def test_large_tensors_are_cut_gathered_and_summed_once():
    program = on_devices("t.collectives(2, 4)")
    assert {where for where, *_ in program["found"]} == {"step"}
    sizes = {}
    for _, name, size in program["found"]:
        sizes[name] = sizes.get(name, 0) + size
    assert set(sizes) == {"all-reduce", "all-gather", "reduce-scatter"}
    assert 0 < program["cut"] < program["size"]
    assert program["parts"] == [True]
    assert sizes["all-gather"] == program["cut"]
    assert sizes["reduce-scatter"] == program["cut"] / 4
    # What is whole, the other half of what is cut, and the squares of the gradient's norm.
    assert sizes["all-reduce"] < program["size"] - program["cut"] + program["cut"] / 4 + 100


def test_a_part_draws_what_one_device_draws():
    """Each part's rows of dropout's numbers, also of keys that were split and folded."""
    for shape in ((8, 3, 5), (12, 7)):
        key = jax.random.key(3)
        for derive in (
            lambda key: key,
            lambda key: jax.random.fold_in(key, 7),
            lambda key: jax.random.split(key, 3)[2],
            lambda key: jax.random.fold_in(jax.random.split(jax.random.fold_in(key, 1), 2)[1], 2),
        ):
            expected = random_uint16(derive(key), shape)
            rows = shape[0] // 4
            for part in range(4):
                of_part = derive(sharding._key_of_part(key, jnp.uint32(part)))
                drawn = random_uint16(of_part, (rows, *shape[1:]))
                np.testing.assert_array_equal(drawn, expected[part * rows : (part + 1) * rows])


def test_nothing_else_draws_with_the_key_of_a_part():
    key = sharding._key_of_part(jax.random.key(5), jnp.uint32(1))
    with pytest.raises(NotImplementedError, match="random_uint16"):
        jax.random.normal(key, (2,))


def test_batches_of_another_length_are_compiled_together_too(monkeypatch):
    """As length buckets make them; each process compiles at the same step and waits once."""
    waits = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding.distributed, "wait", waits.append)
    total = sharding._begin_together(jax.jit(lambda batch: batch["video"].sum()))
    for num_frames in (4, 6, 4, 6):
        assert float(total({"video": np.ones((2, num_frames))})) == 2 * num_frames
    assert waits == ["compiled"] * 2


def test_one_device_has_no_mesh():
    """Then nothing is wrapped: the program is what it is without this module."""
    layout = sharding.make_layout(spread_config(1, 1))
    assert layout.mesh is None

    def gradient(*_):
        raise AssertionError

    assert layout.spread(gradient) is gradient


def test_the_longest_axis_that_divides_is_cut():
    devices = np.array(jax.devices()[:1] * 8).reshape(2, 4)  # nothing is put on them
    layout = sharding.Layout(jax.sharding.Mesh(devices, ("data", "fsdp")), None, 48)
    spec = PartitionSpec
    for shape, expected in {
        (8, 12): spec(None, "fsdp"),
        (16, 4): spec("fsdp"),
        (6, 8): spec(None, "fsdp"),
        (7, 9): spec(),  # nothing divides
        (4, 8): spec(),  # too small
        (): spec(),
    }.items():
        assert layout.spec(np.zeros(shape)) == expected, shape


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 12}, "batch_size=12 does not divide among 8 devices: .* such as 16"),
        ({"mesh.data": 3, "mesh.fsdp": 4}, r"data=3 x fsdp=4 devices, but there are 8"),
        ({"mesh.fsdp": 16}, r"data=1 x fsdp=16 devices, but there are 8"),
        ({"optimizer.accumulation_steps": 4}, "does not divide the 2 clips that each of 8"),
    ],
)
def test_what_does_not_divide_is_named(keys, message, monkeypatch):
    eight = jax.devices()[:1] * 8
    monkeypatch.setattr(jax, "devices", lambda: eight)
    config = spread_config(-1, 1)
    for key, value in keys.items():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        sharding.check_accumulation(config, sharding.make_layout(config))


def test_a_run_goes_on_with_other_devices_and_is_evaluated_alike(tmp_path):
    """With a batch size that the split does not fill; large tensors are cut in the second half."""
    found = on_devices(f"t.run_both({os.fspath(tmp_path)!r})", 4)
    one, four = found["one"], found["four"]
    assert four.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
    assert four == one
    assert one["step"] == 6


def run_both(folder: str) -> None:
    """Trains an epoch on one device and goes on with four; evaluates both ways."""
    from rvit_jax import evaluate, train
    from tests.jester_folder import CLASSES, labelled, make_set

    root = make_set(
        Path(folder) / "data",
        {"train": labelled(1, 19), "validation": labelled(21, 31)},
        num_frames=3,
    )
    config = small_config(num_classes=3, hidden_size=64)
    config.dataset.update(data_dir=os.fspath(root), classes=CLASSES, num_frames=3)
    config.update(batch_size=8, num_epochs=1)
    config.mesh.data = 1
    train.train_and_evaluate(config, Path(folder) / "run")
    config.mesh.update(data=-1, fsdp=2)
    config.num_epochs = 2
    train.train_and_evaluate(config, Path(folder) / "run")
    found = {}
    for name, data in (("one", 1), ("four", 4)):
        config.mesh.update(data=data, fsdp=1)
        record = evaluate.evaluate(
            config, Path(folder) / name, "validation", Path(folder) / "run" / "checkpoints" / "6"
        )
        keys = ("num_clips", "top1", "top5", "loss", "step")
        found[name] = {key: record[key] for key in keys}
    print(json.dumps(found))
