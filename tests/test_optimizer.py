"""What a training step does with the gradient, and how it comes by it: values worked by hand."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import rvit_jax
from configs import base
from rvit_jax import checkpoint, diagnose, evaluate, losses, optimizer, steps, train
from rvit_jax.augment import make_augment
from rvit_jax.config import check_config
from tests.jester_folder import CLASSES, labelled, make_set
from tests.small import random_video, small_config, small_model


def optimizer_config(**keys):
    config = base.get_config().optimizer
    config.update({"schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.0, **keys})
    return config


def chain(**keys):
    config = optimizer_config(**keys)
    return optimizer.make_optimizer(config, optimizer.learning_rate_schedule(config, 1, 1))


class TestLamb:
    def test_first_update_by_hand(self):
        # Adam's first update is the gradient's sign, [1, -1], of length sqrt(2); the tensor's is 5.
        params = {"w": jnp.array([3.0, 4.0])}
        grads = {"w": jnp.array([2.0, -0.5])}
        lamb = chain(name="lamb")
        updates, _ = lamb.update(grads, lamb.init(params), params)
        expected = -0.1 * 5.0 / math.sqrt(2.0) * np.array([1.0, -1.0])
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)

    def test_decay_is_part_of_what_is_scaled(self):
        # [1, -1] + 0.5 * [3, 4] = [2.5, 1].
        params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([2.0, -0.5])}
        lamb = chain(name="lamb")
        config = optimizer_config(name="lamb")
        config.weight_decay = 0.5
        lamb = optimizer.make_optimizer(config, lambda step: 0.1)
        updates, _ = lamb.update(grads, lamb.init(params), params)
        expected = -0.1 * 5.0 / math.hypot(2.5, 1.0) * np.array([2.5, 1.0])
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


class TestLayerDecay:
    def test_table(self):
        depths = {
            "head/dense/kernel": 0,
            "head/norm/bias": 0,
            "layers/11/mlp/dense_in/bias": 1,
            "layers/0/attention/to_qkv_hidden/kernel": 12,
            "patch_embedding/kernel": 13,
            "class_token": 13,
            "pos_embedding": 13,
            "hidden_class_token": 13,
        }
        assert {p: optimizer.layer_depth(p, 12) for p in depths} == depths

    @pytest.mark.parametrize("frozen", [(), ("layers/1/*", "head/*")])
    def test_each_update_is_scaled_once(self, frozen):
        params = nnx.state(small_model(), nnx.Param)  # two layers
        grads = jax.tree.map(jnp.ones_like, params)
        sgd = chain(name="sgd", betas=(0.0, 0.9), layer_decay=0.5, frozen=frozen)
        updates, _ = sgd.update(grads, sgd.init(params), params)
        for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
            name = optimizer.path_string(path)
            factor = {"head": 1.0, "layers/1": 0.5, "layers/0": 0.25}.get(
                "/".join(name.split("/")[: 2 if name.startswith("layers") else 1]), 0.125
            )
            if frozen and factor >= 0.5:
                factor = 0.0
            np.testing.assert_allclose(update, np.full(update.shape, -0.1 * factor), rtol=1e-6)

    def test_off_leaves_the_state_as_it_was(self):
        params = {"w": jnp.ones(2)}
        plain, off = chain(), chain(layer_decay=1.0)
        assert jax.tree.structure(plain.init(params)) == jax.tree.structure(off.init(params))


@pytest.mark.parametrize("key", ["name", "schedule"])
def test_an_unknown_choice_is_refused(key):
    with pytest.raises(ValueError, match=rf"config\.optimizer\.{key}='lion' is unknown"):
        chain(**{key: "lion"})


def batch_of(num_clips: int, *, seed: int = 0, num_frames: int = 3) -> steps.Batch:
    rng = np.random.default_rng(seed)
    return {
        "video": random_video(num_clips, num_frames, seed=seed),
        "label": jnp.asarray(rng.integers(0, 5, num_clips), jnp.int32),
        "num_frames": jnp.asarray(rng.integers(1, num_frames + 1, num_clips), jnp.int32),
        "mask": jnp.ones(num_clips, bool),
    }


def split_model(**model):
    built = small_model(**{"block_dropout_rate": 0.0, "num_layers": 1, **model})
    built.train()
    return nnx.split(built, nnx.Param, ...)


def relative_error(ours: nnx.State, theirs: nnx.State) -> float:
    """The largest over the tensors, each relative to its own largest value."""
    errors = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-12)),
        ours,
        theirs,
    )
    return max(jax.tree.leaves(errors))


LOSS = losses.make_loss(base.get_config().loss)


@functools.cache
def compiled_gradient(parts: int):
    graphdef, _, _ = split_model()
    return jax.jit(steps.make_gradient(graphdef, LOSS, ragged=True, accumulation_steps=parts))


class TestAccumulation:
    BAR = 5e-6

    def gradients(self, batch, parts):
        """Of the small ragged model, in one and in so many parts."""
        _, params, fixed = split_model()
        key = jax.random.key(0)
        return compiled_gradient(1)(params, fixed, batch, key), compiled_gradient(parts)(
            params, fixed, batch, key
        )

    def test_parts_give_the_gradient_of_the_whole(self):
        """4 parts of 8; ragged, and masked so that the parts hold 8, 8, 2 and 1 real clips."""
        batch = batch_of(32)
        rows = np.arange(32)
        part, place = rows % 4, rows // 4
        batch["mask"] = jnp.asarray(place < np.array([8, 8, 2, 1])[part])
        (one, grads), (many, accumulated) = self.gradients(batch, 4)
        np.testing.assert_allclose(many, one, rtol=1e-6)
        assert relative_error(accumulated, grads) <= self.BAR

    @settings(max_examples=25)
    @given(parts=st.sampled_from([4, 12]), mask=st.integers(1, 2**12 - 1))
    def test_whatever_is_masked(self, parts, mask):
        batch = batch_of(12)
        batch["mask"] = jnp.asarray([bool(mask >> row & 1) for row in range(12)])
        (one, grads), (many, accumulated) = self.gradients(batch, parts)
        np.testing.assert_allclose(many, one, rtol=2e-6)
        assert relative_error(accumulated, grads) <= self.BAR

    def test_an_empty_batch_has_no_gradient(self):
        batch = {**batch_of(4), "mask": jnp.zeros(4, bool)}
        _, ((loss, right), grads) = self.gradients(batch, 4)
        assert (float(loss), float(right)) == (0.0, 0.0)
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) == 0.0

    def test_clips_are_mixed_before_they_are_split(self):
        config = small_config()
        config.dataset.augment.mixup_alpha = 0.8
        augment = make_augment(config, [f"class {k}" for k in range(5)])
        seen = optax.GradientTransformation(  # the state is the last gradient
            lambda params: jax.tree.map(jnp.zeros_like, params),
            lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
        )
        model = small_model(block_dropout_rate=0.0, num_layers=1)
        graphdef, state = steps.create_train_state(model, seen)
        batch = {**batch_of(8), "mask": jnp.arange(8) < 7}
        batch["video"] = jnp.asarray(
            np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16, 3)), jnp.uint8
        )
        after = [
            jax.jit(
                steps.make_train_step(
                    graphdef,
                    seen,
                    LOSS,
                    seed=3,
                    ragged=False,
                    augment=augment,
                    accumulation_steps=parts,
                )
            )(state, batch)
            for parts in (1, 4)
        ]
        assert relative_error(after[1][0].opt_state, after[0][0].opt_state) <= self.BAR
        for key, value in after[0][1].items():
            np.testing.assert_allclose(after[1][1][key], value, rtol=1e-5)

    def test_each_part_draws_its_own_dropout(self):
        """Part p holds rows p, p + n, ... and its key is the step's, folded with p."""
        graphdef, params, fixed = split_model(block_dropout_rate=0.5)
        batch, key = {**batch_of(6), "mask": jnp.arange(6) != 1}, jax.random.key(7)
        whole = jax.jit(steps.make_gradient(graphdef, LOSS, ragged=True))
        parts = [
            whole(
                params,
                fixed,
                {name: rows[p::2] for name, rows in batch.items()},
                jax.random.fold_in(key, p),
            )[1]
            for p in range(2)
        ]
        # Part 0 has 3 of the 5 real clips, part 1 has 2: means weighted by their clips.
        expected = jax.tree.map(lambda a, b: (3 * a + 2 * b) / 5, *parts)
        accumulate = steps.make_gradient(graphdef, LOSS, ragged=True, accumulation_steps=2)
        _, grads = jax.jit(accumulate)(params, fixed, batch, key)
        assert relative_error(grads, expected) <= self.BAR

    def test_memory_is_that_of_a_part(self):
        graphdef, params, fixed = split_model(remat="none")
        batch = batch_of(32, num_frames=8)
        batch["video"] = jnp.zeros(batch["video"].shape, jnp.uint8)
        bytes_used = [
            jax.jit(steps.make_gradient(graphdef, LOSS, ragged=False, accumulation_steps=n))
            .lower(params, fixed, batch, jax.random.key(0))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for n in (1, 8)
        ]
        assert bytes_used[1] < 0.4 * bytes_used[0]

    def test_parts_are_equal(self):
        config = base.get_config()
        config.optimizer.accumulation_steps = 5
        with pytest.raises(ValueError, match=r"=5 does not divide config\.batch_size=32.* is 4$"):
            check_config(config, base.get_config())


