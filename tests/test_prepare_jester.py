"""20BN-Jester in TFDS: the clips of the folders, whatever befalls data and run."""

import concurrent.futures
import gzip
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import jester, jester_dataset_builder, jester_parts, jester_tfds
from input_pipeline.jester_dataset_builder import REPORT_NAME, prepare
from scripts.prepare_jester import main
from tests.jester_folder import labelled, make_clip, make_set
from tests.test_loader import assert_equal_batches, open_split, take

SPLITS = {
    "train": labelled(1, 7)[::-1],  # an order that is neither the archive's nor the numbers'
    "validation": labelled(8, 12),
    "test": ["14", "13"],
}


def every_frame(info):
    return np.arange(info.num_frames)


def pack(frames_dir, to, cuts=(0.3, 0.301), *, order=None, top="20bn-jester-v1"):
    """Writes a folder of clips as parts of a .tar.gz, cut at these shares of its length."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for path in order or sorted(frames_dir.iterdir(), key=lambda p: p.name[::-1]):
            tar.add(path, f"{top}/{path.relative_to(frames_dir)}")
    return write_parts(file.getvalue(), to, cuts)


def write_parts(data, to, cuts):
    to.mkdir(exist_ok=True)
    ends = [0, *(int(share * len(data)) for share in cuts), len(data)]
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        (to / f"20bn-jester-v1-{number:02d}").write_bytes(data[begin:end])
    return to


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder of clips, folder of parts, a set prepared from the parts)."""
    root = tmp_path_factory.mktemp("jester")
    folders = make_set(root / "folders", SPLITS, num_frames=None)
    parts = pack(folders / "20bn-jester-v1", root / "parts")
    shutil.copytree(folders / "annotations", parts / "annotations")
    prepare(parts, root / "prepared")
    return folders, parts, root / "prepared"


def assert_same(prepared, folders, classes=(), splits=SPLITS):
    for split in splits:
        stored = jester_tfds.read_split(prepared, split, classes)
        expected = jester.read_split(folders, split, classes)
        assert (stored.name, stored.ids, stored.class_names) == (
            split,
            expected.ids,
            expected.class_names,
        )
        if expected.labels is None:
            assert stored.labels is None
        else:
            assert stored.labels.dtype == np.int32
            np.testing.assert_array_equal(stored.labels, expected.labels)
        for index, clip_id in enumerate(expected.ids):
            files = jester.frame_files(os.path.join(expected.frames_dir, clip_id))
            frames = stored.read(index, every_frame)
            assert len(frames) == len(files)
            for frame, file in zip(frames, files, strict=True):
                np.testing.assert_array_equal(frame, Image.open(file).convert("RGB"))


@pytest.mark.parametrize(
    ("frames", "labels"), [("20bn-jester-v1", "annotations"), ("video", "label"), (".", ".")]
)
def test_from_folders(tmp_path, frames, labels):
    folders = make_set(tmp_path / "in", SPLITS, frames=frames, labels=labels, num_frames=None)
    report = prepare(folders, tmp_path / "out")
    assert_same(tmp_path / "out", folders)
    assert report["extra_ids"] == report["empty_ids"] == report["odd_ids"] == []


def test_from_parts(data):
    folders, _, prepared = data
    assert_same(prepared, folders)
    assert_same(prepared, folders, ("Thumb Up", "Swiping Left"))


def test_bytes_of_the_files_are_kept(tmp_path):
    """Zeros at the end too, which NumPy's strings would lose."""
    folders = make_set(tmp_path / "in", {"train": ["1;Thumb Up"]})
    file = folders / "20bn-jester-v1" / "1" / "00002.jpg"
    file.write_bytes(file.read_bytes() + b"\0\0")
    prepare(folders, tmp_path / "out")
    builder = jester_dataset_builder.Jester(data_dir=tmp_path / "out")
    (record,) = list(builder.as_data_source("train"))
    assert record["frames"][1] == file.read_bytes()
    assert record["label"] == jester.CLASS_NAMES.index("Thumb Up")


