"""The recurrence's laws: steps = clip, chunks = clip, ragged = each clip alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import rvit_jax
from rvit_jax.layers import UnusedParam
from rvit_jax.model import CompiledRViT, normalise
from tests.small import random_video, small_config, small_model

BAR = 1e-5  # x max abs logit
VARIANTS = list(
    itertools.product(
        ("linear", "softmax", "reattention"),
        ("class_token", "class_and_hidden_tokens"),
        ("linear", "mlp"),
    )
)


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def variant(request) -> CompiledRViT:
    attention, readout, head = request.param
    return CompiledRViT(small_model(attention=attention, readout=readout, head=head))


@pytest.fixture(scope="module", params=["linear", "softmax"])
def model(request) -> CompiledRViT:
    """Where a law does not hang on the variant, one shape and so one compilation."""
    return CompiledRViT(
        small_model(attention=request.param, readout="class_and_hidden_tokens", head="mlp")
    )


def assert_close(ours, expected):
    error = jnp.abs(ours - expected).max()
    assert error <= BAR * jnp.abs(expected).max(), float(error)


def test_steps_equal_one_call(variant):
    video = random_video(2, 5)
    logits, hidden = variant(video)
    stepped = variant.initial_hidden(2)
    for t in range(5):
        step_logits, stepped = variant.step(video[:, t], stepped)
    assert_close(step_logits, logits)
    assert_close(stepped, hidden)


def test_clips_of_a_ragged_batch_equal_each_alone(variant):
    video, lengths = random_video(2, 5), [2, 5]
    logits, hidden = variant(video, num_frames=jnp.array(lengths))
    for index, length in enumerate(lengths):
        alone, alone_hidden = variant(video[index : index + 1, :length])
        assert_close(logits[index], alone[0])
        assert_close(hidden[:, index], alone_hidden[:, 0])


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_two_chunks_equal_one_call(model, cut):
    video = random_video(2, 6, seed=cut)
    logits, hidden = model(video)
    _, first = model(video[:, :cut])
    chunked_logits, chunked_hidden = model(video[:, cut:], hidden=first)
    assert_close(chunked_logits, logits)
    assert_close(chunked_hidden, hidden)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    first=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_ragged_chunks_equal_steps_of_each_stream(model, lengths, first, seed):
    """Any lengths, going on from a state of any lengths; against frames fed one by one."""
    video = random_video(3, 6, seed=seed)
    _, hidden = model(video, num_frames=jnp.array(first))
    logits, hidden = model(video, hidden=hidden, num_frames=jnp.array(lengths))
    expected, stepped = np.zeros_like(logits), model.initial_hidden(3)
    for counts in (first, lengths):
        for t in range(6):
            active = jnp.array([t < count for count in counts])
            step_logits, stepped = model.step(video[:, t], stepped, active)
            expected = np.where(active[:, None], step_logits, expected)
    assert_close(logits, expected)
    assert_close(hidden, stepped)


def test_batch_mates_and_padding_change_nothing(model):
    video, others = random_video(2, 5), random_video(2, 5, seed=1)
    lengths = jnp.array([3, 5])
    logits, hidden = model(video, num_frames=lengths)
    changed = video.at[0, 3:].set(others[0, 3:]).at[1].set(others[1])
    again, hidden_again = model(changed, num_frames=lengths)
    assert_close(again[0], logits[0])
    assert_close(hidden_again[:, 0], hidden[:, 0])
    assert not np.allclose(again[1], logits[1])


def test_inactive_streams_keep_their_state(model):
    video = random_video(3, 2)
    _, hidden = model.step(video[:, 0], model.initial_hidden(3))
    active = jnp.array([True, False, True])
    logits, after = model.step(video[:, 1], hidden, active)
    everyone, expected = model.step(video[:, 1], hidden)
    assert np.isnan(logits[1]).all()
    np.testing.assert_array_equal(after[:, 1], hidden[:, 1])
    np.testing.assert_array_equal(logits[active], everyone[active])
    np.testing.assert_array_equal(after[:, active], expected[:, active])


def test_one_frame_worked_out_by_hand():
    """Every weight such that the numbers can be followed: the gate passes v, the MLP gives 0."""
    model = small_model(num_layers=1, hidden_size=16, attention="softmax")
    state = jax.tree.map(jnp.zeros_like, nnx.state(model))
    nnx.update(model, state)
    layer = model.layers[0]
    for norm in (layer.norm_input, layer.norm_hidden, layer.norm_out, model.head.norm):
        norm.scale[...] = jnp.ones(16)
    layer.attention.to_out.bias[...] = jnp.full(16, 2.0)  # a = 2 everywhere
    positions = jnp.arange(5.0)[None, :, None] * jnp.ones((1, 5, 16))
    model.pos_embedding[...] = positions
    model.hidden_class_token[...] = jnp.full((1, 1, 1, 16), 10.0)
    _, hidden = model(jnp.zeros((1, 1, 16, 16, 3)))
    # hidden = a + (hidden before + positions): 2 + 10 + 0 for the class token, 2 + 0 + n after it.
    np.testing.assert_allclose(hidden[0, 0, :, 0], [12.0, 3.0, 4.0, 5.0, 6.0])
    _, hidden = model(jnp.zeros((1, 3, 16, 16, 3)))  # positions are added in every frame
    np.testing.assert_allclose(hidden[0, 0, :, 0], [16.0, 9.0, 12.0, 15.0, 18.0])


def test_patches_are_cut_row_by_row():
    model = small_model(hidden_size=16)
    frame = jnp.zeros((1, 16, 16, 3)).at[0, :8, 8:].set(1.0)  # top right = patch 1
    blank = model.patch_embedding(jnp.zeros((1, 16, 16, 3)))
    differs = jnp.abs(model.patch_embedding(frame) - blank).max(axis=-1)[0]
    assert (np.asarray(differs) > 0).tolist() == [False, True, False, False]


def test_uint8_equals_normalised_floats(model):
    raw = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16, 3), dtype=np.uint8)
    expected, _ = model((raw.astype(np.float32) / 255 - 0.5) / 0.5)
    logits, _ = model(raw)
    assert_close(logits, expected)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    exact = (every.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(jax.jit(normalise)(every), exact)
    assert normalise(np.full((1, 1, 1, 3), 255, np.uint8)).tolist() == [[[[1.0, 1.0, 1.0]]]]


def count_operations(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += count_operations(inner) if hasattr(inner, "eqns") else 0
    return total


def test_program_size_does_not_depend_on_the_number_of_frames():
    model = small_model()
    sizes = {
        count_operations(jax.make_jaxpr(lambda v: model(v))(random_video(1, frames)).jaxpr)
        for frames in (2, 40)
    }
    assert len(sizes) == 1
    assert sizes.pop() > 50  # the count looks inside the scan


def test_one_compilation_for_each_shape():
    model = CompiledRViT(small_model())
    for seed in range(3):
        for frames in (2, 4):
            model(random_video(2, frames, seed=seed))
        model.step(random_video(2, 1)[:, 0], model.initial_hidden(2))
    assert model._call._cache_size() == 2
    assert model._step._cache_size() == 1


def test_unused_parameters_are_no_params():
    model = small_model(attention="softmax", unused_reattention=True)
    unused = nnx.to_flat_state(nnx.state(model, UnusedParam))
    assert len(unused) == 2 * 3
    assert all("reattention" in path[3] for path, _ in unused)
    trained = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert not any("reattention" in str(path) for path, _ in trained)


def test_initial_distributions_are_pytorchs():
    model = small_model(hidden_size=128, mlp_dim=512, image_size=64)
    linear = model.layers[0].mlp.dense_in
    bound = 1 / math.sqrt(128)
    for values in (linear.kernel[...], linear.bias[...]):
        assert jnp.abs(values).max() <= bound
        assert jnp.abs(values).max() > 0.95 * bound  # uniform, not normal
        assert abs(values.std() - bound / math.sqrt(3)) < 0.1 * bound
    patch = model.patch_embedding.kernel[...]
    assert 0.95 < jnp.abs(patch).max() * math.sqrt(3 * 64) <= 1.0
    assert abs(model.pos_embedding[...].std() - 1.0) < 0.05
    assert abs(model.hidden_class_token[...].std() - 1.0) < 0.2


class TestDropout:
    def test_training_mode_needs_a_key(self):
        model = small_model()
        model.train()
        with pytest.raises(ValueError, match="rngs="):
            model(random_video(1, 2))

    def test_the_key_decides(self):
        model = small_model(block_dropout_rate=0.5, dropout_rate=0.2)
        model.train()
        video = random_video(1, 2)
        logits = [model(video, rngs=jax.random.key(seed))[0] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(logits[0], logits[1])
        assert not np.allclose(logits[0], logits[2])

    def test_the_state_gets_no_dropout_of_its_own(self):
        """One layer: its state depends on the gate alone, which block dropout leaves whole."""
        model = small_model(num_layers=1, block_dropout_rate=0.9, dropout_rate=0.0)
        video = random_video(1, 1)
        _, expected = model(video)
        model.train()
        _, hidden = model(video, rngs=jax.random.key(0))
        np.testing.assert_allclose(hidden, expected, rtol=1e-6)

    def test_every_frame_draws_anew(self):
        model = small_model(num_layers=1, dropout_rate=0.5, block_dropout_rate=0.0)
        model.train()
        frame = random_video(1, 1)
        key = jax.random.key(0)
        _, once = model(frame, rngs=key)
        _, twice = model(jnp.repeat(frame, 2, axis=1), rngs=key)
        _, again = model(frame, hidden=once, rngs=key)
        assert not np.allclose(twice, again)


class TestErrors:
    @pytest.fixture(autouse=True)
    def _as_users_call(self, monkeypatch):
        """Without the tests' own check of shapes, which would come first."""
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def test_wrong_frame_size(self):
        with pytest.raises(ValueError, match=r"\(1, 2, 12, 16, 3\).*16 x 16"):
            small_model()(jnp.zeros((1, 2, 12, 16, 3)))

    def test_channels_first(self):
        with pytest.raises(ValueError, match="channels last"):
            small_model()(jnp.zeros((1, 2, 3, 16, 16)))

    def test_no_frame(self):
        with pytest.raises(ValueError, match="shape"):
            small_model()(jnp.zeros((1, 0, 16, 16, 3)))

    @pytest.mark.parametrize("lengths", [[0, 2], [1, 4], [-1, 1]])
    def test_num_frames_out_of_range(self, model, lengths):
        with pytest.raises(ValueError, match="1 to 3 frames"):
            model(random_video(2, 3), num_frames=jnp.array(lengths))

    def test_num_frames_of_another_batch(self):
        with pytest.raises(ValueError, match=r"\[B\] = \(2,\)"):
            small_model()(random_video(2, 3), num_frames=jnp.array([1]))

    def test_state_of_another_batch(self):
        model = small_model()
        with pytest.raises(ValueError, match=r"initial_hidden\(2\)"):
            model(random_video(2, 3), hidden=model.initial_hidden(1))

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("image_size", 20, "not divisible by config.model.patch_size=8.*take 16"),
            ("num_heads", 5, "does not divide config.model.hidden_size=16"),
            ("attention", "sofmax", "did you mean 'softmax'"),
            ("head", "mpl", "did you mean 'mlp'"),
            ("num_layers", 0, "at least 1"),
            ("block_dropout_rate", 1.5, "0.0 to 0.99"),
        ],
    )
    def test_config(self, key, value, message):
        with pytest.raises(ValueError, match=message):
            rvit_jax.RViT(small_config(**{key: value}).model, rngs=nnx.Rngs(0))
