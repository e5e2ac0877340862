"""Losses, metrics, schedules, optimizers and the config check, against values worked by hand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base, gestures, jester
from input_pipeline.command_line import leaf_keys
from input_pipeline.gestures import TIME_CLASSES
from rvit_jax import losses, optimizer, steps
from rvit_jax.config import check_config, lookup
from rvit_jax.metrics import ClassificationMetrics
from tests.small import random_video, small_config, small_model


class TestLosses:
    def test_cross_entropy(self):
        logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
        loss = losses.cross_entropy(logits, jnp.array([0, 1]))
        np.testing.assert_allclose(loss, [np.log(2), np.log(10)], rtol=1e-6)

    def test_label_smoothing_spreads_over_all_classes(self):
        # Target 0.9 + 0.1 / 4 on the label, 0.1 / 4 on each other class.
        probabilities = np.array([0.4, 0.3, 0.2, 0.1])
        target = np.array([0.025, 0.925, 0.025, 0.025])
        loss = losses.smoothed_cross_entropy(jnp.log(probabilities)[None], jnp.array([1]), 0.1)
        np.testing.assert_allclose(loss, [-(target * np.log(probabilities)).sum()], rtol=1e-6)

    def test_config_decides(self):
        config = base.get_config().loss
        logits, label = jnp.array([[3.0, 0.0]]), jnp.array([0])
        smoothed = losses.make_loss(config)(logits, label)
        config.name = "cross_entropy"
        assert losses.make_loss(config)(logits, label) < smoothed


class TestMetrics:
    LOGITS = np.array(
        [
            [9.0, 8, 7, 6, 5, 4],
            [9.0, 8, 7, 6, 5, 4],
            [0.0, 9, 8, 7, 6, 5],
            [1.0, 1, 1, 1, 1, 1],
        ]
    )
    LABEL = np.array([0, 4, 0, 5])
    LOSS = np.array([1.0, 2.0, 3.0, 6.0])

    def test_by_hand(self):
        metrics = ClassificationMetrics(6)
        metrics.update(self.LOGITS, self.LOSS, self.LABEL, np.ones(4, bool))
        # Right: clip 0. In the first five: clips 0 and 1; of equal logits the lower index is
        # first, so class 5 of clip 3 is sixth. Class 0: 1 of 2, classes 4 and 5: 0 of 1.
        assert metrics.result() == {
            "num_clips": 4,
            "top1": 0.25,
            "top5": 0.5,
            "loss": 3.0,
            "mean_class_accuracy": pytest.approx(0.5 / 3),
        }
        assert metrics.confusion[0].tolist() == [1, 1, 0, 0, 0, 0]

    @settings(max_examples=50)
    @given(batch_size=st.integers(1, 23), seed=st.integers(0, 2**31))
    def test_batch_size_and_padding_change_nothing(self, batch_size, seed):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(23, 7)).astype(np.float32)
        loss, label = rng.exponential(size=23).astype(np.float32), rng.integers(0, 7, 23)
        whole = ClassificationMetrics(7)
        whole.update(logits, loss, label, np.ones(23, bool))
        parts = ClassificationMetrics(7)
        for start in range(0, 23, batch_size):
            rows = slice(start, start + batch_size)
            padding = batch_size - len(label[rows])
            parts.update(
                np.pad(logits[rows], ((0, padding), (0, 0)), constant_values=np.nan),
                np.pad(loss[rows], (0, padding), constant_values=np.inf),
                np.pad(label[rows], (0, padding), constant_values=-1),
                np.arange(batch_size) < batch_size - padding,
            )
        assert parts.result() == whole.result()

    def test_logits_that_are_not_finite_are_no_answer(self):
        logits = self.LOGITS.copy()
        logits[1, 2] = np.nan
        with pytest.raises(ValueError, match="1 of 4 clips"):
            ClassificationMetrics(6).update(logits, self.LOSS, self.LABEL, np.ones(4, bool))

    def test_an_empty_split_has_no_result(self):
        with pytest.raises(ValueError, match="no clip"):
            ClassificationMetrics(6).result()


class TestSchedules:
    def test_the_references_staircase(self):
        config = base.get_config().optimizer
        config.warmup_epochs = 3.0
        schedule = optimizer.learning_rate_schedule(config, steps_per_epoch=10, num_epochs=50)
        rates = {epoch: float(schedule(10 * epoch)) for epoch in (0, 1, 2, 3, 9, 10, 20, 49)}
        assert rates == pytest.approx(
            {
                0: 1e-6,  # 1e-4 * 10^(0 - 3 + 1)
                1: 1e-5,
                2: 1e-4,
                3: 1e-4,
                9: 1e-4,
                10: 0.8e-4,
                20: 0.64e-4,
                49: 1e-4 * 0.8**4,
            }
        )
        assert schedule(29) == schedule(20)  # steps within an epoch do not count

    def test_cosine(self):
        config = base.get_config().optimizer
        config.update(schedule="cosine", warmup_epochs=1.0, learning_rate=1.0)
        schedule = optimizer.learning_rate_schedule(config, steps_per_epoch=10, num_epochs=11)
        rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
        np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 0.5, 0.0], atol=1e-6)


def tiny_training(**optimizer_keys):
    config = small_config(block_dropout_rate=0.0)
    config.optimizer.update(schedule="constant", learning_rate=0.1, **optimizer_keys)
    schedule = optimizer.learning_rate_schedule(config.optimizer, 1, 1)
    transformation = optimizer.make_optimizer(config.optimizer, schedule)
    graphdef, state = steps.create_train_state(small_model(block_dropout_rate=0.0), transformation)
    step = steps.make_train_step(
        graphdef, transformation, losses.make_loss(config.loss), seed=0, ragged=False
    )
    return jax.jit(step), state


def random_batch(num_clips=4, *, seed=0):
    return {
        "video": random_video(num_clips, 3, seed=seed),
        "label": jnp.arange(num_clips) % 5,
        "num_frames": jnp.full(num_clips, 3),
        "mask": jnp.ones(num_clips, bool),
    }


def largest_change(before, after):
    """Path -> largest change, over a parameter tree."""
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    return {
        optimizer.path_string(path): value
        for path, value in jax.tree_util.tree_flatten_with_path(changes)[0]
    }


class TestOptimizer:
    def test_frozen_parameters_stay(self):
        step, state = tiny_training(frozen=("patch_embedding/*", "layers/0/mlp/*", "class_token"))
        after, _ = step(state, random_batch())
        for path, change in largest_change(state.params, after.params).items():
            frozen = path.startswith(("patch_embedding", "layers/0/mlp", "class_token"))
            assert (change == 0.0) == frozen, path

    def test_a_pattern_that_matches_nothing_is_refused(self):
        with pytest.raises(ValueError, match="'patch_embeding/\\*' matches no parameter"):
            tiny_training(frozen=("patch_embeding/*",))

    def test_clipping_leaves_the_direction(self):
        step, state = tiny_training(name="sgd", betas=(0.0, 0.9), weight_decay=0.0)
        free, sums = step(state, random_batch())
        norm = float(sums["grad_norm"])
        clipped_step, state = tiny_training(
            name="sgd", betas=(0.0, 0.9), weight_decay=0.0, clip_norm=norm / 4
        )
        clipped, _ = clipped_step(state, random_batch())
        change = jax.tree.map(lambda a, b: a - b, free.params, state.params)
        clipped_change = jax.tree.map(lambda a, b: a - b, clipped.params, state.params)
        np.testing.assert_allclose(optax.tree.norm(change), 0.1 * norm, rtol=1e-4)
        np.testing.assert_allclose(optax.tree.norm(clipped_change), 0.1 * norm / 4, rtol=1e-4)

    def test_the_clip_is_of_what_is_trained(self):
        """Frozen parameters' gradients do not shorten the others' steps."""
        sgd = {"name": "sgd", "betas": (0.0, 0.9), "weight_decay": 0.0, "frozen": ("layers/*",)}
        step, state = tiny_training(**sgd)
        free, sums = step(state, random_batch())
        change = jax.tree.map(lambda a, b: a - b, free.params, state.params)
        norm = float(optax.tree.norm(change)) / 0.1
        assert norm < 0.99 * float(sums["grad_norm"])  # the record's norm is of the whole
        clipped_step, state = tiny_training(**sgd, clip_norm=norm / 2)
        clipped, _ = clipped_step(state, random_batch())
        change = jax.tree.map(lambda a, b: a - b, clipped.params, state.params)
        np.testing.assert_allclose(optax.tree.norm(change), 0.1 * norm / 2, rtol=1e-4)

    def test_adamw_decays_every_parameter(self):
        """By rate x decay x itself, biases and norms too: `torch.optim.AdamW`'s."""
        step, state = tiny_training(weight_decay=0.5)
        other, _ = tiny_training(weight_decay=0.0)
        with_decay, without = step(state, random_batch())[0], other(state, random_batch())[0]
        expected = largest_change(state.params, jax.tree.map(lambda p: 0.95 * p, state.params))
        assert sum(change > 0.0 for path, change in expected.items() if "bias" in path) > 5
        for path, change in largest_change(with_decay.params, without.params).items():
            assert change == pytest.approx(expected[path], rel=1e-4, abs=1e-6), path


