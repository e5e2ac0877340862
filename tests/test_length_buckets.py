"""Training batches of clips of about one length: every clip once, none cut, no frame repeated."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_pipeline import get_dataset
from input_pipeline.order import ClipOrder
from tests.jester_folder import labelled, make_clip, make_set
from tests.test_loader import NUM_TRAIN, make_config, open_split, take

BUCKETS = {"dataset.short_clips": "ragged", "dataset.length_buckets": (2, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of 2 to 6 frames, of which 4 are read."""
    splits = {"train": labelled(1, NUM_TRAIN), "validation": labelled(12, 16)}
    return make_set(tmp_path_factory.mktemp("jester"), splits, num_frames=None)


def by_id(batches):
    return {
        clip_id: {key: value[row] for key, value in batch.items()}
        for batch in batches
        for row, clip_id in enumerate(batch["id"])
        if batch["mask"][row]
    }


@given(
    st.lists(st.sampled_from([8, 16, 36]), min_size=1, max_size=60),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 9),
)
def test_each_batch_is_as_long_as_its_longest_clip(lengths, processes, rows, epoch, seed):
    lengths = np.array(lengths)
    parts = [
        ClipOrder(
            len(lengths),
            processes * rows,
            shuffle_seed=seed,
            lengths=lengths,
            process_index=index,
            process_count=processes,
        )
        for index in range(processes)
    ]
    steps = parts[0].batches_per_epoch
    seen, mixed = [], 0
    for batch in range(epoch * steps, (epoch + 1) * steps):
        places = [part[batch * rows + row] for part in parts for row in range(rows)]
        clips = [place.index for place in places if place.index >= 0]
        assert {place.num_frames for place in places} == {max(lengths[clips])}
        mixed += len(set(lengths[clips])) > 1
        seen += clips
    assert sorted(seen) == list(range(len(lengths)))
    assert mixed < len(set(lengths))


def test_the_order_is_another_in_each_epoch():
    lengths = np.repeat([8, 16], 20)
    order = ClipOrder(40, 4, shuffle_seed=1, lengths=lengths)
    epochs = [[order[epoch * 40 + row].index for row in range(40)] for epoch in range(3)]
    assert len({tuple(clips) for clips in epochs}) == 3
    batches = {frozenset(clips[i : i + 4]) for clips in epochs for i in range(0, 40, 4)}
    assert len(batches) > 20  # other clips together, not the same batches in another order
    first = [[order[epoch * 40 + 4 * batch].num_frames for batch in range(10)] for epoch in (0, 1)]
    assert first[0] != first[1]  # nor the short ones first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_clips_are_those_of_whole_batches_without_their_padding(folder, workers, cache):
    if workers and cache:
        pytest.skip("a cache is for threads")
    keys = {"dataset.num_workers": workers, "dataset.cache": cache}
    with_buckets = open_split(folder, **BUCKETS, **keys)
    batches = take(with_buckets, 9)  # three epochs
    with_buckets.close()
    whole = by_id(take(open_split(folder, **{**BUCKETS, "dataset.length_buckets": ()}), 3))
    assert {batch["video"].shape[1] for batch in batches} == {3, 4}
    for first in (0, 3, 6):
        clips = by_id(batches[first : first + 3])
        assert clips.keys() == whole.keys()
        for clip_id, clip in clips.items():
            num_frames = whole[clip_id]["num_frames"]
            assert clip["num_frames"] == num_frames <= len(clip["video"])
            np.testing.assert_array_equal(
                clip["video"], whole[clip_id]["video"][: len(clip["video"])]
            )
            assert clip["label"] == whole[clip_id]["label"]


def test_frame_indices_are_cut_too(folder):
    batches = get_dataset(make_config(folder, **BUCKETS), "train", with_frame_indices=True)
    for batch in take(batches, 6):
        real = np.arange(batch["video"].shape[1]) < batch["num_frames"][:, None]
        assert batch["frame_indices"].shape == real.shape
        assert ((batch["frame_indices"] >= 0) == (real & batch["mask"][:, None])).all()


@pytest.mark.parametrize("sampling", ["head", "dense"])
def test_no_clip_loses_frames_to_jitter(folder, sampling):
    keys = {
        **BUCKETS,
        "dataset.sampling": sampling,
        "dataset.augment.frame_rate_jitter": (0.5, 2.0),
        "dataset.frame_stride": 2,
    }
    batches = take(open_split(folder, **keys), 30)
    whole = take(open_split(folder, **{**keys, "dataset.length_buckets": ()}), 30)
    for epoch in range(0, 30, 3):
        ours, theirs = by_id(batches[epoch : epoch + 3]), by_id(whole[epoch : epoch + 3])
        counts = {clip_id: int(clip["num_frames"]) for clip_id, clip in ours.items()}
        assert counts == {clip_id: int(clip["num_frames"]) for clip_id, clip in theirs.items()}


def test_evaluation_keeps_its_order_and_length(folder):
    batches = list(open_split(folder, "validation", **BUCKETS))
    assert [batch["video"].shape[1] for batch in batches] == [4, 4]
    assert batches[0]["id"].tolist() == ["12", "13", "14", "15"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset.short_clips": "repeat_last"}, "length_buckets=.* set it to 'ragged'"),
        ({"dataset.length_buckets": (3, 2)}, "expected numbers of frames that rise from 1 to at"),
        ({"dataset.length_buckets": (2, 2)}, "rise from 1"),
        ({"dataset.length_buckets": (0, 2)}, "rise from 1"),
        ({"dataset.length_buckets": (2, 5)}, "at most dataset.num_frames=4"),
        ({"dataset.length_buckets": (2.5,)}, "rise from 1"),
    ],
)
def test_buckets_that_cannot_be_are_refused(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        open_split(folder, **{**BUCKETS, **keys})


def test_a_position_belongs_to_its_lengths(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    batches = open_split(tmp_path / "copy", **BUCKETS)
    state = json.loads(json.dumps(batches.get_state()))
    without = open_split(folder, **{**BUCKETS, "dataset.length_buckets": ()})
    with pytest.raises(ValueError, match="lengths_sha256 is None here"):
        without.set_state(state)
    with pytest.raises(ValueError, match=r"lengths_sha256 is '\w+\.\.\. here and None"):
        batches.set_state(without.get_state())
    clip = tmp_path / "copy" / "20bn-jester-v1" / "5"
    num_frames = len(list(clip.iterdir()))
    shutil.rmtree(clip)
    make_clip(clip, 4 if num_frames < 4 else 2)
    with pytest.raises(ValueError, match="lengths_sha256"):
        open_split(tmp_path / "copy", **BUCKETS).set_state(state)


def test_an_empty_clip_is_named_or_skipped(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    frames = tmp_path / "copy" / "20bn-jester-v1" / "5"
    shutil.rmtree(frames)
    frames.mkdir()
    with pytest.raises(FileNotFoundError, match=f"{frames} holds no frame"):
        open_split(tmp_path / "copy", **BUCKETS)
    batches = take(open_split(tmp_path / "copy", **BUCKETS, **{"dataset.on_error": "skip"}), 3)
    (skipped,) = [batch for batch in batches if "5" in batch["id"]]
    assert len(by_id(batches)) == NUM_TRAIN - 1
    assert skipped["video"].shape[1] == 4
