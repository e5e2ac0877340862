"""Where a model looks: its attention, laid over the frames of clips, as pictures and films.

Four ways to look, per frame of a clip; the keys are S tokens, the class token and the patches:

    query token         how much a token (the class token, or a patch) reads each key
    state's token       the same for token 0 when its query is made of the state alone, without
                        the frame: what the past looks for
    rollout             the query token's maps through all layers of one frame, identity added for
                        the residual path (Abnaar and Zuidema, 2020); blind to the recurrence
    gradient x attention   how much the weight on a key, in that frame, raised the answer after the
                        clip's last frame: the sum over queries of weight * d logit / d weight,
                        through the recurrence
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import input_pipeline
from rvit_jax import annotate, checkpoint
from rvit_jax.attention import AttentionGate, AttentionMaps
from rvit_jax.evaluate import seconds_per_frame, use_checkpoint_config
from rvit_jax.figures import write_png
from rvit_jax.model import RViT
from rvit_jax.shapes import HostOrDevice, NumFrames, Tokens, Video

HeadMaps = Float[HostOrDevice, "*B T L A S"]

MOST_COLUMNS = 12  # frames in a picture
SMALLEST_TILE, LARGEST_TILE = 96, 224  # pixels a side of a frame in a picture
MOST_PIXELS = 30_000  # a side of a picture; matplotlib draws less than 65,536
FILM_TILE = 240
TOP_K = 5  # classes beside the film
DEFAULT_INTERVAL_S = 0.25  # of a film whose clips differ in it
_SQUARE, _GAP = 16, 8  # the class token's weight beside each map; between tiles
_LEFT, _RIGHT = 124, 124  # room for a row's name, and for its colours
_DPI, _LINE = 100, 18  # of a picture; pixels of a line of text
_WHITE, _DARK, _TEXT = (255, 255, 255), (24, 26, 31), (235, 235, 235)


@struct.dataclass
class Look:
    """What a model answered and where it looked, in B clips or, without B, in one.

    Frames from `num_frames` on mean nothing.

    Attributes:
        logits: after each frame, [B, T, K].
        query: weights with which the query token reads each key, [B, T, L, A, S].
        state: the same for token 0, its query made of the state alone, [B, T, L, A, S].
        rollout: the query token's, [B, T, S]; sums to 1 over the keys.
        gradient: how much the weight on each key raised the logit that was the highest after the
            last real frame, [B, T, L, A, S]; 0 in the frames after it.
    """

    logits: Float[HostOrDevice, "*B T K"]
    query: HeadMaps
    state: HeadMaps
    rollout: Float[HostOrDevice, "*B T S"]
    gradient: HeadMaps


class _Tap:
    """Stands in a block for its attention gate: computes the same, and keeps the maps."""

    def __init__(self, gate: AttentionGate, scale: Array):
        self._gate, self._scale = gate, scale

    def __call__(self, x: Tokens, g: Tokens) -> Tokens:
        gate = self._gate

        def attend(q: Array, k: Array, v: Array) -> Array:
            self.maps = gate.maps(q, k)
            # What the projection of the frame adds to every query, its bias, stays.
            state_q, _, _ = gate.queries_keys_values(jnp.zeros_like(x), g)
            self.state = gate.maps(state_q, k)[:, :, 0]  # [B, A, S]
            return (self.maps * self._scale[:, :, None, :]) @ v

        gate.attend = attend  # type: ignore[method-assign]  # of the copy that is traced
        return gate(x, g)


class Lens:
    """A model's attention, made visible; compiled once per shape of the clips.

    Args:
        model: the model; changing it afterwards changes nothing here.
        query: row and column of the patch whose reading is shown, from the top left; by default
            the class token's.

    Raises:
        ValueError: there is no such patch.
    """

    def __init__(self, model: RViT, query: tuple[int, int] | None = None):
        self._token = query_token(model.num_patches, query)
        self._num_layers, self._num_tokens = len(model.layers), model.num_patches + 1
        self._num_heads = model.layers[0].attention.num_heads
        graphdef, state = nnx.split(model)
        self.leaves, treedef = jax.tree.flatten(state)

        def merge(leaves: list[Array]) -> RViT:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

        self._merge = merge
        self._look = jax.jit(self._differentiate)

    def __call__(self, video: Video, num_frames: NumFrames) -> Look:
        """Looks at clips [B, T, H, W, 3] of which the first `num_frames` [B] are real."""
        return self._look(self.leaves, video, num_frames)

    def ones(self, video: Video) -> Float[Array, "T L B A S"]:
        """The factors on the weights that leave the model as it is."""
        shape = (video.shape[1], self._num_layers, video.shape[0])
        return jnp.ones((*shape, self._num_heads, self._num_tokens))

    def read(
        self, leaves: list[Array], video: Video, scale: Float[Array, "T L B A S"]
    ) -> tuple[Float[Array, "T B K"], dict[str, Array]]:
        """Reads clips with the weight on each key multiplied by `scale`, for every query.

        Returns:
            Logits [T, B, K] after each frame, and, frames first, the maps of `Look`.
        """

        def read_frame(hidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Any]:
            frame, factors = inputs  # [B, H, W, 3], [L, B, A, S]
            model = self._merge(leaves)
            model.eval()
            model.remat = "none"  # the taps' maps must leave the layers; see the scan below
            taps = []
            for layer, factor in zip(model.layers, factors, strict=True):
                taps.append(_Tap(layer.attention, factor))
                layer.attention = taps[-1]  # type: ignore[assignment]  # computes the same
            logits, hidden = model.step(frame, hidden)
            seen = {
                "query": jnp.stack([tap.maps[:, :, self._token] for tap in taps]),
                "state": jnp.stack([tap.state for tap in taps]),
                "rollout": rollout([tap.maps for tap in taps], self._token),
            }
            return hidden, (logits, jax.lax.stop_gradient(seen))

        hidden = self._merge(leaves).initial_hidden(video.shape[0])
        frames = jnp.moveaxis(jnp.asarray(video), 1, 0)
        # The gradient needs every map of every frame: they are computed again on the way back.
        _, seen = jax.lax.scan(jax.checkpoint(read_frame), hidden, (frames, scale))
        return seen

    def _differentiate(self, leaves: list[Array], video: Video, num_frames: NumFrames) -> Look:
        """`read`, and the derivative of the answers' logits by the factors."""

        def highest(scale: Array) -> tuple[Array, Any]:
            logits, seen = self.read(leaves, video, scale)
            last = logits[num_frames - 1, jnp.arange(video.shape[0])]  # [B, K]
            return last.max(-1).sum(), (logits, seen)  # a clip's factors move its own logits alone

        gradient, (logits, seen) = jax.grad(highest, has_aux=True)(self.ones(video))
        clips_first = {name: jnp.moveaxis(seen[name], 2, 0) for name in ("query", "state")}
        return Look(
            logits=jnp.swapaxes(logits, 0, 1),
            rollout=jnp.swapaxes(seen["rollout"], 0, 1),
            gradient=jnp.moveaxis(gradient, 2, 0),
            **clips_first,
        )


