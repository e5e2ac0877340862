"""What evaluation writes beside its record: the answers before the end, pictures and the page."""

import base64
import csv
import html
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from rvit_jax import anytime, evaluate, figures, report
from tests.jester_folder import make_set
from tests.small import saved_model, small_config

# Names that a page, a formula or a path might stumble over.
NAMES = ("Swiping <script>alert(1)</script>", "cost $x_1$ & $y", "Thumb Up", "x" * 90)
CLIPS = [f"{100 + i};{NAMES[i % 3]}" for i in range(17)]


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_set(
        root,
        {"train": CLIPS, "validation": CLIPS, "test": [line.split(";")[0] for line in CLIPS]},
        num_frames=None,
    )
    (root / "annotations" / "jester-v1-labels.csv").write_text("\n".join(NAMES))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As training leaves it: a step, and the run's records."""
    run = tmp_path_factory.mktemp("run")
    records = [
        {"step": step, "loss": 3 / step, "top1": step / 20, "training": {"loss": 2.0, "top1": 0.1}}
        for step in (4, 8)
    ]
    lines = [*map(json.dumps, records), '{"step": 12, "lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    folder = saved_model(run / "checkpoints" / "8", attention="softmax", class_names=NAMES)
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**description, "step": 8}))
    return folder


def config_of(data):
    config = small_config(num_classes=len(NAMES))
    config.dataset.update(data_dir=str(data), classes=(), short_clips="ragged")
    config.batch_size = 4
    return config


