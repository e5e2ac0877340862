"""Attention pictures: the numbers against hand computations, and what is written."""

import functools

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rvit_jax import visualize
from rvit_jax.config import ATTENTION_KINDS
from rvit_jax.model import CompiledRViT
from tests.jester_folder import CLASSES, labelled, make_set
from tests.small import random_video, saved_model, small_config, small_model

TILE = 96 + 8  # a frame of 16 pixels enlarged, and the gap


REAL = np.array([4, 2])  # frames of the two clips that are looked at


@functools.cache
def looked(kind):
    """A small model of two layers, two clips, and the look at them, as NumPy arrays.

    With softmax the query is a patch, token 3; else the class token.
    """
    query = (1, 0) if kind == "softmax" else None
    model, video = (
        small_model(attention=kind, readout="class_and_hidden_tokens"),
        random_video(2, 4),
    )
    return model, video, jax.device_get(visualize.Lens(model, query)(video, REAL))


def by_hand(model, frame, hidden):
    """Per layer: the gate, its queries, its keys, and the queries of the state alone."""
    x, found = model.embed(frame), []
    for layer, state in zip(model.layers, hidden, strict=True):
        gate, g = layer.attention, layer.norm_hidden(state + model.pos_embedding[...])
        x = x + model.pos_embedding[...]
        q, k, _ = gate.queries_keys_values(layer.norm_input(x), g)
        alone = gate.to_qkv_hidden(g) + gate.to_qkv.bias[...]
        alone = alone[..., : alone.shape[-1] // 3].reshape(*g.shape[:2], gate.num_heads, -1)
        found.append((gate, q, k, jnp.swapaxes(alone, 1, 2)))
        x, _ = layer(x, state + model.pos_embedding[...])
    return found


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_logits_are_the_models(kind):
    model, video, look = looked(kind)
    model = CompiledRViT(model)
    hidden = model.initial_hidden(2)
    for t in range(4):
        logits, hidden = model.step(video[:, t], hidden)
        np.testing.assert_allclose(look.logits[:, t], logits, rtol=1e-5, atol=1e-5)


def test_rematerialised_layers_are_seen_alike():
    looks = []
    for remat in ("dots", "layers"):
        model = small_model(attention="softmax", remat=remat)
        looks.append(jax.device_get(visualize.Lens(model)(random_video(2, 4), REAL)))
    for name in ("logits", "query", "state", "rollout", "gradient"):
        expected, found = (getattr(look, name) for look in looks)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_softmax_maps_by_hand_in_every_frame_and_layer():
    model, video, look = looked("softmax")
    hidden = model.initial_hidden(2)
    for t in range(2):
        for layer, (_, q, k, alone) in enumerate(by_hand(model, video[:, t], hidden)):
            q, k, alone = (np.asarray(array, np.float64) for array in (q, k, alone))
            size = q.shape[-1] ** 0.5
            expected = softmax(np.einsum("bac,bakc->bak", q[:, :, 3], k) / size)
            np.testing.assert_allclose(look.query[:, t, layer], expected, atol=1e-5)
            # Whatever the query, the state's is that of token 0.
            expected = softmax(np.einsum("bac,bakc->bak", alone[:, :, 0], k) / size)
            np.testing.assert_allclose(look.state[:, t, layer], expected, atol=1e-5)
        _, hidden = model.step(video[:, t], hidden)


@pytest.mark.parametrize("kind", ["linear", "reattention"])
def test_other_maps_are_rows_of_the_gates(kind):
    model, video, look = looked(kind)
    for layer, (gate, q, k, alone) in enumerate(
        by_hand(model, video[:, 0], model.initial_hidden(2))
    ):
        np.testing.assert_allclose(look.query[:, 0, layer], gate.maps(q, k)[:, :, 0], atol=1e-4)
        np.testing.assert_allclose(look.state[:, 0, layer], gate.maps(alone, k)[:, :, 0], atol=1e-4)


def test_what_the_state_looks_for_does_not_depend_on_the_frames_own_query():
    """Of the first layer's first frame the class token is a constant: another one changes what it
    asks for, and its own key; the patches' keys stay, and so must their odds for the state."""
    model, other = small_model(attention="softmax"), small_model(attention="softmax")
    other.class_token[...] = 3 * other.class_token[...] + 1

    def odds(model):
        look = visualize.Lens(model)(random_video(2, 1), np.array([1, 1]))
        return [
            maps[:, 0, 0, :, 1:] / maps[:, 0, 0, :, 1:].sum(-1, keepdims=True)
            for maps in (look.state, look.query)
        ]

    (state, query), (other_state, other_query) = odds(model), odds(other)
    np.testing.assert_allclose(state, other_state, atol=1e-6)
    assert np.abs(query - other_query).max() > 1e-2


def test_shown_weights_sum_to_one():
    rows = {kind: looked(kind)[2].query for kind in ATTENTION_KINDS}
    assert np.abs(rows["linear"].sum(-1) - 1).min() > 0.1  # they do not by themselves
    for kind in ("linear", "softmax"):
        shown = visualize.per_head(rows[kind], kind)
        np.testing.assert_allclose(shown.sum(-1), 1, atol=1e-5)
        mean = visualize.mean_of_heads(rows[kind], kind)
        np.testing.assert_allclose(mean, shown.mean(-2), atol=1e-6)
    mixed = rows["reattention"]
    assert (mixed < 0).any()
    assert visualize.per_head(mixed, "reattention") is mixed
    mean = visualize.mean_of_heads(mixed, "reattention")
    np.testing.assert_allclose(mean, np.abs(mixed).mean(-2), atol=1e-6)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_gradient_is_how_the_answer_moves_with_a_weight(kind):
    model, video, look = looked(kind)
    lens = visualize.Lens(model)
    assert np.all(look.gradient[1, 2:] == 0)
    best = look.logits[[0, 1], REAL - 1].argmax(-1)
    ones = np.asarray(lens.ones(video))
    read = jax.jit(lambda scale: lens.read(lens.leaves, video, scale)[0])
    # A factor of 0 is a key that is not there, for every query.
    changed = small_model(attention=kind, readout="class_and_hidden_tokens")
    gate, without = changed.layers[1].attention, ones.copy()
    gate.attend = lambda q, k, v: gate.maps(q, k) @ v.at[:, :, 2].set(0)
    without[0, 1, :, :, 2] = 0
    expected, _ = changed.step(video[:, 0], changed.initial_hidden(2))
    np.testing.assert_allclose(read(without)[0], expected, rtol=1e-4, atol=1e-5)
    for clip, t in ((0, 0), (0, 3), (1, 1)):
        gradient = look.gradient[clip, t]
        assert np.abs(gradient).max() > 1e-4
        layer, head, key = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        answers = []
        for change in (0.01, -0.01):
            scale = ones.copy()
            scale[t, layer, clip, head, key] += change
            answers.append(float(read(scale)[REAL[clip] - 1, clip, best[clip]]))
        slope = (answers[0] - answers[1]) / 0.02
        assert slope == pytest.approx(float(gradient[layer, head, key]), rel=0.03, abs=1e-4)


def test_rollout_by_hand():
    model = small_model(attention="softmax", num_layers=1)
    look = visualize.Lens(model)(random_video(2, 3), np.array([3, 3]))
    identity = np.eye(5)[0]
    expected = 0.5 * identity + 0.5 * look.query[:, :, 0].mean(-2)
    np.testing.assert_allclose(look.rollout, expected, atol=1e-6)
    maps = np.random.default_rng(0).normal(size=(3, 2, 4, 5, 5)).astype(np.float32)
    product = np.eye(5)
    for weights in np.abs(maps).mean(2)[:, 1]:  # of clip 1, from the first layer on
        product = (0.5 * np.eye(5) + 0.5 * weights / weights.sum(-1, keepdims=True)) @ product
    row = visualize.rollout([jnp.asarray(layer) for layer in maps], 3)[1]
    np.testing.assert_allclose(row, product[3], atol=1e-6)


def test_a_map_lies_over_its_place():
    maps = np.zeros((2, 5), np.float32)
    maps[1] = 0.25, 0, 1, 0, 0  # the class token, and the patch at the top right
    row = visualize._Row("", maps)
    black = np.zeros((16, 16, 3), np.uint8)
    tile = visualize._overlay(row, 1, black, 96, (9, 9, 9)).astype(int).sum(-1)
    assert np.unravel_index(tile[:, :96].argmax(), (96, 96)) >= (0, 48)
    assert tile[:24, 72:96].min() > 400
    assert tile[72:, :24].max() == 0
    assert 27 != tile[0, -1] < tile[0, 90]  # the square: fainter, on the background
    assert tile[-1, -1] == 27
    assert visualize._overlay(row, 0, black, 96, (9, 9, 9))[:, :96].max() == 0  # one scale for all
    signed = visualize._Row("", np.array([[0, -1, 1, 0, 0]], np.float32), signed=True)
    red, _, blue = visualize._overlay(signed, 0, black, 96, (9, 9, 9)).astype(int)[5, :96].T
    assert blue[5] > red[5]
    assert red[90] > blue[90]


def test_file_names_are_safe_and_differ():
    assert visualize.file_stem("4") == "4"
    names = ["a/b", "a_b", "a:b", "../b", ".b", "é" * 300, "b" * 300, ""]
    stems = [visualize.file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    for stem in stems:
        assert "/" not in stem
        assert not stem.startswith(".")
        assert 0 < len(stem.encode()) < 120


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos of 2 to 6 frames; the test split has no labels."""
    splits = {
        "train": labelled(1, 3),
        "validation": ["4;Swiping Left", "a:b c;Thumb Up", "6;Swiping Right"],
        "test": ["7", "8"],
    }
    return make_set(tmp_path_factory.mktemp("data"), splits, num_frames=None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model") / "m", attention="softmax")


def config_of(data, **dataset):
    config = small_config()
    config.dataset.update(data_dir=str(data), classes=CLASSES, short_clips="ragged", **dataset)
    return config


def draw(config, workdir, split, checkpoint, *, overrides=("dataset.short_clips",), **options):
    paths = visualize.visualize(config, workdir, split, checkpoint, overrides=overrides, **options)
    folder = workdir / "attention_visual"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(written) == sorted(paths)  # and nothing left aside
    return [str(path.relative_to(folder)) for path in paths]


def files_of(stem):
    return [
        f"attn_cls_grid/{stem}.png",
        f"head_grid/{stem}_layer0.png",
        f"head_grid/{stem}_layer1.png",
        f"film/{stem}.mp4",
    ]


def test_files_of_named_clips(tmp_path, data, checkpoint):
    config = config_of(data)
    names = draw(config, tmp_path, "validation", checkpoint, ids=("6", "a:b c"), query=(0, 1))
    odd = visualize.file_stem("a:b c")
    assert names == files_of("6") + files_of(odd)
    folder = tmp_path / "attention_visual"
    for clip_id, stem in (("6", "6"), ("a:b c", odd)):
        num_frames = len(list((data / "20bn-jester-v1" / clip_id).iterdir()))
        with av.open(str(folder / f"film/{stem}.mp4")) as film:
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
            assert film.streams.video[0].average_rate == 12
        assert len(frames) == num_frames
        # The frame itself, the layers' two maps each, rollout, gradient; and the heads, their mean.
        for name, rows in (("attn_cls_grid", 1 + 2 + 2 + 2), ("head_grid", 1 + 4 + 1)):
            suffix = "_layer1" if name == "head_grid" else ""
            with Image.open(folder / name / f"{stem}{suffix}.png") as image:
                width, height = image.size
                image.load()
            assert (height - rows * TILE) in (4 * 18, 5 * 18, 6 * 18)  # one to three title lines
            assert width == max(124 + num_frames * (TILE + 18) + 124, 640)


def test_first_clips_without_labels(tmp_path, data, checkpoint, monkeypatch):
    texts = []
    monkeypatch.setattr(
        visualize, "_save_picture", lambda path, canvas, words: (texts.append(words), path.touch())
    )
    names = draw(config_of(data), tmp_path, "test", checkpoint, num_clips=1, query=(0, 1))
    assert names == files_of("7")
    words = [text.replace("\n", " ") for _, _, text, _ in texts[0]]
    assert words[0].startswith("7; no label; predicted: class ")
    assert words[0].endswith("softmax attention; query: patch in row 0, column 1")
    rows = ["layer 0 query token", "layer 1 query token", "layer 0 state's token", "rollout"]
    assert {"frame 0 0.00 s", "frame 1 0.08 s", *rows, "gradient x attention"} <= set(words)
    heads = [text for _, _, text, _ in texts[2]]
    assert heads[0].replace("\n", " ").endswith("layer 1")
    assert {"head 0", "head 3", "mean"} <= set(heads)


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("linear", "linear attention: rows divided by their sums"),
        ("reattention", "re-attention: may be negative (blue); means are of absolute values"),
    ],
)
def test_a_long_clip_with_what_its_title_owns_up_to(tmp_path, kind, note, monkeypatch):
    random = np.random.default_rng(0)
    maps = random.uniform(-1 if kind == "reattention" else 0, 1, (30, 2, 4, 5)).astype(np.float32)
    logits = random.normal(size=(30, 5)).astype(np.float32)
    clip = visualize._Clip(
        name="a $name$ with ümlaut",
        frames=random.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8),
        interval_s=0.25,
        true="true class",
        class_names=[f"a class with a rather long name, number {index}" for index in range(5)],
        probabilities=softmax(logits),
        look=visualize.Look(logits, maps, maps, maps[:, 0, 0], maps),
        kind=kind,
        query="class token",
    )
    texts, save = [], visualize._save_picture
    monkeypatch.setattr(
        visualize, "_save_picture", lambda *args: (texts.append(args[2]), save(*args))
    )
    visualize._draw_picture(tmp_path / "picture.png", clip.title, clip, clip.heads(1))
    title = texts[0][0][2].replace("\n", " ")
    assert title.startswith(f"{clip.name}; true: true class; predicted: a class with a rather long")
    assert note in title
    frames = [text.split() for _, _, text, _ in texts[0] if text.startswith("frame ")]
    assert (frames[0], frames[-1], len(frames)) == (
        ["frame", "0", "0.00", "s"],
        ["frame", "29", "7.25", "s"],
        12,
    )
    assert [row.signed for row in clip.heads(1)] == 4 * [kind == "reattention"] + [False]
    with Image.open(tmp_path / "picture.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    last = np.asarray(Image.fromarray(clip.frames[-1]).resize((96, 96)))
    x = 124 + 11 * (TILE + 18)
    top = pixels.shape[0] - 6 * TILE
    np.testing.assert_array_equal(pixels[top : top + 96, x : x + 96], last)


def test_what_cannot_be_drawn_is_named(tmp_path, data, checkpoint):
    config = config_of(data)
    for options, words in (
        ({"ids": ("nowhere",)}, "nowhere"),
        ({"query": (2, 0)}, r"query \(2, 0\).*0 to 1"),
        ({"query": (0, -1)}, r"query \(0, -1\)"),
        ({"num_clips": 0}, "num_clips is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            visualize.visualize(config, tmp_path / "w", "validation", checkpoint, **options)
    config.dataset.update(frame_packing="channel_planes", short_clips="repeat_last")
    overrides = ("dataset.frame_packing", "dataset.short_clips")
    with pytest.raises(ValueError, match="channel_planes"):
        visualize.visualize(config, tmp_path / "w", "validation", checkpoint, overrides=overrides)
    assert not (tmp_path / "w").exists()


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "picture.png"
    path.mkdir()
    with pytest.raises(OSError, match="picture"):
        visualize._save_picture(path, np.zeros((20, 20, 3), np.uint8), [])
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_a_clip_that_cannot_be_read_is_not_drawn(tmp_path, checkpoint):
    root = make_set(tmp_path / "data", {"validation": labelled(1, 2)}, num_frames=3)
    for file in (root / "20bn-jester-v1" / "1").iterdir():
        file.write_bytes(b"no image")
    skipping = {"on_error": "skip"}
    config = config_of(root, **skipping)
    paths = visualize.visualize(config, tmp_path / "w", "validation", checkpoint)
    assert {path.stem.split("_")[0] for path in paths} == {"2"}
    with pytest.raises(ValueError, match="none of the 1 clips could be read"):
        visualize.visualize(config, tmp_path / "w", "validation", checkpoint, ids=("1",))
