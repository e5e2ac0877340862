"""Streams: equal to clips, endless with windows, saved and resumed; events in their answers."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rvit_jax.events import Event, EventDetector
from rvit_jax.model import CompiledRViT
from rvit_jax.streaming import Streams, combine
from tests.small import random_video, small_model

ATTENTIONS = ("linear", "softmax", "reattention")


@pytest.fixture(scope="module", params=ATTENTIONS)
def model(request):
    return CompiledRViT(small_model(attention=request.param, readout="class_and_hidden_tokens"))


@pytest.fixture(scope="module")
def softmax_model():
    return CompiledRViT(small_model(attention="softmax"))


def softmax(logits):
    return np.asarray(jax.nn.softmax(np.asarray(logits), axis=-1))


def test_a_stream_equals_the_clip(model):
    clip = np.asarray(random_video(2, 9))
    expected, _ = model(clip)
    streams = Streams(model, 2)
    for t in range(9):
        logits = streams.advance(clip[:, t])
    bar = 1e-5 * float(np.abs(expected).max())
    np.testing.assert_allclose(logits[0], expected, atol=bar)
    assert streams.num_frames.tolist() == [9, 9]


def test_a_stream_that_waits_keeps_its_state(model):
    """Frames of one stream come at any time: the answers are those of its own clip."""
    clip = np.asarray(random_video(2, 6))
    streams = Streams(model, 2, window=4, num_states=2)
    alone = [Streams(model, 1, window=4, num_states=2) for _ in range(2)]
    places = [0, 0]
    rng = np.random.default_rng(0)
    while min(places) < 6:
        active = rng.random(2) < 0.6
        active &= np.array(places) < 6
        frames = np.stack([clip[row, min(places[row], 5)] for row in range(2)])
        answer = streams.step(frames, active)
        for row in range(2):
            if active[row]:
                expected = alone[row].step(clip[row : row + 1, places[row]])
                np.testing.assert_allclose(answer[row], expected[0], atol=1e-5)
                places[row] += 1
            else:
                assert np.isnan(answer[row]).all()


@pytest.mark.parametrize(("window", "num_states"), [(1, 1), (4, 1), (4, 2), (6, 3), (5, 5), (7, 3)])
def test_each_state_has_seen_as_many_of_the_latest_frames_as_its_age(
    softmax_model, window, num_states
):
    clip = np.asarray(random_video(1, 20, seed=3))
    streams = Streams(softmax_model, 1, window=window, num_states=num_states)
    for t in range(20):
        logits = streams.advance(clip[:, t])
        ages = streams.ages()[:, 0]
        assert ages.max() <= window + num_states
        for state, age in enumerate(ages):
            if age:
                expected, _ = softmax_model(clip[:, t + 1 - age : t + 1])
                np.testing.assert_allclose(logits[state], expected, atol=1e-5)
        assert streams.asked()[:, 0].any()
        if t >= window:
            assert ages[streams.asked()[:, 0]].min() > 0


def test_a_window_asks_states_as_old_as_training_clips(softmax_model):
    streams = Streams(softmax_model, 1, window=15)
    frame = np.zeros((1, 16, 16, 3), np.uint8)
    for _ in range(40):
        streams.advance(frame)
    assert streams.num_states == 15
    assert sorted(streams.ages()[:, 0]) == list(range(1, 16))
    assert sorted(streams.ages()[streams.asked()]) == [10, 11, 12, 13, 14, 15]


def test_many_frames_keep_to_sixteen_states(softmax_model):
    streams = Streams(softmax_model, 1, window=36)
    assert streams.num_states == 12  # one every third frame
    assert Streams(softmax_model, 1, window=16).num_states == 16


def test_decay_of_one_half_by_hand(softmax_model):
    clip = np.asarray(random_video(1, 3))
    streams = Streams(softmax_model, 1, decay=0.5)
    initial = softmax_model.initial_hidden(1)
    hidden = initial
    for t in range(3):
        hidden = initial + 0.5 * (hidden - initial)
        expected, hidden = softmax_model.step(clip[:, t], hidden)
        np.testing.assert_allclose(streams.advance(clip[:, t])[0], expected, atol=1e-5)


def test_compiling_beforehand_changes_nothing(softmax_model):
    clip = np.asarray(random_video(1, 2))
    warm, cold = Streams(softmax_model), Streams(softmax_model)
    warm.step(clip[:, 0])
    cold.step(clip[:, 0])
    warm.compile((16, 16), np.float32)
    np.testing.assert_array_equal(warm.step(clip[:, 1]), cold.step(clip[:, 1]))
    assert warm._advance._cache_size() == 1


def test_selected_streams_go_on_where_they_were(softmax_model):
    clip = np.asarray(random_video(2, 4))
    streams = Streams(softmax_model, 2, window=3)
    for t in range(3):
        streams.step(clip[:, t])
    chosen = streams.select([1, 1, 0])
    assert chosen.num_frames.tolist() == [3, 3, 3]
    answers = chosen.step(clip[[1, 0, 0], 3])
    expected = streams.step(clip[:, 3])
    np.testing.assert_allclose(answers[2], expected[0], atol=1e-6)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path, softmax_model):
    clip = np.asarray(random_video(2, 8))
    unbroken = Streams(softmax_model, 2, window=5)
    expected = [unbroken.step(clip[:, t]) for t in range(8)]
    first = Streams(softmax_model, 2, window=5)
    for t in range(4):
        first.step(clip[:, t])
    first.save(tmp_path / "state.npz")
    second = Streams(softmax_model, 2, window=5)
    second.restore(tmp_path / "state.npz")
    for t in range(4, 8):
        np.testing.assert_array_equal(second.step(clip[:, t]), expected[t])
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]


def test_a_state_of_something_else_is_refused(tmp_path, softmax_model):
    file = tmp_path / "state.npz"
    Streams(softmax_model, 2, window=5).save(file)
    for other, message in (
        (Streams(softmax_model, 1, window=5), "num_streams is 2 there, 1 here"),
        (Streams(softmax_model, 2, window=4), "num_states"),
        (Streams(softmax_model, 2, window=5, decay=0.5), "decay"),
        (Streams(CompiledRViT(small_model(attention="softmax", seed=1)), 2, window=5), "model"),
    ):
        with pytest.raises(ValueError, match=message):
            other.restore(file)
    data = file.read_bytes()
    for broken in (
        data[: len(data) // 2],
        b"",
        b"text",
        data.replace(b"hidden.npy", b"hoddin.npy"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"no state|no saved state"):
            Streams(softmax_model, 2, window=5).restore(file)


def test_a_frame_that_does_not_fit_was_not_seen(softmax_model):
    streams = Streams(softmax_model)
    with pytest.raises(ValueError, match="got shape"):
        streams.step(np.zeros((1, 9, 9, 3), np.uint8))
    assert streams.num_frames.tolist() == [0]


def test_a_state_of_other_heads_is_refused(tmp_path):
    Streams(CompiledRViT(small_model(attention="softmax"))).save(tmp_path / "s.npz")
    other = Streams(CompiledRViT(small_model(attention="softmax", num_heads=2)))
    with pytest.raises(ValueError, match="model"):
        other.restore(tmp_path / "s.npz")


@pytest.mark.parametrize(
    "settings",
    [{"window": -1}, {"decay": 0.0}, {"decay": 1.5}, {"window": 3, "num_states": 4}],
)
def test_settings_that_cannot_be(softmax_model, settings):
    with pytest.raises(ValueError, match=r"expected|from 1"):
        Streams(softmax_model, **settings)


def test_the_mean_is_weighted_by_confidence_squared():
    probabilities = np.array([[[0.8, 0.2]], [[0.4, 0.6]], [[0.0001, 0.9999]]], np.float32)
    asked = np.array([[True], [True], [False]])
    expected = (0.64 * probabilities[0, 0] + 0.36 * probabilities[1, 0]) / 1.0
    np.testing.assert_allclose(combine(np.log(probabilities), asked)[0], expected, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
def test_one_state_alone_is_its_softmax(num_streams, num_states, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 30, (num_states, num_streams, 5)).astype(np.float32)
    asked = np.zeros((num_states, num_streams), bool)
    chosen = rng.integers(0, num_states, num_streams)
    asked[chosen, np.arange(num_streams)] = True
    expected = softmax(logits[chosen, np.arange(num_streams)])
    np.testing.assert_allclose(combine(logits, asked), expected, atol=1e-6)


# --------------------------------------------------------------------------- events

NAMES = ("No gesture", "left", "right")


def events_of(answers, **settings) -> list[Event]:
    detector = EventDetector(NAMES, **settings)
    found = [detector.update(float(t), np.array(p)) for t, p in enumerate(answers)]
    return [event for event in [*found, detector.finish()] if event is not None]


IDLE, LEFT, RIGHT = (0.9, 0.05, 0.05), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)
WAVER = (0.45, 0.4, 0.15)  # neither believed nor over


def test_events_by_hand():
    answers = [IDLE, LEFT, LEFT, WAVER, LEFT, IDLE, IDLE, IDLE, RIGHT, (0.0, 0.1, 0.9)]
    assert events_of(answers) == [Event("left", 1.0, 4.0, 0.8), Event("right", 8.0, 9.0, 0.9)]


def test_a_single_answer_is_no_event_and_ends_none():
    assert events_of([IDLE, LEFT, IDLE, IDLE]) == []
    assert events_of([LEFT, LEFT, IDLE, LEFT]) == [Event("left", 0.0, 3.0, 0.8)]
    assert events_of([LEFT], patience=1) == [Event("left", 0.0, 0.0, 0.8)]


def test_one_class_may_follow_another_at_once():
    found = events_of([LEFT, LEFT, RIGHT, RIGHT, RIGHT])
    assert found == [Event("left", 0.0, 1.0, 0.8), Event("right", 2.0, 4.0, 0.8)]


def test_a_class_that_is_believed_ends_a_weaker_one():
    strong, weak = (0.05, 0.35, 0.6), (0.1, 0.8, 0.1)
    found = events_of([weak, weak, weak, strong, strong, strong])
    assert [(event.class_name, event.start_s, event.end_s) for event in found] == [
        ("left", 0.0, 3.0),
        ("right", 3.0, 5.0),
    ]


def test_a_contradiction_is_forgotten_when_the_class_is_back():
    assert events_of([LEFT, LEFT, IDLE, LEFT, IDLE, LEFT]) == [Event("left", 0.0, 5.0, 0.8)]


def test_confidence_is_the_greatest_of_the_event():
    assert events_of([LEFT, LEFT, (0.0, 0.95, 0.05)])[0].confidence == 0.95


def test_background_makes_no_events():
    assert events_of([IDLE] * 9) == []
    assert [event.class_name for event in events_of([IDLE] * 9, background=())] == ["No gesture"]


def test_thresholds_out_of_order():
    with pytest.raises(ValueError, match="0 < end <= begin"):
        EventDetector(NAMES, begin=0.3, end=0.5)
