"""Both orders of computing a clip, segments and rematerialisation: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rvit_jax import RViT, schedule
from tests.small import random_video, small_config

BATCH, FRAMES = 3, 5


def model_of(**changes) -> RViT:
    config = small_config().model
    config.update(**changes)
    return RViT(config, rngs=nnx.Rngs(0))


def largest_difference(ours, theirs) -> float:
    """Over all leaves, in units of each one's largest value."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30)) for a, b in pairs)


def answer(num_frames=None, key=None, training=False, **changes):
    """Logits, state, and the gradient of a sum of both that weighs every number differently."""
    model = model_of(**changes)
    model.train() if training else model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    video = random_video(BATCH, FRAMES)
    weight = np.random.default_rng(1).normal(size=4096)

    def total(params):
        logits, hidden = nnx.merge(graphdef, params, rest)(video, num_frames=num_frames, rngs=key)
        return sum((x.ravel() * jnp.resize(weight, x.size)).sum() for x in (logits, hidden)), (
            logits,
            hidden,
        )

    grads, outputs = jax.jit(jax.grad(total, has_aux=True))(params)
    return outputs, nnx.to_pure_dict(grads)


@pytest.mark.parametrize("attention", ["linear", "softmax", "reattention"])
@pytest.mark.parametrize("num_frames", [None, np.array([5, 1, 4])], ids=["whole", "ragged"])
def test_layer_by_layer_equals_frame_by_frame(attention, num_frames):
    by_frames = answer(num_frames, attention=attention, schedule="frames")
    by_layers = answer(num_frames, attention=attention, schedule="layers", segment_frames=3)
    assert largest_difference(by_layers[0], by_frames[0]) < 2e-6
    assert largest_difference(by_layers[1], by_frames[1]) < 1e-5


@pytest.mark.parametrize("segment_frames", [1, 2, 36])
def test_dropout_does_not_depend_on_the_schedule(segment_frames):
    rates = {"dropout_rate": 0.3, "block_dropout_rate": 0.3}
    settings = {"num_frames": np.array([5, 2, 4]), "key": jax.random.key(3), "training": True}
    by_frames = answer(**settings, **rates, schedule="frames")
    by_layers = answer(**settings, **rates, schedule="layers", segment_frames=segment_frames)
    assert largest_difference(by_layers[0], by_frames[0]) < 2e-6
    without = answer(schedule="frames")
    assert largest_difference(by_frames[0], without[0]) > 1e-2  # there was dropout


@pytest.fixture(scope="module")
def kept():
    """With nothing computed again."""
    return answer(**DROPPED_OUT, schedule="frames", remat="none")


DROPPED_OUT = {"key": jax.random.key(5), "training": True, "block_dropout_rate": 0.2}


@pytest.mark.parametrize("order", ["frames", "layers"])
@pytest.mark.parametrize("remat", ["dots", "frames", "layers"])
@pytest.mark.parametrize("segment_frames", [2, 36])
def test_rematerialisation_changes_no_gradient(kept, order, remat, segment_frames):
    settings = DROPPED_OUT
    again = answer(**settings, schedule=order, remat=remat, segment_frames=segment_frames)
    assert largest_difference(again[0], kept[0]) < 2e-6
    assert largest_difference(again[1], kept[1]) < 5e-6


def temporaries(num_frames: int, *, training: bool, **changes) -> int:
    """Bytes that XLA allots besides arguments and results."""
    model = model_of(**changes)
    model.train() if training else model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    video = jnp.zeros((1, num_frames, 16, 16, 3), jnp.uint8)

    def call(params, video):
        return nnx.merge(graphdef, params, rest)(video, rngs=jax.random.key(0))[0].sum()

    function = jax.grad(call) if training else call
    return jax.jit(function).lower(params, video).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_clip():
    for order in ("frames", "layers"):
        changes = {"schedule": order, "segment_frames": 8}
        short, long = (temporaries(t, training=False, **changes) for t in (64, 512))
        assert long - short <= 4 * 512  # a frame is 768 bytes; its number, 4
    # In training what grows is a state for every segment: 8 times the frames, less than twice.
    short, long = (temporaries(t, training=True, segment_frames=16) for t in (16, 128))
    assert long < 2 * short
    whole = temporaries(128, training=True, segment_frames=128)
    assert whole > 3 * long  # what the segments spare


def test_auto_is_one_of_the_two():
    assert schedule.resolve("auto") in ("frames", "layers")
    assert schedule.resolve("layers") == "layers"
