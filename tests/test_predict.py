"""The streaming command, from its arguments to what it prints and writes."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

import rvit_jax
from input_pipeline.transforms import resize_array
from rvit_jax import annotate, predict
from tests.small import saved_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model") / "m", attention="softmax")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (10, 24, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pixels):
    folder = tmp_path_factory.mktemp("frames")
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index + 1:05}.png")
    return folder


def run(capsys, *arguments):
    """Exit status, the JSON lines of standard output (or its text), and standard error."""
    status = predict.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    if "--json" in arguments:
        return status, [json.loads(line) for line in out.splitlines()], err
    return status, out, err


def pipe(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_every_frame_is_answered_as_a_clip_that_ends_there(capsys, checkpoint, folder, pixels):
    status, lines, err = run(
        capsys, "--checkpoint", checkpoint, "--input", folder, "--json", "--top_k", 3
    )
    assert (status, err) == (0, "")
    loaded = rvit_jax.load(checkpoint)
    video = loaded.preprocess(pixels)[None]
    assert [line["frame"] for line in lines[:-1]] == list(range(10))
    assert lines[3]["time_s"] == 0.25  # without a rate of its own: Jester's 12 frames per second
    for line in lines[:-1]:
        logits, _ = loaded.model(video[:, : line["frame"] + 1])
        probabilities = np.exp(logits[0]) / np.exp(logits[0]).sum()
        best = np.argsort(-probabilities)[:3]
        assert [name for name, _ in line["top"]] == [loaded.class_names[index] for index in best]
        assert [p for _, p in line["top"]] == pytest.approx(probabilities[best], abs=1e-5)
    result = lines[-1]
    assert [result["result"], result["probability"]] == lines[-2]["top"][0]
    assert (result["num_frames"], result["num_steps"]) == (10, 10)
    assert 0 < result["ms_per_frame_p50"] <= result["ms_per_frame_p95"]


def test_every_reports_the_first_frame_and_every_nth(capsys, checkpoint, folder):
    _, lines, _ = run(capsys, "--checkpoint", checkpoint, "--input", folder, "--json", "--every", 4)
    assert [line["frame"] for line in lines[:-1]] == [0, 4, 8]
    assert lines[-1]["num_steps"] == 10


def test_a_faster_video_is_read_at_the_rate_of_training(capsys, checkpoint, folder):
    _, lines, _ = run(
        capsys, "--checkpoint", checkpoint, "--input", folder, "--json", "--frame_rate", 24
    )
    assert [line["frame"] for line in lines[:-1]] == [0, 2, 4, 6, 8]
    assert (lines[-1]["num_frames"], lines[-1]["num_steps"]) == (10, 5)
    _, _, err = run(
        capsys, "--checkpoint", checkpoint, "--input", folder, "--json", "--frame_rate", 5
    )
    assert "5 frames per second" in err


def test_several_inputs_are_each_answered_as_if_alone(capsys, checkpoint, folder, tmp_path, pixels):
    short = tmp_path / "short"
    short.mkdir()
    for index in range(4):
        Image.fromarray(pixels[9 - index]).save(short / f"{index}.png")
    inputs = ("--input", folder, "--input", short)
    _, both, _ = run(capsys, "--checkpoint", checkpoint, *inputs, "--json")
    for source in (folder, short):
        _, alone, _ = run(capsys, "--checkpoint", checkpoint, "--input", source, "--json")
        mine = [line for line in both if line["input"] == str(source)]
        assert len(mine) == len(alone)
        for line, expected in zip(mine[:-1], alone[:-1], strict=True):
            assert line["frame"] == expected["frame"]
            assert dict(line["top"]) == pytest.approx(dict(expected["top"]), abs=1e-5)
        assert mine[-1]["num_steps"] == alone[-1]["num_steps"]


def test_raw_frames_from_a_pipe_equal_the_folder(capsys, monkeypatch, checkpoint, folder, pixels):
    _, expected, _ = run(capsys, "--checkpoint", checkpoint, "--input", folder, "--json")
    pipe(monkeypatch, pixels.tobytes())
    raw = ("--input", "-", "--frame_size", "32x24", "--window", 0)
    status, lines, _ = run(capsys, "--checkpoint", checkpoint, *raw, "--json")
    assert status == 0
    assert [line["top"] for line in lines[:-1]] == [line["top"] for line in expected[:-1]]


def test_a_pipe_is_windowed_by_default(capsys, monkeypatch, checkpoint, pixels):
    """The last answer is of the window's frames: what came before them is forgotten."""
    results = []
    for before in (pixels[:5], 255 - pixels[:5]):
        pipe(monkeypatch, np.concatenate([before, pixels]).tobytes())
        arguments = ("--input", "-", "--frame_size", "32x24", "--json")
        _, lines, _ = run(capsys, "--checkpoint", checkpoint, *arguments)
        results.append(lines[-1]["probability"])
    assert results[0] == results[1]