def first_answers(batch):
    """The likeliest class of each clip before `tiny_training` has begun."""
    return small_model(block_dropout_rate=0.0)(batch["video"])[0].argmax(-1)


class TestTrainStep:
    def test_masked_clips_change_nothing(self):
        step, state = tiny_training()
        batch = random_batch()
        expected, expected_sums = step(state, batch)
        padded = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, random_batch(2, seed=1))
        padded["mask"] = jnp.arange(6) < 4
        after, sums = step(state, padded)
        assert float(sums["clips"]) == 4
        np.testing.assert_allclose(sums["loss"], expected_sums["loss"], rtol=1e-5)
        # Padding that is answered rightly counts for nothing; clips that are, count one each.
        padded["label"] = first_answers(padded).at[0].add(1) % 5
        assert float(step(state, padded)[1]["right"]) == 3
        changes = largest_change(expected.params, after.params)
        assert max(changes.values()) < 0.02 * 0.1  # AdamW's first step is about the rate, 0.1

    def test_unused_parameters_are_left_alone(self):
        model = small_model(attention="softmax", unused_reattention=True)
        transformation = optax.adamw(0.1, weight_decay=0.5)
        graphdef, state = steps.create_train_state(model, transformation)
        loss = losses.make_loss(base.get_config().loss)
        step = steps.make_train_step(graphdef, transformation, loss, seed=0, ragged=False)
        after, _ = jax.jit(step)(state, random_batch())
        jax.tree.map(np.testing.assert_array_equal, state.fixed, after.fixed)
        assert len(jax.tree.leaves(state.fixed)) == 6
        moments = jax.tree.leaves(state.opt_state)
        assert len(moments) == 2 * len(jax.tree.leaves(nnx.state(model, nnx.Param))) + 1

    def test_loss_falls(self):
        step, state = tiny_training(clip_norm=1.0)
        first = None
        for _ in range(30):
            state, sums = step(state, random_batch())
            first = first or float(sums["loss"])
        assert float(sums["loss"]) < 0.7 * first


