"""One order of clips, whatever they lie in and whoever reads them.

Folders, TFDS records, video files and drawn gestures: the batches do not depend on worker
processes, nor on how often the reading began anew, nor on how many processes share them.
"""

import json

import numpy as np
import pytest

from configs.base import get_config
from input_pipeline import gestures, get_dataset
from input_pipeline.jester_dataset_builder import prepare
from tests.jester_folder import CLASSES, labelled, make_set
from tests.test_loader import assert_equal_batches, ids, take
from tests.test_video_files import write_video

KINDS = ("jester", "jester_tfds", "video_folder", "gestures")
IN_BUCKETS = {"dataset.short_clips": "ragged", "dataset.length_buckets": (2, 3)}
NUM_CLIPS = {"train": 11, "validation": 5}  # nothing that 2, 3, 4 or 8 divides
NUM_BATCHES = 26  # of 4 clips: eight epochs of three batches, and two more
PLACES = sorted(np.random.default_rng(0).integers(0, NUM_BATCHES - 2, 20).tolist())


def make_videos(root):
    for split, count in NUM_CLIPS.items():
        for number in range(count):
            name = CLASSES[number % len(CLASSES)]
            frames = 2 + number % 5
            write_video(root / split / name / f"{split}{number}.avi", frames, "mpeg4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each kind lies."""
    root = tmp_path_factory.mktemp("kinds")
    splits = {"train": labelled(1, 11), "validation": labelled(12, 16)}
    make_set(root / "jester", splits, num_frames=None)
    prepare(root / "jester", root / "jester_tfds")
    make_videos(root / "video_folder")
    gestures.generate(
        root / "gestures", classes=CLASSES, **NUM_CLIPS, test=0, num_workers=1, progress=False
    )
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(
    params=[*((name, {}) for name in KINDS), *((name, IN_BUCKETS) for name in KINDS[:3])],
    ids=lambda param: param[0] + (", buckets" if param[1] else ""),
)
def kind(request, folders):
    """Opens a split of one kind: (split, process=(index, count), **config keys) -> batches."""
    name, options = request.param

    def open_split(split="train", *, process=(0, 1), **keys):
        config = get_config()
        config.seed, config.batch_size, config.model.image_size = 3, 4, 8
        config.dataset.update(name=name, data_dir=str(folders[name]), classes=CLASSES, num_frames=4)
        config.dataset.sampling = "random"  # draws must not depend on who reads either
        config.dataset.generate.update(**NUM_CLIPS)
        config.update_from_flattened_dict({**options, **keys})
        return get_dataset(config, split, process_index=process[0], process_count=process[1])

    return open_split


def assert_goes_on(batches, place, expected):
    """From a position as JSON keeps it."""
    state = {**batches.get_state(), "position": place}
    batches.set_state(json.loads(json.dumps(state)))
    assert_equal_batches(take(batches, 2), expected[place : place + 2])
    assert batches.get_state()["position"] == place + 2


def test_a_restored_position_goes_on(kind):
    expected = take(kind(), NUM_BATCHES)
    assert len({tuple(ids([batch])) for batch in expected}) > 20  # an order, and no standstill
    batches = kind()
    for place in reversed(PLACES):
        assert_goes_on(batches, place, expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(kind, workers):
    expected = take(kind(), NUM_BATCHES)
    batches = kind(**{"dataset.num_workers": workers})
    assert_equal_batches(take(batches, NUM_BATCHES), expected)
    for place in PLACES[workers // 2 :: 3]:  # each in turn: together all of them
        assert_goes_on(batches, place, expected)
    batches.close()
    one_pass = list(kind("validation", **{"dataset.num_workers": workers}))
    assert_equal_batches(one_pass, list(kind("validation")))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("processes", "rows"), [(1, 3), (2, 1), (2, 2), (3, 1), (3, 2), (8, 1)])
def test_processes_share_one_order(kind, split, processes, rows):
    """Joined, their slices are one process's batches; an epoch holds each clip once."""
    whole = kind(split, batch_size=processes * rows)
    steps = -(-NUM_CLIPS[split] // (processes * rows))
    assert whole.steps_per_epoch == steps
    shares = [
        take(kind(split, process=(index, processes), batch_size=processes * rows), steps)
        for index in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_equal_batches(joined, take(whole, steps))
    everyone = ids(batch for share in shares for batch in share)
    assert len(everyone) == len(set(everyone)) == NUM_CLIPS[split] == whole.num_clips