def test_a_split_without_labels_has_label_minus_one(data):
    records = list(jester_dataset_builder.Jester(data_dir=data[2]).as_data_source("test"))
    assert {record["id"] for record in records} == {b"13", b"14"}
    assert [record["label"] for record in records] == [-1, -1]


def test_chosen_frames_threads_and_pickle(data):
    folders, _, prepared = data
    source = jester_tfds.read_split(prepared, "train")
    source.read(0, every_frame)
    copy = pickle.loads(pickle.dumps(source))
    reversed_twice = copy.read(2, lambda info: np.array([1, 0, 1]))
    whole = source.read(2, every_frame)
    for frame, index in zip(reversed_twice, (1, 0, 1), strict=True):
        np.testing.assert_array_equal(frame, whole[index])
    fresh = jester_tfds.read_split(prepared, "train")
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        indices = list(range(7)) * 10
        clips = list(threads.map(lambda i: fresh.read(i, every_frame), indices))
    for index, clip in zip(indices, clips, strict=True):
        np.testing.assert_array_equal(clip, source.read(index, every_frame))
    picked = source.select(["3", "7"])
    assert picked.ids == ("3", "7")
    assert picked.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(picked.read(1, every_frame), source.read(0, every_frame))
    with pytest.raises(ValueError, match="train split has no clip 99"):
        source.select(["99"])
    del folders


def test_reading_needs_no_csv_and_says_what_folders_say(data):
    folders, _, prepared = data
    for arguments in (("train", ("Swiping Lef",)), ("train", ("Thumb Up", "Thumb Up"))):
        with pytest.raises(ValueError, match=r"dataset\.classes") as expected:
            jester.read_split(folders, *arguments)
        with pytest.raises(ValueError, match=r"dataset\.classes") as got:
            jester_tfds.read_split(prepared, *arguments)
        assert str(got.value) == str(expected.value)
    with pytest.raises(ValueError, match="has no clip of Drumming Fingers: take the class out"):
        jester_tfds.read_split(prepared, "train", ("Thumb Up", "Drumming Fingers"))
    with pytest.raises(FileNotFoundError, match=r"python scripts/prepare_jester\.py"):
        jester_tfds.read_split(folders, "train")


def test_a_missing_split_is_named(tmp_path):
    folders = make_set(tmp_path / "in", {"train": labelled(1, 3)})
    prepare(folders, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no split 'test'; splits present: train"):
        jester_tfds.read_split(tmp_path / "out", "test")


def test_limit_and_classes(data, tmp_path):
    _, parts, _ = data
    prepare(parts, tmp_path / "two", limit=2)
    assert jester_tfds.read_split(tmp_path / "two", "train").ids == ("7", "6")
    assert jester_tfds.read_split(tmp_path / "two", "test").ids == ("14", "13")
    prepare(parts, tmp_path / "thumbs", classes=["Thumb Up"])
    thumbs = jester_tfds.read_split(tmp_path / "thumbs", "train", ("Thumb Up",))
    assert thumbs.ids == ("5", "2")  # number % 3 == 2
    assert thumbs.labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match="prepared without Swiping Left, with Thumb Up alone"):
        jester_tfds.read_split(tmp_path / "thumbs", "validation", ("Thumb Up", "Swiping Left"))
    with pytest.raises(ValueError, match="prepared with another limit"):
        prepare(parts, tmp_path / "two", limit=3)
    assert prepare(parts, tmp_path / "two", limit=2)["already_prepared"]


