"""Dropout and its random numbers: against JAX's own generator, and by their statistics."""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from rvit_jax.layers import Dropout, random_uint16, threefry_2x32


def test_threefry_is_jaxs_own():
    key = jax.random.key_data(jax.random.key(123))
    counters = jax.random.bits(jax.random.key(1), (64,), jnp.uint32)
    theirs = jax.extend.random.threefry_2x32(key, counters)  # the halves are the pairs' parts
    ours = threefry_2x32(key, counters[:32], counters[32:])
    np.testing.assert_array_equal(jnp.concatenate(ours), theirs)


def test_threefry_by_its_authors_vector():
    # Of the Random123 distribution: key and counter of ones.
    ones = jnp.full(1, 0xFFFFFFFF, jnp.uint32)
    words = threefry_2x32(jnp.array([0xFFFFFFFF, 0xFFFFFFFF], jnp.uint32), ones, ones)
    assert [int(word[0]) for word in words] == [0x1CB996FC, 0xBB002BE7]


@pytest.mark.parametrize("shape", [(5,), (3, 7), (4, 197, 192), (2, 3, 1)])
def test_random_numbers_are_uniform_and_differ(shape):
    draws = [np.asarray(random_uint16(jax.random.key(seed), shape)) for seed in range(200)]
    values = np.concatenate([draw.ravel() for draw in draws[: 200 if draws[0].size < 99 else 2]])
    assert draws[0].shape == shape
    assert values.max() < 2**16
    assert abs(values.mean() / 2**16 - 0.5) < 4 * 12**-0.5 / len(values) ** 0.5
    assert not np.array_equal(draws[0], draws[1])
    if len(values) > 1e5:  # all 16 bits, and no value of a mask that repeats another
        bits = (values[:, None] >> np.arange(16) & 1).mean(axis=0)
        np.testing.assert_allclose(bits, 0.5, atol=4 * 0.5 / len(values) ** 0.5)
        correlation = np.corrcoef(
            draws[0].reshape(-1, 4, shape[-1] // 4).transpose(1, 0, 2).reshape(4, -1)
        )
        assert np.abs(correlation - np.eye(4)).max() < 4 / (draws[0].size / 4) ** 0.5


def test_dropout_keeps_the_mean_and_its_rate():
    x = jnp.ones((64, 197, 32))
    kept = np.asarray(Dropout(0.1)(x, rngs=jax.random.key(0)))
    assert set(np.unique(kept)) == {0.0, np.float32(2**16 / (2**16 - 6554))}
    assert abs((kept == 0).mean() - 0.1) < 4 * (0.09 / kept.size) ** 0.5
    assert abs(kept.mean() - 1.0) < 0.01


def test_dropout_is_off_in_evaluation_and_at_rate_zero():
    x = jnp.ones((2, 3, 4))
    layer = Dropout(0.5)
    layer.deterministic = True
    assert layer(x) is x
    assert Dropout(0.0)(x) is x


def test_half_precision_stays():
    x = jnp.ones((4, 8), jnp.bfloat16)
    assert Dropout(0.5)(x, rngs=jax.random.key(0)).dtype == jnp.bfloat16
