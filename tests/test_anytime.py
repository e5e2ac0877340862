"""What the answers before a clip's end are worth, against values worked out by hand."""

import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from rvit_jax import anytime, losses, steps
from rvit_jax.anytime import Answers
from tests.small import random_video, small_config, small_model


def answers(predicted, label, *, confidence=None, num_frames=None) -> Answers:
    predicted = np.array(predicted)
    clips, most = predicted.shape
    if confidence is None:
        confidence = np.full(predicted.shape, 0.6)
    num_frames = np.full(clips, most) if num_frames is None else np.array(num_frames)
    return Answers(predicted, np.array(confidence), num_frames, np.array(label))


THREE = answers(
    [[0, 1, 1, 1], [2, 2, 0, 2], [1, 1, 1, 1]],
    [1, 2, 0],
    confidence=[[0.3, 0.55, 0.92, 0.96], [0.91, 0.5, 0.4, 0.7], [0.2, 0.2, 0.2, 0.2]],
)


def test_top1_after_each_frame_and_its_area():
    measured = anytime.measure(THREE, 0.25)
    assert measured["by_frame"]["frames"] == [1, 2, 3, 4]
    assert measured["by_frame"]["top1"] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])
    assert measured["area"] == pytest.approx((3 / 4 + 3 / 4 + 0) / 3)
    assert measured["area"] == pytest.approx(np.mean(measured["by_frame"]["top1"]))
    assert (measured["num_clips"], measured["seconds_per_frame"]) == (3, 0.25)


def test_the_answer_settles_where_it_last_changes():
    assert anytime.settled_at(THREE).tolist() == [2, 4, 1]
    stable = anytime.measure(THREE, 1.0)["stable"]
    assert stable["all"]["mean_frames"] == pytest.approx(7 / 3)
    assert stable["all"]["median_frames"] == 2
    assert stable["right"]["mean_frames"] == 3
    assert stable["right"]["mean_fraction"] == pytest.approx((0.5 + 1.0) / 2)


def test_a_single_frame_is_settled_at_once():
    assert anytime.settled_at(answers([[3], [1]], [3, 3])).tolist() == [1, 1]


def test_early_exit_by_confidence():
    assert anytime.confident_at(THREE, 0.9).tolist() == [3, 1, 4]
    rules = {(r["rule"], r["value"]): r for r in anytime.measure(THREE, 1.0)["early_exit"]}
    rule = rules["confidence", 0.9]
    assert rule["top1"] == pytest.approx(2 / 3)  # 1 at frame 3, 2 at frame 1, never 0
    assert rule["mean_frames"] == pytest.approx(8 / 3)
    assert rule["mean_fraction"] == pytest.approx(2 / 3)
    assert rule["stopped_early"] == pytest.approx(2 / 3)
    assert rules["confidence", 0.99]["mean_frames"] == 4


def test_early_exit_by_patience():
    assert anytime.patient_at(THREE, 2).tolist() == [3, 2, 2]
    assert anytime.patient_at(THREE, 3).tolist() == [4, 4, 3]
    values = [
        r["value"] for r in anytime.measure(THREE, 1.0)["early_exit"] if r["rule"] == "patience"
    ]
    assert values == [2, 3, 4]  # no more than there are frames


def test_calibration_by_hand():
    confidence = np.array([0.95, 0.95, 0.65, 0.65, 0.1, 1.0])
    right = np.array([True, False, True, True, False, True])
    # Bins of 1/15: {0.95, 0.95, 1.0}, {0.65, 0.65}, {0.1}.
    expected = (3 * abs(2.9 / 3 - 2 / 3) + 2 * abs(0.65 - 1.0) + 1 * 0.1) / 6
    assert anytime.expected_calibration_error(confidence, right) == pytest.approx(expected)
    bins = anytime.calibration_bins(confidence, right)
    assert bins["clips"] == [0, 1, *[0] * 7, 2, *[0] * 4, 3]
    assert bins["accuracy"][14] == pytest.approx(2 / 3)
    assert bins["confidence"][9] == pytest.approx(0.65)
    assert bins["accuracy"][0] is None


def test_fractions_count_whole_frames_rounded_up():
    predicted = [[9] * 6 + [1] * 4]  # right from frame 7 of 10 on
    by_fraction = anytime.measure(answers(predicted, [1]), 1.0)["by_fraction"]
    assert by_fraction["fraction"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert by_fraction["top1"] == [0.0] * 6 + [1.0] * 4


def test_frames_that_a_clip_has_not_are_not_counted():
    ragged = answers([[0, 0, 0, 0], [1, 1, 1, 1]], [0, 1], num_frames=[2, 4])
    assert anytime.measure(ragged, 1.0)["by_frame"]["mean_frames"] == [1.0, 2.0, 2.5, 3.0]


def test_what_comes_after_a_clips_end_is_not_read():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), (2, 4))
    num_frames, label = np.array([2, 4]), np.array([0, 1])
    ragged = Answers.from_probabilities(probabilities, num_frames, label)
    assert (ragged.predicted[0, 2:] == probabilities[0, 1].argmax()).all()
    assert (ragged.confidence[0, 2:] == probabilities[0, 1].max()).all()
    changed = probabilities.copy()
    changed[0, 2:] = [0.0, 0.0, 1.0]
    again = Answers.from_probabilities(changed, num_frames, label)
    assert anytime.measure(again, 1.0) == anytime.measure(ragged, 1.0)
    assert anytime.patient_at(ragged, 4)[0] == 2


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 12))
def test_laws(seed, most, clips):
    random = np.random.default_rng(seed)
    made = Answers.from_probabilities(
        random.dirichlet(np.ones(4) * 0.3, (clips, most)),
        random.integers(1, most + 1, clips),
        random.integers(0, 4, clips),
    )
    measured = anytime.measure(made, 1.0)
    assert json.loads(json.dumps(measured)) == measured
    last = measured["by_frame"]["top1"][-1]
    assert measured["by_fraction"]["top1"][-1] == pytest.approx(last)
    settled = anytime.settled_at(made)
    assert (settled >= 1).all()
    assert (settled <= made.num_frames).all()
    # Whoever waits until the answer has settled is right as often as at the end.
    assert made.after(settled)[0].mean() == pytest.approx(last)
    frames = [anytime.patient_at(made, p) for p in range(1, most + 1)]
    assert (frames[0] == 1).all()
    assert all((a <= b).all() for a, b in itertools.pairwise(frames))
    assert sum(measured["calibration"]["clips"]) == clips
    assert 0.0 <= measured["area"] <= 1.0


@pytest.mark.parametrize("readout", ["class_token", "class_and_hidden_tokens"])
def test_one_pass_answers_as_clips_that_end_at_each_frame(readout):
    model = small_model(attention="softmax", readout=readout)
    video = random_video(3, 5)
    batch = {
        "video": video,
        "num_frames": np.array([5, 2, 4], np.int32),
        "label": np.array([1, 0, 4], np.int32),
    }
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)
    loss = losses.make_loss(small_config().loss)
    logits, loss_of = jax.jit(steps.make_anytime_step(graphdef, loss))(params, fixed, batch)
    for t in range(5):
        expected, _ = model(video[:, : t + 1])
        np.testing.assert_allclose(
            logits[:, t], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )
    plain = jax.jit(steps.make_eval_step(graphdef, loss, ragged=True))
    np.testing.assert_allclose(loss_of, plain(params, fixed, batch)[1], rtol=1e-5)