def test_a_saved_state_goes_on(capsys, monkeypatch, checkpoint, tmp_path, pixels):
    raw = ("--input", "-", "--frame_size", "32x24", "--json")
    pipe(monkeypatch, pixels.tobytes())
    _, whole, _ = run(capsys, "--checkpoint", checkpoint, *raw)
    state = ("--state", tmp_path / "state.npz")
    answers = []
    for part in (pixels[:4], pixels[4:]):
        pipe(monkeypatch, part.tobytes())
        _, lines, _ = run(capsys, "--checkpoint", checkpoint, *raw, *state)
        answers += [line["top"] for line in lines[:-1]]
    assert answers == [line["top"] for line in whole[:-1]]


def test_films_pictures_and_events(capsys, checkpoint, folder, tmp_path):
    status, out, err = run(
        capsys,
        *("--checkpoint", checkpoint, "--input", folder, "--frame_rate", 24),
        *("--save", tmp_path / "out.mp4", "--events"),
    )
    assert status == 0
    assert out.splitlines()[-1].startswith("result: class ")
    assert "out.png" in err
    with av.open(str(tmp_path / "out.mp4")) as film:
        assert film.streams.video[0].average_rate == 24
        frames = list(film.decode(video=0))
    assert len(frames) == 10  # all, also those that the model did not read
    assert (frames[0].height, frames[0].width) == (360, 480 + annotate.PANEL_WIDTH)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (1080, 480)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.mp4", "out.png"]