@functools.cache
def make_step(*, ema_decay=0.0, halt=False):
    adamw = optax.adamw(optax.constant_schedule(0.01))
    graphdef, state = steps.create_train_state(
        small_model(block_dropout_rate=0.0, num_layers=1), adamw, ema=ema_decay > 0
    )
    step = steps.make_train_step(
        graphdef, adamw, LOSS, seed=0, ragged=False, ema_decay=ema_decay, halt=halt
    )
    return jax.jit(step), state


def equal(ours, theirs) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


class TestAverage:
    def test_by_hand(self):
        step, state = make_step(ema_decay=0.75)
        assert equal(state.ema, state.params)  # it begins as a copy
        seen = [state.params]
        for seed in range(3):
            state, _ = step(state, batch_of(4, seed=seed))
            seen.append(state.params)
        # 0.75^3 of the first, then 0.25 times 0.75^2, 0.75 and 1 of the three after.
        expected = jax.tree.map(
            lambda a, b, c, d: 0.421875 * a + 0.140625 * b + 0.1875 * c + 0.25 * d, *seen
        )
        assert relative_error(state.ema, expected) < 1e-6

    def test_training_does_not_depend_on_it(self):
        (plain, first), (averaged, state) = make_step(), make_step(ema_decay=0.75)
        assert first.ema is None
        for seed in range(3):
            first, _ = plain(first, batch_of(4, seed=seed))
            state, _ = averaged(state, batch_of(4, seed=seed))
        assert equal(first.params, state.params)

    def test_it_may_not_stand_still(self):
        config = base.get_config()
        config.ema_decay = 1.0
        with pytest.raises(ValueError, match=r"config\.ema_decay=1\.0 is out of range"):
            check_config(config, base.get_config())