def run(data, checkpoint, workdir, split="validation", **dataset):
    config = config_of(data)
    config.dataset.classes = NAMES[:3]
    config.dataset.update(dataset)
    overrides = [f"dataset.{key}" for key in ("short_clips", *dataset)]
    return evaluate.evaluate(config, workdir, split, checkpoint, overrides)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data, checkpoint):
    folder = tmp_path_factory.mktemp("results")
    run(data, checkpoint, folder, frame_order="shuffled")
    run(data, checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def page(workdir):
    return (workdir / "evaluation" / "report.html").read_text()


def images(page: str) -> list[bytes]:
    found = re.findall(r'(?:src|srcset)="data:image/[a-z+]+;base64,([^"]+)"', page)
    return [base64.b64decode(content) for content in found]


def test_the_answers_before_the_end_are_written(workdir):
    folder = workdir / "evaluation"
    record = json.loads((folder / "validation.json").read_text())
    measured = json.loads((folder / "validation_anytime.json").read_text())
    assert measured["by_frame"]["frames"] == [1, 2, 3, 4, 5, 6]
    assert measured["by_frame"]["top1"][-1] == pytest.approx(record["top1"])
    assert measured["area"] == record["anytime_area"]
    assert 0 < record["expected_calibration_error"] < 1
    assert measured["seconds_per_frame"] == pytest.approx(1 / 12)
    for name in ("anytime", "reliability", "calibration_error"):
        with Image.open(folder / f"validation_{name}.png") as image:
            assert image.width > 400
    assert not list(folder.glob(".*"))


def test_the_answer_after_the_last_frame_is_the_clips(workdir, data, checkpoint, monkeypatch):
    """The pass that answers after every frame gives the same as one that answers at the end."""
    every_frame = workdir / "evaluation" / "validation_predictions.csv"
    rows = list(csv.reader(every_frame.open(), delimiter=";"))[1:]
    monkeypatch.setattr(
        evaluate.steps,
        "make_anytime_step",
        lambda graphdef, loss: evaluate.steps.make_eval_step(graphdef, loss, ragged=True),
    )
    record = run(data, checkpoint, workdir / "at_the_end")
    assert "anytime_area" not in record
    at_the_end = workdir / "at_the_end" / "evaluation" / "validation_predictions.csv"
    expected = list(csv.reader(at_the_end.open(), delimiter=";"))[1:]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose(
        [float(row[2]) for row in rows], [float(row[2]) for row in expected], atol=2e-6
    )


def test_the_page_says_what_was_measured(page, workdir):
    record = json.loads((workdir / "evaluation" / "validation.json").read_text())
    text = html.unescape(page).replace("\u00a0", " ")
    assert f"{100 * record['top1']:.2f} %" in text
    assert "17 clips" in text
    assert NAMES[1] in text
    assert "in random order" not in text  # that is the control's own page
    assert "shuffled" in text  # and a row here
    assert '"hidden_size": 16' in text  # the whole config
    assert "jaxlib" in text
    control = (workdir / "evaluation" / "report_shuffled.html").read_text()
    assert "in random order" in control


def test_what_comes_from_data_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_stands_alone(page):
    assert not re.findall(r'(?:src|srcset|href)="(?!data:)', page)
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_worst_clips_are_films_of_their_frames(page, data):
    films = [
        content for content in images(page) if content[:4] == b"RIFF" and b"ANMF" in content[:200]
    ]
    assert len(films) == evaluate.WORST_CLIPS
    clips = re.findall(r'alt="Clip (\d+), (\d+) frames"', page)
    assert len({clip_id for clip_id, _ in clips}) == evaluate.WORST_CLIPS
    for film, (clip_id, num_frames) in zip(films, clips, strict=True):
        with Image.open(io.BytesIO(film)) as image:
            assert getattr(image, "n_frames", 1) == int(num_frames)
        files = len(list((data / "20bn-jester-v1" / clip_id).iterdir()))
        assert int(num_frames) == min(files, 6)


def test_the_worst_are_those_with_the_least_for_the_true_class(workdir, data, checkpoint, page):
    rows = list(
        csv.reader((workdir / "evaluation" / "validation_predictions.csv").open(), delimiter=";")
    )
    wrong = {row[0] for row in rows[1:] if row[1] != row[3]}
    shown = re.findall(r'alt="Clip (\d+),', page)
    # Sure and wrong is worse than right: no right one while there are wrong ones left out.
    assert len(wrong & set(shown)) == min(len(wrong), evaluate.WORST_CLIPS)


def test_a_split_without_labels_has_a_page_too(data, checkpoint, tmp_path):
    record = run(data, checkpoint, tmp_path, "test")
    assert "top1" not in record
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "no labels" in page
    assert "The least certain answers" in page
    assert not (tmp_path / "evaluation" / "test_anytime.json").exists()


def test_scrambled_frames_have_no_answers_before_the_end(data, checkpoint, tmp_path):
    packing = {"frame_packing": "channel_planes", "short_clips": "repeat_last"}
    record = run(data, checkpoint, tmp_path, **packing)
    assert "anytime_area" not in record
    assert "Before the clip is over" not in (tmp_path / "evaluation" / "report.html").read_text()


def test_classes_by_hand():
    confusion = np.array([[8, 2, 0], [1, 1, 3], [0, 0, 0]])
    rows = report._per_class(confusion, ["a", "b", "c"])
    assert [row["name"] for row in rows] == ["b", "a", "c"]
    assert rows[0] == {
        "name": "b",
        "clips": 5,
        "recall": 0.2,
        "precision": pytest.approx(1 / 3),
        "mistaken_for": "c",
        "times": 3,
    }
    assert (rows[2]["recall"], rows[2]["mistaken_for"]) == (None, None)
    pairs = report._confused(confusion, ["a", "b", "c"])
    assert [(p["true"], p["predicted"], p["clips"]) for p in pairs] == [
        ("b", "c", 3),
        ("a", "b", 2),
        ("b", "a", 1),
    ]
    assert pairs[0]["share"] == pytest.approx(0.6)


@pytest.mark.parametrize("count", [2, 27, 61, 400])
def test_confusion_is_drawn_for_any_number_of_classes(count):
    names = [f"$class_{index} {'long ' * (index % 20)}" for index in range(count)]
    confusion = np.random.default_rng(0).integers(0, 9, (count, count))
    svg = figures.as_svg(figures.confusion(confusion, names, figures.DARK))
    assert svg.startswith(b"<?xml")
    assert len(svg) < 3e6


def test_a_figure_is_the_same_file_every_time():
    answers = anytime.Answers.from_probabilities(
        np.random.default_rng(0).dirichlet(np.ones(3), (5, 4)), np.full(5, 4), np.arange(5) % 3
    )
    measured = anytime.measure(answers, 0.1)
    first, second = (figures.as_svg(figures.anytime_curve(measured)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(workdir, width, scheme):
    """No error, nothing fetched, every figure there, nothing wider than the page."""
    chromium = find_chromium()
    if chromium is None:
        assert not os.environ.get("CI"), "CI must have Chromium: see .ci/run"
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    said, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        path = workdir / "evaluation" / "report.html"
        page.goto(path.as_uri())
        page.wait_for_function("[...document.images].every(image => image.complete)")
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        page_width = page.evaluate("document.documentElement.scrollWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shown = page.evaluate("document.querySelector('figure img').currentSrc")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert len(widths) == 6 + evaluate.WORST_CLIPS
    assert min(widths) > 0
    assert page_width <= width
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[scheme]
    colour = {"light": figures.LIGHT, "dark": figures.DARK}[scheme].series[0]
    assert colour in base64.b64decode(shown.partition(",")[2]).decode()


@pytest.mark.parametrize(
    "line",
    [
        "7",
        '{"top1": 0.5}',
        '{"step": 4, "loss": 1.0, "top1": 0.5, "training": null}',
        '{"step": 4, "loss": "low", "top1": 0.5}',
        '{"step": 12, "loss": 1.0, "top1": 0.5}',
        "\udcff",
    ],
)
def test_records_that_are_none_are_left_out(checkpoint, tmp_path, line):
    folder = tmp_path / "run" / "checkpoints" / "8"
    folder.mkdir(parents=True)
    good = '{"step": 8, "loss": 0.4, "top1": 0.6, "training": {"loss": 1.0}}'
    content = f"{line}\n{good}\n".encode(errors="surrogateescape")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
    assert report._training_records(folder, 8) == [json.loads(good)]
    assert report._training_records(tmp_path / "model", 0) == []


def test_other_files_in_the_folder_do_no_harm(data, checkpoint, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for number, text in enumerate(
        ("[]", '{"split": "x", "top1": 0.5, "frame_order": "forward", "step": 3}', "{", "7")
    ):
        (folder / f"other{number}.json").write_text(text)
    run(data, checkpoint, tmp_path)
    assert (folder / "report.html").exists()


def test_what_an_earlier_evaluation_left_goes(data, checkpoint, tmp_path):
    run(data, checkpoint, tmp_path)
    folder = tmp_path / "evaluation"
    assert (folder / "validation_anytime.json").exists()
    overrides = {"sampling": "uniform"}
    config = config_of(data)
    config.dataset.classes = NAMES[:3]
    config.dataset.update(overrides)
    config.views.temporal = 2
    evaluate.evaluate(config, tmp_path, "validation", checkpoint, ["dataset.sampling"])
    left = {file.name for file in folder.glob("validation*")}
    assert left == {"validation.json", "validation_predictions.csv", "validation_confusion.csv"}