def test_a_terminal_is_drawn_over(capsys, monkeypatch, checkpoint, folder):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = run(capsys, "--checkpoint", checkpoint, "--input", folder, "--top_k", 2)
    assert out.count("\x1b[3A") == 9  # ten blocks of three lines
    assert "█" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "nosuch.mp4"), "nosuch.mp4"),
        (("--input", "{folder}/.."), "holds no images"),
        (("--input", "README.md"), "cannot be read as a video"),
        (("--input", "docs/attention.jpg"), "cannot be read as a video: it is one image; expected"),
        (("--input", "camera:4321"), "absent"),
        (("--input", "{folder}", "--checkpoint", "nowhere"), "nowhere"),
        (("--input", "{folder}", "--save", "{tmp}/none/o.mp4"), "no folder"),
        (("--input", "x.mp4", "--save", "{tmp}/o.txt"), "o.txt: films"),  # before it is looked for
        (("--input", "{folder}", "--save", "{folder}"), "folder"),
        (("--input", "{folder}", "--state", "{tmp}/none/s"), "no folder"),
    ],
)
def test_one_line_for_what_cannot_be(capsys, checkpoint, folder, tmp_path, arguments, message):
    filled = [argument.format(folder=folder, tmp=tmp_path) for argument in arguments]
    status, out, err = run(capsys, "--checkpoint", checkpoint, *filled)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "-"), "--input=-: raw frames need --frame_size"),
        (("--input", "-", "--input", "-", "--frame_size", "3x4"), "one input only"),
        (("--input", "x", "--frame_size", "3x4"), "--frame_size is for raw frames"),
        (("--input", "x", "--states", "4"), "--states=4 is for a window, and there is none"),
        (("--input", "-", "--frame_size", "3x4", "--window", "0", "--states", "4"), "say --window"),
        (("--input", "x", "--window", "3", "--states", "4"), "--states=4 is more than --window=3"),
        (("--input", "rtsp://camera/s"), "ffmpeg -i rtsp://camera/s -f rawvideo -pix_fmt rgb24"),
    ],
)
def test_one_line_for_flags_that_contradict_each_other(capsys, checkpoint, arguments, message):
    status, out, err = run(capsys, "--checkpoint", checkpoint, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_states_within_a_window_are_no_mistake(capsys, checkpoint, folder):
    window = ("--window", 4, "--states", 2, "--decay", 1)
    assert run(capsys, "--checkpoint", checkpoint, "--input", folder, *window)[0] == 0


def test_a_folder_of_films_names_one(capsys, checkpoint, tmp_path):
    (tmp_path / "b.MP4").touch()
    (tmp_path / "a.avi").touch()
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--input", tmp_path)
    assert status == 1
    assert f"it holds video files: name one, such as {tmp_path}/a.avi" in err


@pytest.mark.parametrize(
    "argument", ["--top_k=0", "--every=x", "--frame_size=3x", "--windoww=1", "--decay=2"]
)
def test_wrong_arguments(capsys, checkpoint, argument):
    with pytest.raises(SystemExit) as stop:
        predict.main(["--checkpoint", str(checkpoint), "--input", "x", argument])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert argument.split("=")[0] in err
    assert err.count("\n") == 1  # and no usage before it


def write_film(path, pixels, size=(32, 24)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_film_cut_short_gives_its_result_and_a_warning(capsys, checkpoint, tmp_path, pixels):
    film = write_film(tmp_path / "a.avi", np.tile(pixels, (6, 1, 1, 1)))
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    status, lines, err = run(capsys, "--checkpoint", checkpoint, "--input", film, "--json")
    assert status == 0
    assert 0 < lines[-1]["num_frames"] < 60
    assert err.startswith(f"warning: {film}: ")
    assert "cut short" in err


def test_a_failed_run_leaves_an_earlier_film_alone(capsys, checkpoint, tmp_path, pixels):
    frames = tmp_path / "frames"
    frames.mkdir()
    for index, image in enumerate(pixels[:4]):
        Image.fromarray(image).save(frames / f"{index}.png")
    (frames / "3.png").write_bytes(b"broken")
    earlier = tmp_path / "o.mp4"
    earlier.write_bytes(b"precious")
    arguments = ("--checkpoint", checkpoint, "--input", frames, "--save", earlier)
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert "3.png" in err
    assert earlier.read_bytes() == b"precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frames", "o.mp4"]


def test_an_input_is_not_written_over(capsys, checkpoint, tmp_path, pixels):
    film = write_film(tmp_path / "a.mp4", pixels)
    before = film.read_bytes()
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--input", film, "--save", film)
    assert (status, film.read_bytes()) == (1, before)
    assert "would be replaced" in err


def test_curves_stay_bounded():
    curves = annotate.Curves(("a", "b"))
    for t in range(5 * annotate.CURVE_POINTS):
        curves.add(float(t), np.array([0.5, 0.5]))
    assert len(curves._times) <= annotate.CURVE_POINTS
    assert curves._times[0] == 0.0
    assert np.unique(np.diff(curves._times)).tolist() == [8.0]


def test_scrambled_frames_cannot_stream(capsys, folder, tmp_path):
    broken = saved_model(tmp_path / "m")
    description = json.loads((broken / "model.json").read_text())
    description["config"]["dataset"]["frame_packing"] = "channel_planes"
    (broken / "model.json").write_text(json.dumps(description))
    status, _, err = run(capsys, "--checkpoint", broken, "--input", folder)
    assert status == 1
    assert "channel_planes" in err


def started(checkpoint, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "rvit_jax.predict", "--checkpoint", str(checkpoint)]
    command += ["--input", "-", "--frame_size", "32x24", *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_endless_stream_with_its_result(checkpoint, pixels, tmp_path, signum):
    process = started(checkpoint, "--json", "--state", tmp_path / "state.npz")
    process.stdin.write(pixels.tobytes())
    process.stdin.flush()
    for _ in range(10):
        assert json.loads(process.stdout.readline())["top"]
    process.send_signal(signum)  # it waits for a frame
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert json.loads(out)["num_steps"] == 10
    assert err == b""
    assert (tmp_path / "state.npz").exists()


def test_a_reader_that_has_enough_is_no_error(checkpoint, pixels):
    process = started(checkpoint, "--json")
    process.stdin.write(pixels.tobytes())
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # it need not read on
        process.stdin.write(pixels.tobytes() * 20)
        process.stdin.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


@pytest.mark.skipif(not os.environ.get("RVIT_VIDEOS"), reason="RVIT_VIDEOS names no folder")
def test_real_videos(capsys, checkpoint):
    """Every video in the folder RVIT_VIDEOS: as many frames as FFmpeg decodes."""
    files = [f for f in os.scandir(os.environ["RVIT_VIDEOS"]) if f.name.endswith((".mp4", ".avi"))]
    assert files
    for file in files:
        with av.open(file.path) as container:
            count = sum(1 for _ in container.decode(video=0))
        _, lines, _ = run(capsys, "--checkpoint", checkpoint, "--input", file.path, "--json")
        assert lines[-1]["num_frames"] == count


def test_an_input_that_fails_amid_its_frames_does_not_end_the_others(
    capsys, checkpoint, folder, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "00004.png").write_bytes(b"not an image")
    status, lines, err = run(
        capsys, "--checkpoint", checkpoint, "--input", broken, "--input", folder, "--json"
    )
    assert status == 1
    assert "cannot read the frame" in err
    assert "00004.png" in err
    results = {line["input"]: line["num_frames"] for line in lines if "result" in line}
    assert results == {str(broken): 3, str(folder): 10}


@pytest.mark.parametrize(("key", "value"), [("resize", "short_side"), ("decoder", "fast")])
def test_frames_become_squares_as_in_training(capsys, tmp_path, folder, pixels, key, value):
    """A model that saw the middle of each frame is shown the middle."""
    checkpoint = saved_model(tmp_path / "m", attention="softmax")
    description = json.loads((checkpoint / "model.json").read_text())
    description["config"]["dataset"][key] = value
    (checkpoint / "model.json").write_text(json.dumps(description))
    loaded = rvit_jax.load(checkpoint)
    side = loaded.config.model.image_size
    options = {"short_side": {"how": value}, "fast": {"decoder": value}}[value]
    expected = np.stack([resize_array(frame, side, **options) for frame in pixels])
    video = loaded.preprocess(pixels)
    np.testing.assert_allclose(video, expected / 127.5 - 1, atol=1e-6)
    _, lines, _ = run(capsys, "--checkpoint", checkpoint, "--input", folder, "--json")
    logits = np.asarray(loaded.model(video[None])[0])[0]
    probability = np.exp(logits.max()) / np.exp(logits).sum()
    assert lines[-1]["probability"] == pytest.approx(probability, abs=1e-5)


def test_a_picture_is_not_put_among_the_frames(capsys, checkpoint, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "frames")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    film = folder / f"{min(before).partition('.')[0]}.mp4"  # its picture has a frame's name
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--input", folder, "--save", film)
    assert status == 1
    assert "would become a frame of the input, or replace one" in err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_input_under_another_name_is_not_written_over(
    capsys, checkpoint, tmp_path, pixels, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    film = write_film(tmp_path / "a.mp4", pixels)
    before = film.read_bytes()
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--input", film, "--save", "~/a.mp4")
    assert status == 1
    assert "is an input, and would be replaced" in err
    assert film.read_bytes() == before


@pytest.mark.parametrize("state", ["o.mp4", "o.png"])
def test_two_outputs_are_not_one_file(capsys, checkpoint, tmp_path, folder, state):
    outputs = ("--save", tmp_path / "o.mp4", "--state", tmp_path / state)
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--input", folder, *outputs)
    assert status == 1
    assert "is to hold two things" in err
    assert not list(tmp_path.iterdir())