class TestConfigs:
    @pytest.mark.parametrize(
        "config",
        [
            base.get_config(),
            jester.get_config(),
            jester.get_config("v2"),
            gestures.get_config(),
            gestures.get_config("all"),
        ],
    )
    def test_every_config_is_sound(self, config):
        check_config(config, base.get_config())

    def test_gesture_classes_are_the_generators(self):
        assert tuple(gestures.get_config().dataset.classes) == tuple(TIME_CLASSES)

    def test_unknown_variant(self):
        for module in (jester, gestures):
            with pytest.raises(ValueError, match="no variant 'v9'"):
                module.get_config("v9")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("batch_size", 0, "config.batch_size=0 is out of range: at least 1"),
            ("batch_size", 2.5, "config.batch_size=2.5 is float, expected int"),
            ("model.num_layers", True, "config.model.num_layers=True is bool, expected int"),
            ("optimizer.name", "lion", "config.optimizer.name='lion' is unknown"),
            ("optimizer.betas", (0.9,), "two numbers in"),
            ("optimizer.betas", ("0.9", "0.99"), r"betas=.*expected numbers, such as \(0\.9, "),
            ("dataset.augment.scale_jitter", (1.0, None), "None is wrong, expected numbers"),
            ("dataset.length_buckets", (True,), "True is wrong, expected numbers$"),
            ("dataset.classes", (3,), "3 is wrong, expected texts"),
            ("optimizer.warmup_epochs", 1.5, "warms up by whole epochs"),
            ("mesh.data", 0, "config.mesh.data=0: -1 takes all devices"),
            ("dataset.length_buckets", (16,), "set it to 'ragged'"),
            ("loss.label_smoothing", float("nan"), "out of range"),
            ("dataset.classes", ("a", "b"), "names 2 classes, but config.model.num_classes=27"),
            ("dataset.cache", True, None),
        ],
    )
    def test_wrong_values(self, key, value, message):
        config = base.get_config()
        with config.ignore_type():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        if message is None:
            check_config(config, base.get_config())
            config.dataset.num_workers = 2
            message = "set config.dataset.num_workers=0"
        with pytest.raises(ValueError, match=message):
            check_config(config, base.get_config())

    def test_unknown_key_suggests_the_nearest(self):
        config = base.get_config()
        config.optimizer.learning_rat = 1.0
        with pytest.raises(ValueError, match=r"did you mean 'optimizer\.learning_rate'"):
            check_config(config, base.get_config())

    def test_missing_key(self):
        config = base.get_config()
        del config.optimizer.betas
        with pytest.raises(ValueError, match=r"lacks the key 'optimizer.betas'"):
            check_config(config, base.get_config())

    def test_every_key_is_read(self):
        """A key is written in base.py and read, by name, somewhere outside of the configs."""
        folders = ("rvit_jax", "input_pipeline")
        files = [
            f for folder in folders for f in Path(folder).glob("*.py") if f.name != "config.py"
        ]
        text = "\n".join(file.read_text() for file in files)
        for key in leaf_keys(base.get_config()):
            *sections, name = key.split(".")
            read_whole = key.startswith("dataset.generate.")  # handed over as keyword arguments
            holders = "|".join(("config", "options", "crop", "colour", "rand", *sections[-1:]))
            assert read_whole or re.search(rf"\b({holders})(\.\w+)*\.{name}\b", text), key
        assert lookup(base.get_config(), "dataset.nothing") is None