def rollout(maps: Sequence[AttentionMaps], token: int) -> Float[Array, "B S"]:
    """The row of `token` of the product over the layers of 0.5 * (identity + mean map).

    The mean over heads is of absolute values, its rows divided by their sums.
    """
    row = jnp.zeros((maps[0].shape[0], maps[0].shape[-1])).at[:, token].set(1.0)  # [B, S]
    for weights in reversed(maps):
        mean = jnp.abs(weights).mean(1)
        mean /= mean.sum(-1, keepdims=True)
        row = 0.5 * (row + jnp.einsum("bq,bqk->bk", row, mean))
    return row


def query_token(num_patches: int, query: tuple[int, int] | None) -> int:
    """The token's index: 0 (the class token) for None, else that of the patch (row, column)."""
    if query is None:
        return 0
    side = math.isqrt(num_patches)
    if len(query) != 2 or not all(0 <= place < side for place in query):
        raise ValueError(
            f"query {tuple(query)}: there is no such patch; rows and columns are 0 to {side - 1}"
        )
    return 1 + query[0] * side + query[1]


def per_head(maps: np.ndarray, kind: str) -> np.ndarray:
    """Weights [..., S] as they are shown: linear attention's rows are divided by their sums."""
    return maps / maps.sum(-1, keepdims=True) if kind == "linear" else maps