def poisoned(batch: steps.Batch) -> steps.Batch:
    return {**batch, "video": batch["video"].at[1, 0, 0, 0, 0].set(jnp.inf)}


class TestNotFinite:
    def test_a_refused_update_changes_nothing(self):
        step, state = make_step(ema_decay=0.75)
        state, _ = step(state, batch_of(4))
        after, sums = step(state, poisoned(batch_of(4, seed=1)))
        assert not math.isfinite(sums["loss"])
        assert int(after.step) == int(state.step) + 1
        for part in ("params", "opt_state", "ema", "fixed"):
            assert equal(getattr(after, part), getattr(state, part)), part
        assert optimizer.updates_made(after.opt_state) == 1

    def test_skipping_goes_on_as_if_nothing_had_been(self):
        step, state = make_step()
        expected, _ = step(state, batch_of(4))
        state, _ = step(state, poisoned(batch_of(4)))
        state, _ = step(state, batch_of(4))
        assert equal(state.params, expected.params)  # no dropout: the step's number plays no part

    def test_stopping_keeps_the_parameters_from_before(self):
        step, state = make_step(halt=True)
        before, _ = step(state, batch_of(4))
        after, _ = step(before, poisoned(batch_of(4)))
        for seed in range(3):
            after, sums = step(after, batch_of(4, seed=seed))
            assert math.isfinite(sums["loss"])
        assert equal(after.params, before.params)
        assert equal(after.opt_state, before.opt_state)
        assert int(after.step) == 5

    def test_largest_activations(self):
        model = small_model()
        video = random_video(3, 4)
        num_frames, mask = np.array([4, 2, 3]), np.array([True, True, False])
        found = diagnose.largest_activations(model, video, num_frames, mask)
        assert list(found) == [
            "patch_embedding",
            *(f"layers/{layer}/{part}" for layer in range(2) for part in ("attention", "mlp")),
            "state",
            "logits",
        ]
        # By hand, without what captures: the frames of clip 0, and the first two of clip 1.
        patches = [model.patch_embedding(video[:1, t]) for t in range(4)]
        patches += [model.patch_embedding(video[1:2, t]) for t in range(2)]
        expected = max(float(jnp.abs(p).max()) for p in patches)
        assert found["patch_embedding"] == pytest.approx(expected, rel=1e-6)
        answers = []
        for row, frames in ((0, 4), (1, 2)):
            hidden = model.initial_hidden(1)
            for t in range(frames):
                logits, hidden = model.step(video[row : row + 1, t], hidden)
                answers.append(float(jnp.abs(logits).max()))
            if row == 0:
                state = float(jnp.abs(hidden).max())
        assert found["logits"] == pytest.approx(max(answers), rel=1e-5)
        assert found["state"] >= state * (1 - 1e-5)

    def test_largest_activations_of_rematerialised_layers(self):
        clips = random_video(2, 3), np.array([3, 2]), np.array([True, True])
        expected = diagnose.largest_activations(small_model(), *clips)
        found = diagnose.largest_activations(small_model(remat="layers"), *clips)
        assert found == pytest.approx(expected, rel=1e-6)

    def test_the_first_stage_that_overflows_is_seen(self):
        model = small_model()
        model.layers[1].mlp.dense_out.kernel[...] = jnp.full((24, 16), jnp.inf)
        found = diagnose.largest_activations(
            model, random_video(1, 2), np.array([2]), np.array([True])
        )
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        assert bad[0] == "layers/1/mlp"