@pytest.mark.parametrize("as_parts", [False, True])
def test_report(tmp_path, as_parts):
    lines = {"train": ["1;Thumb Up", "2;Thumb Up", "3;Swiping Left", "x4;Swiping Left"]}
    folders = make_set(tmp_path / "in", lines, num_frames=3)
    clips = folders / "20bn-jester-v1"
    shutil.rmtree(clips / "1")
    shutil.rmtree(clips / "2")
    (clips / "2").mkdir()
    (clips / "3" / "00002.jpg").unlink()
    (clips / "3" / "._00001.jpg").write_bytes(b"?")
    make_clip(clips / "77", 1)
    make_clip(clips / "no gesture", 1)
    source = pack(clips, tmp_path / "parts") if as_parts else folders
    report = prepare(source, tmp_path / "out", labels=folders / "annotations")
    train = report["splits"]["train"]
    assert train["num_clips"] == 2
    assert train["clips_per_class"] == {"Swiping Left": 2}
    assert train["missing_ids"] == ["1"]
    assert train["frames_per_clip"] == {"min": 2, "median": 2.5, "max": 3}
    assert report["empty_ids"] == ["2"]
    assert report["extra_ids"] == ["77", "no gesture"]
    assert report["odd_ids"] == ["no gesture", "x4"]
    assert report["ids_with_gaps_in_frame_numbers"] == ["3"]
    assert report["num_other_files"] == 1
    written = json.loads((tmp_path / "out/jester/1.0.0" / REPORT_NAME).read_text())
    assert written == {k: v for k, v in report.items() if k != "already_prepared"}
    assert jester_tfds.read_split(tmp_path / "out", "train").ids == ("3", "x4")


def damaged(parts, to, change):
    shutil.copytree(parts, to)
    change(to)
    return to


def cut(number):
    def change(folder):
        file = folder / f"20bn-jester-v1-{number:02d}"
        file.write_bytes(file.read_bytes()[:-20])

    return change