def mean_of_heads(maps: np.ndarray, kind: str) -> np.ndarray:
    """Weights [..., A, S] as one map [..., S].

    Re-attention is normalised over the heads, so that their sum says next to nothing of where the
    weight lies: its mean is of absolute values.
    """
    return (np.abs(maps) if kind == "reattention" else per_head(maps, kind)).mean(-2)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of a picture: maps [T, S] in one colour scale, from 0 or around it."""

    name: str
    maps: np.ndarray
    signed: bool = False

    @property
    def limit(self) -> float:
        """Where the colours end: the highest weight on a patch. The class token may have more."""
        return float(np.abs(self.maps[:, 1:]).max()) or 1.0

    def paint(
        self, weights: np.ndarray | np.floating, gray: np.ndarray | float = 0.5
    ) -> np.ndarray:
        """Weights [...] in colours over gray [...] in [0, 1]: uint8 [..., 3]."""
        lowest = -1.0 if self.signed else 0.0
        strength = np.linspace(lowest, 1.0, 256)
        # Where the weight is 0 the frame shows through, dimmed; both colour maps are dark there.
        share = 0.8 * (np.abs(strength) if self.signed else np.sqrt(strength))[:, None]
        colours = colormaps["berlin" if self.signed else "inferno"](np.arange(256))[:, :3]
        index = 255 * (weights / self.limit - lowest) / (1.0 - lowest)
        index = np.round(np.clip(index, 0, 255)).astype(np.uint8)
        dimmed = 0.55 * np.asarray(gray)[..., None]
        painted = 255 * ((share * colours)[index] + (1 - share)[index] * dimmed)
        return painted.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class _Clip:
    """All that is drawn of one clip; T are its real frames."""

    name: str
    frames: np.ndarray  # uint8 [T, H, W, 3]
    interval_s: float | None  # from one frame to the next; None: clips differ
    true: str | None
    class_names: Sequence[str]
    probabilities: np.ndarray  # [T, K]
    look: Look  # of this clip: NumPy arrays, without B
    kind: str
    query: str

    def time(self, t: int) -> str:
        """When frame `t` is, where that is known."""
        return "" if self.interval_s is None else f"{t * self.interval_s:.2f} s"

    @property
    def title(self) -> str:
        """What a picture is of."""
        best = int(self.probabilities[-1].argmax())
        true = "no label" if self.true is None else f"true: {self.true}"
        answer = f"{self.class_names[best]} ({100 * self.probabilities[-1, best]:.1f} %)"
        note = {
            "linear": "linear attention: rows divided by their sums",
            "reattention": "re-attention: may be negative (blue); means are of absolute values",
            "softmax": "softmax attention",
        }[self.kind]
        return f"{self.name}; {true}; predicted: {answer}; {note}; query: {self.query}"

    def layers(self, maps: np.ndarray) -> list[np.ndarray]:
        """[T, S] per layer: the mean over the heads of [T, L, A, S]."""
        return list(np.moveaxis(mean_of_heads(maps, self.kind), 1, 0))

    def gradient(self) -> np.ndarray:
        """[T, S]: what spoke for the answer, over all layers and heads."""
        return np.maximum(self.look.gradient.sum((1, 2)), 0.0)

    def overview(self) -> list[_Row]:
        """The rows of the picture of all layers."""
        rows = [
            _Row(f"layer {index}\n{name}", maps)
            for name, all_maps in (
                ("query token", self.look.query),
                ("state's token", self.look.state),
            )
            for index, maps in enumerate(self.layers(np.asarray(all_maps)))
        ]
        return [
            *rows,
            _Row("rollout", np.asarray(self.look.rollout)),
            _Row("gradient x\nattention", self.gradient()),
        ]

    def heads(self, layer: int) -> list[_Row]:
        """The rows of the picture of one layer's heads."""
        query = np.asarray(self.look.query[:, layer])  # [T, A, S]
        maps = per_head(query, self.kind)
        signed = self.kind == "reattention"
        rows = [_Row(f"head {head}", maps[:, head], signed) for head in range(maps.shape[1])]
        return [*rows, _Row("mean", mean_of_heads(query, self.kind))]


