"""Batches: order, padding, processes, workers, the saved position, cache and errors."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import get_config
from input_pipeline import get_dataset, order, transforms
from tests.jester_folder import CLASSES, labelled, make_clip, make_set, reference_frame
from tests.test_video_files import write_video

IMAGE_SIZE = 8
NUM_TRAIN = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_set(
        tmp_path_factory.mktemp("jester"),
        {
            "train": labelled(1, NUM_TRAIN),
            "validation": labelled(12, 16),
            "test": ["17", "18", "19"],
        },
        num_frames=None,
    )


def make_config(folder, **keys):
    config = get_config()
    config.seed = 3
    config.batch_size = 4
    config.model.image_size = IMAGE_SIZE
    config.dataset.data_dir = str(folder)
    config.dataset.classes = CLASSES
    config.dataset.num_frames = 4
    config.update_from_flattened_dict(keys)
    return config


def open_split(folder, split="train", *, process=(0, 1), **keys):
    config = make_config(folder, **keys)
    return get_dataset(config, split, process_index=process[0], process_count=process[1])


def take(batches, count):
    return [next(batches) for _ in range(count)]


def ids(batches):
    return [clip_id for batch in batches for clip_id in batch["id"][batch["mask"]].tolist()]


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def expected_video(folder, clip_id, num_frames=4):
    files = sorted((folder / "20bn-jester-v1" / clip_id).iterdir())
    chosen = [files[min(t, len(files) - 1)] for t in range(num_frames)]
    return np.stack([reference_frame(path, IMAGE_SIZE) for path in chosen])


def test_a_batch_holds_what_the_files_hold(folder):
    batches = open_split(folder)
    assert (batches.split, batches.num_clips, batches.steps_per_epoch) == ("train", NUM_TRAIN, 3)
    assert batches.class_names == CLASSES
    assert batches.has_labels
    batch = next(batches)
    assert {key: (value.dtype, value.shape) for key, value in batch.items() if key != "id"} == {
        "video": (np.uint8, (4, 4, IMAGE_SIZE, IMAGE_SIZE, 3)),
        "label": (np.int32, (4,)),
        "num_frames": (np.int32, (4,)),
        "mask": (np.bool_, (4,)),
    }
    assert batch["id"].dtype.kind == "U"
    assert batch["num_frames"].tolist() == [4] * 4
    for clip_id, label, video in zip(batch["id"], batch["label"], batch["video"], strict=True):
        np.testing.assert_array_equal(video, expected_video(folder, clip_id))
        assert label == int(clip_id) % 3


def test_validation_is_one_pass_in_the_order_of_its_csv(folder):
    batches = open_split(folder, "validation")
    first, last = list(batches)
    assert first["id"].tolist() == ["12", "13", "14", "15"]
    assert last["id"].tolist() == ["16", "", "", ""]
    assert last["mask"].tolist() == [True, False, False, False]
    assert last["label"].tolist() == [16 % 3, -1, -1, -1]
    assert last["num_frames"].tolist() == [4, 1, 1, 1]
    assert last["video"].shape == first["video"].shape
    assert not last["video"][1:].any()
    assert list(batches) == []
    batches.rewind()
    assert_equal_batches([first, last], list(batches))


def test_a_split_without_labels(folder):
    batches = open_split(folder, "test")
    assert not batches.has_labels
    (batch,) = batches
    assert batch["label"].tolist() == [-1] * 4
    assert batch["mask"].tolist() == [True, True, True, False]


def test_each_epoch_is_a_new_permutation_that_the_seed_decides(folder):
    epochs = [ids(take(batches, 3)) for batches in [open_split(folder)] for _ in range(4)]
    everything = sorted(map(str, range(1, NUM_TRAIN + 1)))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = open_split(folder)
    assert [ids(take(again, 3)) for _ in range(4)] == epochs
    assert ids(take(open_split(folder, seed=4), 3)) not in epochs


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_slice_the_same_global_batches(folder, process_count):
    whole = take(open_split(folder), 7)
    parts = [
        take(open_split(folder, process=(index, process_count)), 7)
        for index in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_equal_batches(joined, whole)


@settings(max_examples=60)
@given(st.integers(1, 200), st.sampled_from([1, 2, 3, 8]), st.integers(1, 5), st.integers(0, 9))
def test_every_clip_once_an_epoch_for_any_number_of_processes(clips, processes, rows, epoch):
    batch_size = processes * rows
    orders = [
        order.ClipOrder(clips, batch_size, shuffle_seed=5, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    alone = order.ClipOrder(clips, batch_size, shuffle_seed=5)
    steps = -(-clips // batch_size)
    joined = [
        part[batch * rows + row]
        for batch in range(epoch * steps, (epoch + 1) * steps)
        for part in orders
        for row in range(rows)
    ]
    start = epoch * steps * batch_size
    assert joined == [alone[start + i] for i in range(steps * batch_size)]
    assert sorted(place.index for place in joined if place.index >= 0) == list(range(clips))
    assert {place.epoch for place in joined} == {epoch}


def test_a_batch_that_does_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match=r"batch_size 4 does not divide among 3 .* multiple of 3"):
        open_split(folder, process=(0, 3))
    with pytest.raises(ValueError, match=r"process_index is 2; expected 0\.\.\.1"):
        open_split(folder, process=(2, 2))


def test_workers_change_nothing(folder):
    expected = take(open_split(folder), 8)
    batches = open_split(folder, **{"dataset.num_workers": 4})
    first = take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    restored = open_split(folder, **{"dataset.num_workers": 1})
    restored.set_state(state)
    rest = take(restored, 3)
    restored.close()
    assert all(type(value) is np.ndarray for batch in first for value in batch.values())
    assert_equal_batches(first + rest, expected)


def test_workers_read_one_pass_to_its_end(folder):
    expected = list(open_split(folder, "validation"))
    batches = open_split(folder, "validation", **{"dataset.num_workers": 2})
    assert_equal_batches(list(batches), expected)
    assert list(batches) == []


def test_a_restored_position_goes_on_exactly(folder):
    expected = take(open_split(folder), 26)
    random = np.random.default_rng(0)
    batches = open_split(folder)
    for position in [0, 3, *random.integers(0, 24, 20).tolist()]:
        fresh = open_split(folder)
        take(fresh, position % 5)  # what is read ahead of the position must not matter
        state = {**fresh.get_state(), "position": position}
        batches.set_state(json.loads(json.dumps(state)))
        assert_equal_batches(take(batches, 2), expected[position : position + 2])
        assert batches.get_state()["position"] == position + 2


def test_a_position_moves_between_numbers_of_processes(folder):
    batches = open_split(folder)
    take(batches, 4)
    state = batches.get_state()
    expected = next(batches)
    parts = []
    for index in range(2):
        part = open_split(folder, process=(index, 2))
        part.set_state(state)
        parts.append(next(part)["video"])
    np.testing.assert_array_equal(np.concatenate(parts), expected["video"])


def test_the_end_of_a_pass_is_a_position_too(folder):
    batches = open_split(folder, "validation")
    list(batches)
    restored = open_split(folder, "validation")
    restored.set_state(batches.get_state())
    assert list(restored) == []
    with pytest.raises(ValueError, match="position 3 lies past the end of the validation data"):
        restored.set_state({**batches.get_state(), "position": 3})


def test_a_position_of_other_data_is_refused(folder, tmp_path):
    state = open_split(folder).get_state()
    for keys, differing in [
        ({"seed": 4}, "seed is 4 here and 3 in the saved position"),
        ({"batch_size": 2}, "batch_size is 2 here and 4"),
        ({"dataset.classes": CLASSES[::-1]}, r"class_names is .* here .*; labels_sha256"),
    ]:
        with pytest.raises(ValueError, match=differing):
            open_split(folder, **keys).set_state(state)
    make_set(tmp_path, {"train": labelled(2, NUM_TRAIN + 1), "validation": labelled(12, 16)})
    with pytest.raises(ValueError, match=r"other train data: ids_sha256 is .*new workdir"):
        open_split(tmp_path).set_state(state)
    with pytest.raises(ValueError, match="split is 'validation' here and 'train'"):
        open_split(folder, "validation").set_state(state)
    for wrong in ({}, {**state, "position": -1}, {**state, "position": "3"}, None):
        with pytest.raises(ValueError, match="no position of the data"):
            open_split(folder).set_state(wrong)


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """Paths of the frames under `tmp_path` in the order of their decoding.

    Threads of the tests before may still be at work elsewhere.
    """
    paths = []

    def counting(path, original=transforms.decode_image, **keys):
        if path.startswith(str(tmp_path)):
            paths.append(path)
        return original(path, **keys)

    monkeypatch.setattr(transforms, "decode_image", counting)
    return paths


def test_the_cache_changes_nothing_but_decodes_once(tmp_path, decoded):
    make_set(tmp_path, {"train": labelled(1, NUM_TRAIN)}, num_frames=None)
    batches = open_split(tmp_path, **{"dataset.cache": True})
    cached = take(batches, 9)
    batches.set_state({**batches.get_state(), "position": 1})
    batch = next(batches)
    assert_equal_batches([batch], cached[1:2])
    batch["video"][:] = 0  # the caller's own copy
    batches.rewind()
    assert_equal_batches(take(batches, 9), cached)
    again = [path for path in set(decoded) if decoded.count(path) > 1]
    assert {os.path.basename(path) for path in again} <= {"00001.jpg"}  # saved positions look at it
    assert len({os.path.dirname(path) for path in decoded}) == NUM_TRAIN
    batches.close()
    assert_equal_batches(cached, take(open_split(tmp_path), 9))


def test_a_frame_is_decoded_once_a_clip(tmp_path, decoded):
    make_set(tmp_path, {"validation": labelled(1, 3)}, num_frames=3)
    list(open_split(tmp_path, "validation", **{"dataset.num_frames": 9}))
    assert len(decoded) == len(set(decoded)) == 9


def test_ragged_clips_end_where_their_video_ends(folder):
    keys = {"dataset.num_frames": 5, "dataset.short_clips": "ragged"}
    for batch in take(open_split(folder, **keys), 3):
        for clip_id, count, video, mask in zip(
            batch["id"], batch["num_frames"], batch["video"], batch["mask"], strict=True
        ):
            if not mask:
                continue
            available = len(list((folder / "20bn-jester-v1" / clip_id).iterdir()))
            assert count == min(available, 5)
            np.testing.assert_array_equal(video[:count], expected_video(folder, clip_id, count))
            assert not video[count:].any()


def test_frames_are_strided(folder):
    keys = {"dataset.frame_stride": 2, "dataset.short_clips": "ragged"}
    batch = next(open_split(folder, "validation", **keys))
    for clip_id, count, video in zip(batch["id"], batch["num_frames"], batch["video"], strict=True):
        every = expected_video(folder, clip_id, 6)
        available = len(list((folder / "20bn-jester-v1" / clip_id).iterdir()))
        assert count == (available + 1) // 2
        np.testing.assert_array_equal(video[:count], every[:available:2])


def test_channel_planes_pack_the_filled_up_clip(folder):
    plain = next(open_split(folder, "validation"))["video"]
    packed = next(open_split(folder, "validation", **{"dataset.frame_packing": "channel_planes"}))
    expected = np.stack([transforms.pack_channel_planes(video) for video in plain])
    np.testing.assert_array_equal(packed["video"], expected)


@pytest.mark.parametrize("frame_order", ["shuffled", "single"])
def test_frame_orders_depend_on_the_clip_alone(folder, frame_order):
    keys = {"dataset.frame_order": frame_order, "dataset.short_clips": "ragged"}
    pictures = {}
    for batch_size in (4, 3):
        for batch in take(open_split(folder, batch_size=batch_size, **keys), 6):
            for clip_id, count, video in zip(
                batch["id"], batch["num_frames"], batch["video"], strict=True
            ):
                pictures.setdefault(clip_id, (count, video))
                np.testing.assert_array_equal(video, pictures[clip_id][1])
    del pictures[""]
    for clip_id, (count, video) in pictures.items():
        real = [frame.tobytes() for frame in expected_video(folder, clip_id, count)]
        shown = [frame.tobytes() for frame in video[:count]]
        assert not video[count:].any()
        if frame_order == "shuffled":
            assert sorted(shown) == sorted(real)
        else:
            assert shown == [shown[0]] * count
            assert shown[0] in real


def test_the_tail_of_a_shuffled_short_clip_repeats_the_frame_shown_last(folder):
    batches = open_split(
        folder, "validation", **{"dataset.frame_order": "shuffled", "dataset.num_frames": 9}
    )
    for batch in batches:
        for clip_id, video in zip(batch["id"], batch["video"], strict=True):
            if clip_id:
                count = len(list((folder / "20bn-jester-v1" / clip_id).iterdir()))
                np.testing.assert_array_equal(
                    video[count:], video[count - 1 : count].repeat(9 - count, 0)
                )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_frame_stops_the_data_for_good(tmp_path, num_workers):
    make_set(tmp_path, {"validation": labelled(1, 9)})
    damaged = tmp_path / "20bn-jester-v1" / "6" / "00002.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    batches = open_split(tmp_path, "validation", **{"dataset.num_workers": num_workers})
    assert ids([next(batches)]) == ["1", "2", "3", "4"]
    for _ in range(3):
        with pytest.raises(ValueError, match=f"cannot read the frame {damaged}") as caught:
            next(batches)
        assert "\n" not in str(caught.value)
    assert batches.get_state()["position"] == 1
    make_clip(tmp_path / "again", 2)
    damaged.write_bytes((tmp_path / "again" / "00002.jpg").read_bytes())
    batches.set_state(batches.get_state())
    assert ids(list(batches)) == ["5", "6", "7", "8", "9"]


def test_an_empty_folder_is_an_error_when_its_clip_is_read(tmp_path):
    make_set(tmp_path, {"validation": labelled(1, 2)})
    for frame in (tmp_path / "20bn-jester-v1" / "2").iterdir():
        frame.unlink()
    with pytest.raises(FileNotFoundError, match="20bn-jester-v1/2 holds no frame"):
        next(open_split(tmp_path, "validation"))


def test_a_stop_iteration_in_reading_does_not_end_the_data(folder, monkeypatch):
    def stop(path, **keys):
        raise StopIteration

    monkeypatch.setattr(transforms, "decode_image", stop)
    batches = open_split(folder, "validation")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"reading the clip '1[2-5]' .* StopIteration"):
            next(batches)


def test_an_interrupt_loses_no_clip(folder, monkeypatch):
    expected = take(open_split(folder), 3)
    batches = open_split(folder)
    first = next(batches)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(type(batches._batches), "__next__", lambda self: interrupt())
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    monkeypatch.undo()
    assert_equal_batches([first, *take(batches, 2)], expected)


def test_a_closed_iterator_says_so(folder):
    batches = open_split(folder)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="train data is closed"):
        next(batches)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dataset.name": "jestr"}, "dataset.name is 'jestr'; choose one of: jester, jester_tfds"),
        ({"dataset.sampling": "tail"}, "dataset.sampling is 'tail'; choose one of: head"),
        ({"dataset.short_clips": "drop"}, "dataset.short_clips is 'drop'; choose one of: repeat"),
        ({"dataset.frame_packing": "bgr"}, "dataset.frame_packing is 'bgr'; choose one of: rgb"),
        ({"dataset.frame_order": "back"}, "dataset.frame_order is 'back'; choose one of: forward"),
        (
            {"dataset.frame_packing": "channel_planes", "dataset.short_clips": "ragged"},
            "channel_planes .*: set dataset.short_clips=repeat_last",
        ),
        (
            {"dataset.cache": True, "dataset.num_workers": 2},
            "set dataset.num_workers=0 or dataset.cache=False",
        ),
        ({"dataset.num_workers": -1}, "dataset.num_workers is -1; expected 0 or more"),
        ({"batch_size": 0}, "batch_size is 0; it counts from 1"),
    ],
)
def test_wrong_keys_are_named(folder, keys, expected):
    with pytest.raises(ValueError, match=expected):
        open_split(folder, **keys)


def test_an_unknown_split_is_named(folder):
    with pytest.raises(ValueError, match="split is 'val'; choose one of: train, validation, test"):
        open_split(folder, "val")


def test_clips_of_other_classes_are_counted(folder, caplog):
    batches = open_split(folder, **{"dataset.classes": ("Thumb Up",)})
    assert batches.num_clips == 4  # 2, 5, 8 and 11
    assert "train.csv: 7 of 11 clips are of other classes than those asked for" in caplog.text


def test_names_that_are_no_utf8_become_text(tmp_path):
    folder = tmp_path / "train" / os.fsdecode(b"t\xeate")
    try:
        write_video(folder / os.fsdecode(b"caf\xe9.avi"), 3, "mpeg4")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such name")
    keys = {"dataset.name": "video_folder", "dataset.classes": (), "batch_size": 1}
    batches = open_split(tmp_path, **keys)
    assert batches.class_names == (r"t\xeate",)
    batch = next(batches)
    assert batch["id"].tolist() == [r"t\xeate/caf\xe9.avi"]
    assert batch["video"].any()
    state = json.loads(json.dumps(batches.get_state()))
    open_split(tmp_path, **keys).set_state(state)


def test_importing_the_room_brings_no_framework():
    script = (
        "import sys, input_pipeline, input_pipeline.jester, input_pipeline.transforms\n"
        "print(sorted({'jax', 'grain', 'torch', 'tensorflow', 'rvit_jax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


PARENT = """
import sys, time, multiprocessing
from input_pipeline import jester, loader
if __name__ == "__main__":
    split = jester.read_split(sys.argv[1], sys.argv[3])
    options = loader.ClipOptions(image_size=8, num_frames=4, training=sys.argv[3] == "train")
    batches = loader.BatchIterator(split, options, batch_size=1, num_workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _parent(folder, tmp_path, seconds, split="train"):
    """Starts a process that reads with two workers, tells their ids, waits and ends."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(seconds), split],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
    )


@pytest.mark.parametrize(("split", "seconds"), [("train", 0), ("validation", 2)])
def test_leaving_python_without_close_is_quiet(folder, tmp_path, split, seconds):
    """In the midst of a pass too, when the workers may have read all there is."""
    parent = _parent(folder, tmp_path, seconds, split)
    _, errors = parent.communicate(timeout=60)
    assert "Exception" not in errors
    assert "leaked" not in errors
    assert parent.returncode == 0


def test_a_worker_that_dies_is_an_error_not_a_wait(folder):
    batches = open_split(folder, **{"dataset.num_workers": 2})
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"died: .* code -9.*set dataset.num_workers lower"):
        take(batches, 20)
    with pytest.raises(RuntimeError, match="a worker process reading the train data died"):
        next(batches)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(folder, tmp_path):
    parent = _parent(folder, tmp_path, 60)
    with parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