def flip(number, place):
    def change(folder):
        file = folder / f"20bn-jester-v1-{number:02d}"
        content = bytearray(file.read_bytes())
        content[place] ^= 0x10
        file.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(0), r"20bn-jester-v1-00"),
        (cut(1), r"20bn-jester-v1-01"),
        (cut(2), r"ends too early, in 20bn-jester-v1-02.*or parts after it are missing"),
        (flip(2, -6), r"checksum is wrong at its end \(20bn-jester-v1-02\)"),
        (flip(0, 0), r"20bn-jester-v1-00 is damaged near byte 0 \(.*header"),
        (lambda d: (d / "20bn-jester-v1-01").unlink(), r"lacks 20bn-jester-v1-01"),
        (lambda d: (d / "20bn-jester-v1-01").write_bytes(b""), r"v1-01 is empty"),
        (lambda d: (d / "20bn-jester-v1-02").unlink(), r"ends too early, in 20bn-jester-v1-01"),
        (lambda d: (d / "20bn-jester-v1-002").write_bytes(b"?"), r"the same number"),
    ],
)
def test_damaged_parts(data, tmp_path, change, message):
    source = damaged(data[1], tmp_path / "parts", change)
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/jester/*"))


@settings(max_examples=40)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_no_flipped_byte_goes_unseen(data, place, change):
    """zlib's CRC covers every byte of the content, and the header's few matter not to it."""
    whole = b"".join(file.read_bytes() for file in sorted(data[1].glob("20bn-jester-v1-??")))
    place = 10 + place % (len(whole) - 10)
    flipped = bytearray(whole)
    flipped[place] ^= change
    try:
        expected = gzip.decompress(flipped) == gzip.decompress(whole)
    except Exception:
        expected = False
    part = jester_parts.Part("it", len(whole), lambda: io.BytesIO(flipped))
    source = jester_parts.PartsSource([part])
    try:
        for _ in source.clips({"1"}, jester_parts.Findings(), lambda _: None):
            pass
        seen = False
    except ValueError:
        seen = True
    assert seen != expected


def test_an_archive_cut_before_it_was_compressed(data, tmp_path):
    whole = b"".join(file.read_bytes() for file in sorted(data[1].glob("20bn-jester-v1-??")))
    tar = gzip.decompress(whole)
    shutil.copytree(data[1] / "annotations", tmp_path / "parts" / "annotations")
    for changed, message in (
        (tar[: len(tar) // 1024 * 512], "ends without its end mark"),
        (tar + tar, "more data after the end"),
        (b"?" + tar[1:], "no tar header"),
    ):
        write_parts(gzip.compress(changed), tmp_path / "parts", (0.5,))
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "parts", tmp_path / "out")


def test_a_csv_of_other_data(data, tmp_path):
    labels = make_set(tmp_path / "labels", {"train": labelled(1, 3), "test": ["901", "902"]})
    with pytest.raises(ValueError, match="none of the 2 clips of the test CSV \\(901, 902\\)"):
        prepare(data[1], tmp_path / "out", labels=labels)
    assert not list(tmp_path.glob("out/jester/*"))


def test_missing_clips_are_said_at_every_reading(data, tmp_path, caplog, capsys):
    labels = make_set(tmp_path / "labels", {"train": [*labelled(1, 3), "900;Thumb Up"]})
    flags = [f"--source={data[1]}", f"--labels={labels}", f"--data_dir={tmp_path / 'out'}"]
    assert command(capsys, *flags) == (
        0,
        "warning: 1 clips of the CSV files are missing, 0 have no frame; they are left out (see "
        "the report)",
    )
    with caplog.at_level("WARNING"):
        assert jester_tfds.read_split(tmp_path / "out", "train").ids == ("1", "2", "3")
    assert "1 clips of the train CSV were missing or empty" in caplog.text


def test_a_forked_process_reads_on(data):
    source = jester_tfds.read_split(data[2], "train")
    expected = source.read(0, every_frame)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(source.read(0, every_frame), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_content_that_inflates_to_much_more(tmp_path):
    """More than a piece may give at a time: the rest comes with the next call, and none is lost."""
    frames = [b"\xff\xd8" + bytes(3_000_000), os.urandom(900_000), bytes(700_000) + b"!"]
    clip = tmp_path / "clips" / "1"
    clip.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        (clip / f"{number}.jpg").write_bytes(frame)
    parts = jester_parts.find_parts(pack(clip.parent, tmp_path / "parts"))
    source = jester_parts.PartsSource(parts)
    read = []
    (stored,) = source.clips({"1"}, jester_parts.Findings(), read.append)
    assert list(stored.frames) == frames
    assert sum(read) == source.total(()) == sum(part.size for part in parts)


def test_frames_that_lie_apart(data, tmp_path):
    clips = data[0] / "20bn-jester-v1"
    order = [clips / "1" / "00001.jpg", clips / "2", clips / "1" / "00002.jpg"]
    parts = pack(clips, tmp_path / "parts", order=order)
    with pytest.raises(ValueError, match="the clip '1' do not lie together"):
        prepare(parts, tmp_path / "out", labels=data[0])


def test_a_frame_twice_in_the_archive(data, tmp_path):
    clips = data[0] / "20bn-jester-v1"
    parts = pack(clips, tmp_path / "parts", order=[clips / "1", clips / "1" / "00002.jpg"])
    with pytest.raises(ValueError, match=r"20bn-jester-v1/1/00002\.jpg is twice in the archive"):
        prepare(parts, tmp_path / "out", labels=data[0])


def test_a_frame_that_is_a_link(data, tmp_path):
    shutil.copytree(data[0] / "20bn-jester-v1" / "1", tmp_path / "clips" / "1")
    (tmp_path / "clips/1/00009.jpg").hardlink_to(tmp_path / "clips/1/00001.jpg")
    parts = pack(tmp_path / "clips", tmp_path / "parts")
    with pytest.raises(ValueError, match=r"1/0000[19]\.jpg is a link or the like, no file: unpack"):
        prepare(parts, tmp_path / "out", labels=data[0])


def test_a_part_that_still_grows(data):
    first, *rest = jester_parts.find_parts(data[1])
    grown = jester_parts.Part(first.name, first.size - 1, first.open)
    source = jester_parts.PartsSource([grown, *rest])
    clips = source.clips(set(), jester_parts.Findings(), lambda _: None)
    with pytest.raises(ValueError, match=r"v1-00 had .* wait until its download has ended"):
        list(clips)


def test_nothing_of_the_archive_reaches_the_disk(data, tmp_path):
    """Names that lead out of the folder, and links, are named in the report alone."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(data[0] / "20bn-jester-v1" / "1", "20bn-jester-v1/1")
        for name in ("../escaped.txt", str(tmp_path / "absolute.txt")):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"bad"))
        link = tarfile.TarInfo("20bn-jester-v1/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    write_parts(file.getvalue(), tmp_path / "parts", (0.4,))
    make_set(tmp_path / "labels", {"train": ["1;Swiping Right"]})
    report = prepare(tmp_path / "parts", tmp_path / "out", labels=tmp_path / "labels")
    assert report["num_other_files"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"parts", "labels", "out"}
    names = {p.name.split(".")[0] for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"", "dataset_info", "features", "jester-train", "metadata", REPORT_NAME[:-5]}


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=60)
@given(
    members=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=60), st.binary(max_size=1500))),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    step=st.integers(1, 3000),
)
def test_the_tar_reader_agrees_with_pythons(members, kind, step):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, encoding="utf-8") as tar:
        for parts, content in members:
            member = tarfile.TarInfo("a/" + "/".join(parts))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    raw = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    chunks = (raw[i : i + step] for i in range(0, len(raw), step))

    def damaged(reason):
        raise AssertionError(reason)

    stream = jester_parts._TarStream(chunks, damaged)
    assert [(name, stream.read()) for name, _ in stream.members()] == expected


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if we run in the background
sys.path.insert(0, ".")
from input_pipeline import jester_dataset_builder as builder
from rvit_jax.command import start
from scripts.prepare_jester import main
write, calls = builder._Shards.write, []
def stop(self, record):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), int(sys.argv.pop()))
    return write(self, record)
builder._Shards.write = stop
signum = sys.argv[-1]
start(lambda: main(["prepare_jester.py", *sys.argv[1:3]]))
"""


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGINT, 128 + signal.SIGINT),
    ],
)
def test_interrupted_in_the_middle(data, tmp_path, signum, status):
    folders, parts, _ = data
    flags = [f"--source={parts}", f"--data_dir={tmp_path}"]
    command = [sys.executable, "-c", INTERRUPTED, *flags, str(int(signum))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    left = list((tmp_path / "jester").iterdir())
    assert bool(left) == (signum == signal.SIGKILL)  # nobody clears up after that one
    if signum != signal.SIGKILL:
        assert done.stderr.strip().splitlines()[-1].startswith(f"stopped by signal {signum:d}")
    with pytest.raises(FileNotFoundError, match="there is no prepared jester"):
        jester_tfds.read_split(tmp_path, "train")
    assert main(["prepare_jester.py", *flags]) == 0
    assert [p.name for p in (tmp_path / "jester").iterdir()] == ["1.0.0"]
    assert_same(tmp_path, folders)


def test_two_at_once(data, tmp_path):
    with (
        jester_dataset_builder._only_one(tmp_path),
        pytest.raises(ValueError, match="another process is preparing"),
    ):
        prepare(data[1], tmp_path)


def test_shards_and_metadata_that_contradict_each_other(data, tmp_path):
    shutil.copytree(data[2], tmp_path / "set")
    folder = tmp_path / "set/jester/1.0.0"
    metadata = json.loads((folder / "metadata.json").read_text())
    records = metadata["splits"]["train"]["records"]
    records[0], records[1] = records[1], records[0]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    source = jester_tfds.read_split(tmp_path / "set", "train")
    with pytest.raises(ValueError, match=r"is the clip '6'.*where its metadata says '7'"):
        source.read(0, every_frame)
    del records[0]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="lists do not fit together"):
        jester_tfds.read_split(tmp_path / "set", "train")
    (shard,) = folder.glob("jester-validation*")
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 300] ^= 1  # in a JPEG: the rest is mostly padding
    shard.write_bytes(content)
    source = jester_tfds.read_split(tmp_path / "set", "validation")
    with pytest.raises(ValueError, match="cannot read the clip"):
        [source.read(index, every_frame) for index in range(5)]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="is gone"):
        jester_tfds.read_split(tmp_path / "set", "validation").read(0, every_frame)


def test_a_damaged_frame_is_named(tmp_path):
    folders = make_set(tmp_path / "in", {"train": ["5;Thumb Up"]})
    (folders / "20bn-jester-v1/5/00002.jpg").write_bytes(b"")
    report = prepare(folders, tmp_path / "out")
    assert report["ids_with_frames_that_are_no_jpeg"] == ["5"]
    source = jester_tfds.read_split(tmp_path / "out", "train")
    assert len(source.read(0, lambda info: [0])) == 1
    with pytest.raises(ValueError, match=r"frame 2 of 2 of the clip '5' .*the file is empty"):
        source.read(0, every_frame)


def command(capsys, *flags):
    status = main(["prepare_jester.py", *flags])
    return status, capsys.readouterr().err.strip().splitlines()[-1]


def test_exit_statuses(data, tmp_path, capsys, monkeypatch):
    folders, parts, _ = data
    out = f"--data_dir={tmp_path / 'out'}"
    assert command(capsys, out) == (
        2,
        "error: --source is missing: say --source=DIR (--help lists the flags)",
    )
    status, line = command(capsys, f"--sorce={parts}", out)
    assert (status, "sorce" in line) == (2, True)
    status, line = command(capsys, "--source=nowhere", out)
    assert (status, line) == (
        1,
        "error: --source: there is no folder nowhere (--debug shows where)",
    )
    status, line = command(capsys, f"--source={tmp_path}", f"--labels={folders}", out)
    assert status == 1
    assert "holds neither clips nor parts" in line
    status, line = command(capsys, f"--source={parts}", out, "--classes=Thumb Upp")
    assert status == 1
    assert line.startswith("error: --classes: 'Thumb Upp' is no class of this data; did you mean")
    (tmp_path / "file").touch()
    status, line = command(capsys, f"--source={parts}", f"--data_dir={tmp_path / 'file'}")
    assert status == 1
    assert line.startswith("error: --data_dir: cannot make")
    bad = make_set(tmp_path / "bad", {"train": ["1;Thumb Up", "2;Thumb Upp"]})
    status, line = command(capsys, f"--source={parts}", f"--labels={bad}", out)
    assert status == 1
    assert "jester-v1-train.csv:2: unknown label 'Thumb Upp'" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    status, line = command(capsys, f"--source={parts}", out)
    assert status == 1
    assert "0.0 GB free, but about" in line
    assert not (tmp_path / "out/jester").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folders(tmp_path, workers):
    """Bit for bit and in the same order; a position saved with one goes on with the other."""
    root = make_set(
        tmp_path / "data",
        {"train": labelled(1, 11), "validation": labelled(12, 16), "test": ["17", "18"]},
        num_frames=None,
    )
    prepare(root, tmp_path / "tfds")

    def open_set(name, data_dir, split="train"):
        keys = {"dataset.name": name, "dataset.num_workers": workers}
        return open_split(data_dir, split, **keys)

    for split in ("validation", "test"):
        folders = list(open_set("jester", root, split))
        assert_equal_batches(list(open_set("jester_tfds", tmp_path / "tfds", split)), folders)
    folders, shards = open_set("jester", root), open_set("jester_tfds", tmp_path / "tfds")
    assert_equal_batches(take(shards, 5), take(folders, 5))
    shards.set_state(folders.get_state())
    assert_equal_batches(take(shards, 3), take(folders, 3))
    for batches in (folders, shards):
        batches.close()