def visualize(
    config: ConfigDict,
    workdir: Path,
    split: str,
    checkpoint_path: str | os.PathLike[str],
    *,
    ids: Sequence[str] = (),
    overrides: Sequence[str] = (),
    query: tuple[int, int] | None = None,
    num_clips: int = 4,
) -> list[Path]:
    """Draws where a checkpoint looks in clips of the config's data set.

    Model, preprocessing and class names are the checkpoint's, the data set is the config's. Files,
    in `WORKDIR/attention_visual/`: `attn_cls_grid/ID.png` (frames by ways to look),
    `head_grid/ID_layerL.png` (frames by heads), `film/ID.mp4`. An id with characters that do not
    belong in a file's name gets others and eight digits.

    Args:
        config: of the run.
        workdir: where the pictures go.
        split: "train", "validation" or "test"; with or without labels.
        checkpoint_path: see `checkpoint.load`.
        ids: these clips of the split; by default its first `num_clips`.
        overrides: see `evaluate.evaluate`.
        query: see `Lens`.
        num_clips: 1 or more.

    Returns:
        The files, clip by clip.

    Raises:
        FileNotFoundError: no checkpoint, no data.
        OSError: the workdir cannot be written.
        ValueError: no such id, patch or number of clips; frames that are no pictures; the
            checkpoint and the config contradict each other.
    """
    checkpoint.check_writable(workdir)
    if num_clips < 1:
        raise ValueError(f"num_clips is {num_clips}; it counts from 1")
    loaded = checkpoint.load(checkpoint_path)
    config = use_checkpoint_config(config, loaded.config, overrides)
    if config.dataset.frame_packing == "channel_planes":
        raise ValueError(
            "dataset.frame_packing=channel_planes: its frames hold colours of other moments, and "
            "what lights up in one would lie elsewhere; attention is drawn for rgb alone"
        )
    lens = Lens(loaded.model.module, query)
    config.batch_size, config.dataset.num_workers, config.dataset.cache = 1, 0, False
    config.views.temporal = config.views.spatial = 1
    dataset = input_pipeline.get_dataset(config, split, ids=tuple(ids), training=False)
    count = len(ids) or min(num_clips, dataset.num_clips)
    bar = tqdm(
        total=count,
        desc=f"drawing {split}",
        unit="clip",
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    paths: list[Path] = []
    with contextlib.closing(dataset), bar:
        for batch in itertools.islice(dataset, count):
            bar.update()
            if not batch["mask"][0]:  # could not be read, and was said so
                continue
            clip = _see(batch, lens, config, loaded.class_names, dataset.class_names, query)
            paths += _draw_clip(clip, Path(workdir) / "attention_visual")
    if not paths:
        raise ValueError(f"none of the {count} clips could be read: see the warnings")
    return paths


def _see(
    batch: dict[str, np.ndarray],
    lens: Lens,
    config: ConfigDict,
    class_names: Sequence[str],
    true_names: Sequence[str],
    query: tuple[int, int] | None,
) -> _Clip:
    """The one clip of a batch, looked at and cut to its real frames."""
    num_frames, label = int(batch["num_frames"][0]), batch["label"][0]
    true = [
        true_names[int(k)] for k in (np.flatnonzero(label) if label.ndim else [label]) if k >= 0
    ]
    multi_label = config.loss.name == "binary_cross_entropy"
    to_probabilities = jax.nn.sigmoid if multi_label else jax.nn.softmax
    look = jax.device_get(lens(batch["video"], batch["num_frames"]))
    look = jax.tree.map(lambda array: array[0, :num_frames], look)
    return _Clip(
        name=str(batch["id"][0]),
        frames=batch["video"][0, :num_frames],
        interval_s=seconds_per_frame(config),
        true=" | ".join(true) or None,
        class_names=class_names,
        probabilities=np.asarray(to_probabilities(look.logits)),
        look=look,
        kind=config.model.attention,
        query="class token" if query is None else f"patch in row {query[0]}, column {query[1]}",
    )


def _draw_clip(clip: _Clip, folder: Path) -> list[Path]:
    """Writes all pictures of a clip, each aside and then renamed."""
    stem = file_stem(clip.name)
    pictures = [(folder / "attn_cls_grid" / f"{stem}.png", clip.title, clip.overview())]
    for layer in range(clip.look.query.shape[1]):
        path = folder / "head_grid" / f"{stem}_layer{layer}.png"
        pictures.append((path, f"{clip.title}; layer {layer}", clip.heads(layer)))
    for path, title, rows in pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw_picture(path, title, clip, rows)
    film = folder / "film" / f"{stem}.mp4"
    film.parent.mkdir(parents=True, exist_ok=True)
    _draw_film(film, clip)
    return [*(path for path, _, _ in pictures), film]


def file_stem(name: str) -> str:
    """`name` as the name of a file, different for different ones."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    if safe == name and name and not name.startswith("."):
        return name
    return f"{safe.lstrip('.')}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def _overlay(
    row: _Row, t: int, frame: np.ndarray, side: int, background: tuple[int, int, int]
) -> np.ndarray:
    """The map of frame `t` over it, beside it the class token's square: uint8 [side, ..., 3]."""
    grid = math.isqrt(row.maps.shape[1] - 1)
    patches = Image.fromarray(row.maps[t, 1:].reshape(grid, grid).astype(np.float32))
    weights = np.asarray(patches.resize((side, side), Image.Resampling.BILINEAR))
    gray = np.asarray(Image.fromarray(frame).convert("L").resize((side, side))) / 255.0
    tile = np.full((side, side + _SQUARE + 2, 3), background, np.uint8)
    tile[:, :side] = row.paint(weights, gray)
    tile[:_SQUARE, side + 2 :] = row.paint(row.maps[t, 0])
    return tile


def _draw_picture(path: Path, title: str, clip: _Clip, rows: Sequence[_Row]) -> None:
    """Writes a PNG: a column per frame, the frame itself and a row of its maps per `rows`."""
    num_frames, size = clip.frames.shape[:2]
    columns = np.linspace(0, num_frames - 1, min(num_frames, MOST_COLUMNS)).round().astype(int)
    side = min(size * math.ceil(SMALLEST_TILE / size), LARGEST_TILE)
    side = min(side, MOST_PIXELS // (len(rows) + 1) - _GAP)
    across, down = side + _SQUARE + 2 + _GAP, side + _GAP
    right = _LEFT + across * len(columns)
    width = max(right + _RIGHT, 640)
    lines = textwrap.wrap(title, (width - 2 * _GAP) // 8)
    top = _LINE * (len(lines) + 3)  # a free line, and two over the frames
    canvas = np.full((top + down * (len(rows) + 1), width, 3), 255, np.uint8)
    texts = [(_GAP, _LINE // 2, "\n".join(lines), {"va": "top"})]
    row_tops = [top + down * number for number in range(1, len(rows) + 1)]
    for x, t in zip(range(_LEFT, right, across), columns.tolist(), strict=True):
        texts.append((x, top - 4, f"frame {t}\n{clip.time(t)}", {"va": "bottom"}))
        frame = Image.fromarray(clip.frames[t]).resize((side, side))
        canvas[top : top + side, x : x + side] = np.asarray(frame)
        for y, row in zip(row_tops, rows, strict=True):
            tile = _overlay(row, t, clip.frames[t], side, _WHITE)
            canvas[y : y + side, x : x + tile.shape[1]] = tile
    for y, row in zip(row_tops, rows, strict=True):
        texts.append((_LEFT - _GAP, y + side // 2, row.name, {"va": "center", "ha": "right"}))
        lowest = -row.limit if row.signed else 0.0
        colours = row.paint(np.linspace(row.limit, lowest, side))[:, None]
        canvas[y : y + side, right : right + 8] = colours
        most = row.maps[np.abs(row.maps[:, 0]).argmax(), 0]
        texts += [
            (right + 12, y, f"{row.limit:.2g}", {"va": "top"}),
            (right + 12, y + side // 2, f"class token\nto {most:.2g}", {"va": "center"}),
            (right + 12, y + side, f"{lowest:.2g}", {"va": "bottom"}),
        ]
    _save_picture(path, canvas, texts)


def _save_picture(
    path: Path, canvas: np.ndarray, texts: Sequence[tuple[int, int, str, dict[str, str]]]
) -> None:
    """Writes a PNG of uint8 [H, W, 3], pixel by pixel, and texts at their (x, y) on it."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.figimage(canvas)  # without axes: these would sample it anew, which takes seconds
    for x, y, text, places in texts:
        readable = os.fsencode(text).decode(errors="replace")
        style: dict[str, Any] = {"fontsize": 9, "linespacing": 1.3, "parse_math": False, **places}
        figure.text(x / width, 1 - y / height, readable, **style)
    write_png(figure, path, dpi=_DPI)


def _draw_film(path: Path, clip: _Clip) -> None:
    """Writes the film: frame, attention and gradient side by side, and the answer so far."""
    mean = _Row("attention, last layer", clip.layers(np.asarray(clip.look.query))[-1])
    gradient = _Row("gradient x attention", clip.gradient())
    film = annotate.Film(path, 1 / (clip.interval_s or DEFAULT_INTERVAL_S))
    try:
        for t, probabilities in enumerate(clip.probabilities):
            best = np.argsort(-probabilities, kind="stable")[:TOP_K]
            top = [(clip.class_names[index], float(probabilities[index])) for index in best]
            caption = f"after frame {t}   {clip.time(t)}"
            film.add(annotate.draw_answer(_film_frame(clip, t, (mean, gradient)), top, caption))
        film.close()
    finally:
        film.discard()


def _film_frame(clip: _Clip, t: int, rows: Sequence[_Row]) -> np.ndarray:
    """Frame `t` and its maps side by side under their names: uint8 [H, W, 3]."""
    tiles = [np.asarray(Image.fromarray(clip.frames[t]).resize((FILM_TILE, FILM_TILE)))]
    tiles += [_overlay(row, t, clip.frames[t], FILM_TILE, _DARK) for row in rows]
    names = ["frame", *(row.name for row in rows)]
    width = sum(tile.shape[1] + _GAP for tile in tiles)
    image = Image.new("RGB", (width, FILM_TILE + 3 * _LINE), _DARK)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    true = "no label" if clip.true is None else f"true: {clip.true}"
    heading = annotate.shortened(draw, f"{clip.name}   {true}", font, width - 2 * _GAP)
    draw.text((_GAP, 6), heading, fill=_TEXT, font=font)
    x = _GAP
    for tile, name in zip(tiles, names, strict=True):
        draw.text((x, _LINE + 12), name, fill=_TEXT, font=font)
        image.paste(Image.fromarray(tile), (x, 3 * _LINE))
        x += tile.shape[1] + _GAP
    return np.asarray(image)