class TestLossKeys:
    def test_smoothing_that_nothing_reads_is_refused(self):
        config = base.get_config()
        config.loss.name = "cross_entropy"
        check_config(config, base.get_config())  # the default may stand
        config.loss.label_smoothing = 0.0
        check_config(config, base.get_config())
        config.loss.label_smoothing = 0.2
        with pytest.raises(ValueError, match=r"0\.2 has no effect with config\.loss\.name='cross"):
            check_config(config, base.get_config())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    rows = {"train": labelled(1, 10), "validation": labelled(11, 17)}
    return make_set(tmp_path_factory.mktemp("jester"), rows, num_frames=None)


def tiny_run(data_dir, **keys):
    config = small_config(num_classes=3)
    config.dataset.update(
        data_dir=str(data_dir), classes=CLASSES, num_frames=4, short_clips="ragged"
    )
    config.update(batch_size=4, num_epochs=2, **keys)
    return config


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Poisoned:
    """A data set some of whose batches have labels that `poisonous` makes NaN of."""

    def __init__(self, dataset, bad: set[int]):
        self._dataset, self._bad = dataset, bad

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def __next__(self):
        index = self._dataset.get_state()["position"]
        batch = next(self._dataset)
        return {**batch, "label": batch["label"] + 100} if index in self._bad else batch


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of some training batches, counted from 0, NaN."""

    def poison_batches(bad: set[int]) -> None:
        get_dataset, make_loss = train.input_pipeline.get_dataset, train.losses.make_loss

        def poisonous_data(config, split, **keys):
            dataset = get_dataset(config, split, **keys)
            return Poisoned(dataset, bad) if split == "train" else dataset

        def poisonous_loss(config):
            loss = make_loss(config)
            return lambda logits, label: jnp.where(label >= 100, jnp.nan, loss(logits, label % 100))

        monkeypatch.setattr(train.input_pipeline, "get_dataset", poisonous_data)
        monkeypatch.setattr(train.losses, "make_loss", poisonous_loss)

    return poison_batches


class TestRuns:
    def test_stop_names_the_step_its_clips_and_what_is_large(self, data_dir, tmp_path, poison):
        poison({4})
        with pytest.raises(FloatingPointError, match=r"step 5 \(loss nan") as error:
            train.train_and_evaluate(tiny_run(data_dir), tmp_path)
        message = str(error.value)
        assert "\n" not in message
        ids = message.split("its clips are ")[1].split(".")[0].split("; ")[0].split(", ")
        assert len(ids) == 4
        assert set(ids) <= {str(i) for i in range(1, 11)}
        assert "layers/1/attention" in message
        assert "config.on_nonfinite='skip'" in message
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]  # from before

    def test_skip_counts_and_goes_on(self, data_dir, tmp_path, poison):
        poison({1, 4})
        train.train_and_evaluate(tiny_run(data_dir, on_nonfinite="skip"), tmp_path)
        counts = [record["training"]["skipped_updates"] for record in records(tmp_path)]
        assert counts == [1, 1]
        assert all(math.isfinite(record["training"]["loss"]) for record in records(tmp_path))

    @pytest.mark.slow
    def test_skip_gives_up(self, data_dir, tmp_path, poison, monkeypatch):
        monkeypatch.setattr(train, "MOST_REFUSED_IN_A_ROW", 2)
        poison({1, 2, 3})
        with pytest.raises(FloatingPointError, match=r"step 2 .*so were those of steps 3, 4"):
            train.train_and_evaluate(tiny_run(data_dir, on_nonfinite="skip"), tmp_path)

    def test_an_average_is_kept_evaluated_and_restored(self, data_dir, tmp_path):
        """Whole, and in two goes, with parts: the same bits."""
        config = tiny_run(data_dir, ema_decay=0.5)
        config.optimizer.update(accumulation_steps=2, learning_rate=1e-2)
        train.train_and_evaluate(config, tmp_path / "whole")
        config.num_epochs = 1
        train.train_and_evaluate(config, tmp_path / "halves")
        config.num_epochs = 2
        train.train_and_evaluate(config, tmp_path / "halves")
        last = records(tmp_path / "whole")[-1]
        assert last["ema_loss"] != last["loss"]
        assert 0.0 <= last["ema_top1"] <= 1.0
        folder = tmp_path / "whole" / "checkpoints" / "6" / "ema"
        measured = evaluate.evaluate(config, tmp_path / "e", "validation", folder)
        assert measured["loss"] == pytest.approx(last["ema_loss"], rel=1e-5)
        weights = [
            nnx.to_pure_dict(nnx.state(rvit_jax.load(path).model.module))
            for path in (
                tmp_path / "whole" / "checkpoints" / "6" / "ema",
                tmp_path / "halves" / "checkpoints" / "6" / "ema",
                tmp_path / "whole" / "checkpoints" / "6",
            )
        ]
        assert equal(weights[0], weights[1])
        assert not equal(weights[0], weights[2])
        assert checkpoint.resolve_checkpoint(tmp_path / "whole").name in {"3", "6"}

    @pytest.mark.slow
    def test_a_run_has_an_average_from_its_beginning_or_none(self, data_dir, tmp_path):
        config = tiny_run(data_dir)
        config.num_epochs = 1
        train.train_and_evaluate(config, tmp_path)
        assert not (tmp_path / "checkpoints" / "3" / "ema").exists()
        config.ema_decay = 0.5
        with pytest.raises(ValueError, match=r"config\.ema_decay: 0\.0 there, 0\.5 now"):
            train.train_and_evaluate(config, tmp_path)
