"""The precision levels: what stays float32, how far bfloat16 is off, and the float32 copy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rvit_jax import losses, precision, steps
from tests.small import random_video, small_config

# Operations that lose a sum, or a small difference of large numbers, in half precision.
DELICATE = {"reduce_sum", "exp", "expm1", "log", "rsqrt", "erf", "logistic", "cumsum", "div"}


def model_at(level: str, **model):
    config = small_config(**model)
    config.opt_level = level
    return precision.make_model(config, rngs=nnx.Rngs(0))


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.Jaxpr)
        ):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from all_equations(inner)


@pytest.mark.parametrize("attention", ["linear", "softmax", "reattention"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_delicate_operations_stay_in_float32(level, attention):
    model = model_at(level, attention=attention)
    model.eval()
    jaxpr = jax.make_jaxpr(lambda video: model(video))(random_video(2, 3)).jaxpr
    equations = list(all_equations(jaxpr))
    halves = [e for e in equations if e.outvars[0].aval.dtype == jnp.bfloat16]
    assert not {e.primitive.name for e in halves} & DELICATE
    assert any(e.primitive.name == "dot_general" for e in halves)  # it computes in bfloat16
    state = jax.eval_shape(lambda video: model(video), random_video(2, 3))
    assert [x.dtype for x in state] == [jnp.float32, jnp.float32]  # logits and state


@pytest.mark.parametrize("attention", ["linear", "softmax", "reattention"])
def test_gradients_are_summed_in_float32(attention):
    """Of biases and norms, over the tokens; and of everything, over the frames."""
    graphdef, params, rest = nnx.split(model_at("O1", attention=attention), nnx.Param, ...)

    def call(params, video):
        return nnx.merge(graphdef, params, rest)(video, rngs=jax.random.key(0))[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(call))(params, random_video(2, 3)).jaxpr
    for equation in all_equations(jaxpr):
        if equation.primitive.name == "reduce_sum":
            assert equation.outvars[0].aval.dtype != jnp.bfloat16, equation


def test_level_0_is_float32_throughout():
    model = model_at("O0")
    model.eval()
    jaxpr = jax.make_jaxpr(lambda v: model(v))(random_video(1, 2)).jaxpr
    kinds = {str(v.aval.dtype) for e in all_equations(jaxpr) for v in e.outvars}
    assert not {kind for kind in kinds if "16" in kind}


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_bfloat16_is_near_float32(level, attention):
    video = random_video(4, 12)
    exact, _ = model_at("O0", attention=attention)(video, rngs=jax.random.key(0))
    rounded, _ = model_at(level, attention=attention)(video, rngs=jax.random.key(0))
    error = float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max())
    assert 1e-6 < error < 0.03  # bfloat16 has three digits


def test_a_long_stream_of_large_sums_stays_finite_and_near():
    # Sums of linear attention and a state of 200 frames, beyond float16's range.
    exact, rounded = model_at("O0"), model_at("O1")
    for model in (exact, rounded):
        for layer in model.layers:
            layer.attention.to_qkv.kernel[...] = 60.0 * layer.attention.to_qkv.kernel[...]
        model.eval()
    video = random_video(1, 200)
    (logits, hidden), (near, near_hidden) = exact(video), rounded(video)
    assert float(jnp.abs(hidden).max()) > 65_504
    assert jnp.isfinite(near_hidden).all()
    assert float(jnp.abs(near_hidden - hidden).max() / jnp.abs(hidden).max()) < 0.1
    assert float(jnp.abs(near - logits).max() / jnp.abs(logits).max()) < 0.2


def test_types_of_parameters():
    for level, dtype in (("O0", jnp.float32), ("O1", jnp.float32), ("O2", jnp.bfloat16)):
        leaves = jax.tree.leaves(nnx.state(model_at(level)))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


def test_the_float32_copy_keeps_updates_that_bfloat16_loses():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    plain, kept = optax.sgd(1e-4), precision.with_master_weights(optax.sgd(1e-4))
    lost, ours = params, params
    states = plain.init(params), kept.init(params)
    for _ in range(100):  # each update is a fortieth of the distance between bfloat16 numbers
        gradient = {"w": jnp.full(3, -1.0)}
        updates, first = plain.update(gradient, states[0], lost)
        lost = optax.apply_updates(lost, updates)
        updates, second = kept.update(gradient, states[1], ours)
        ours = optax.apply_updates(ours, updates)
        states = first, second
    np.testing.assert_array_equal(np.asarray(lost["w"], np.float32), 1.0)
    np.testing.assert_allclose(states[1].master["w"], 1.01, rtol=1e-5)
    np.testing.assert_array_equal(ours["w"], states[1].master["w"].astype(jnp.bfloat16))
    assert ours["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_gradients_of_the_frames_are_summed_in_float32(level):
    """A step of plain SGD at each level stays near float32's, over many frames."""

    def first_gradient(level):
        model = model_at(level, block_dropout_rate=0.0)
        sgd = precision.make_optimizer_for(level, optax.sgd(1.0))
        graphdef, state = steps.create_train_state(model, sgd)
        config = small_config()
        step = steps.make_train_step(
            graphdef, sgd, losses.make_loss(config.loss), seed=0, ragged=False
        )
        batch = {
            "video": random_video(2, 64),
            "label": jnp.array([0, 1]),
            "num_frames": jnp.array([64, 64]),
            "mask": jnp.ones(2, bool),
        }
        before = state.opt_state.master if level == "O2" else state.params
        after, _ = jax.jit(step)(state, batch)
        master = after.opt_state.master if level == "O2" else after.params
        return jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), before, master)

    exact, rounded = first_gradient("O0"), first_gradient(level)
    for ours, theirs in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max() + 1e-6


def test_weights_from_elsewhere_become_the_copy():
    level = "O2"
    adamw = precision.make_optimizer_for(level, optax.adamw(1e-3))
    opt_state = adamw.init({"w": jnp.ones(2, jnp.bfloat16)})
    fine = {"w": jnp.array([1.0001, 2.0001])}
    taken = precision.with_master_of(opt_state, fine)
    np.testing.assert_array_equal(taken.master["w"], fine["w"])
    assert precision.with_master_of(opt_state.inner, fine) is opt_state.inner
