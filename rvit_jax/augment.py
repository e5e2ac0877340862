"""Changes training clips at random on the device, inside the training step.

Every change is drawn once per clip and shared by all its frames. The draws depend on the key alone,
so a resumed run makes the same ones; each kind of change has a stream of its own, so that switching
one on leaves the others' draws as they were. What is off adds no operation to the program. Nothing
here loops over clips or branches on one: a batch that is spread over devices stays there, except
that mixup and cutmix fetch their partners.

The order: flip, crop and scale, colour, RandAugment, erasing, mixup and cutmix. Between the flip
and the end, videos are float32 "levels" in [0, 255] with the colours ahead of the frames: rows of
pixels then lie together in memory, which makes most changes several times faster. What a change
uncovers is filled with grey (127.5), which the model sees as 0.

The changes in time, which are a matter of indices, are in `input_pipeline.label_maps`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from input_pipeline import label_maps
from rvit_jax.shapes import HostOrDevice, Mask, NumFrames, PRNGKey, Video

Label = Int[HostOrDevice, "B"] | Float[HostOrDevice, "B K"]
Levels = Float[Array, "B 3 T H W"]  # 0 to 255
ClipLevels = Float[Array, "3 T H W"]  # 0 to 255
Real = Bool[Array, "B T"]  # the frames of real clips that hold a picture
PerClip = Float[Array, "B"]
Boxes = Float[Array, "B 4"]  # top, left, height, width: shares of the frame
Partners = Int[Array, "B"]  # rows of the batch
RealFrames = Bool[Array, "T"]  # of one clip
Ops = Int[Array, "n"]  # of one clip, from RAND_AUGMENT_OPS
Colour = Float[Array, "3"]
Strengths = Float[Array, "n"]  # of one clip's operations: -1 to 1
Augment = Callable[[PRNGKey, Video, Label, Mask, NumFrames], tuple[Video, Label]]

_GREY = 127.5
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow's and torchvision's
_ERASED_ASPECT = (0.3, 1 / 0.3)  # of erased rectangles, as in the paper (arXiv:1708.04896)
# Of each kind of change, apart from the dropout that may be drawn from the same key.
_FLIP, _CROP, _COLOUR, _RAND, _ERASE, _MIX = range(0x61756701, 0x61756707)

# RandAugment (arXiv:1909.13719): its operations and their strength at magnitude 10. "Equalize" is
# left out: a histogram of every clip costs more than all the others together.
RAND_AUGMENT_OPS = (
    "identity",
    "autocontrast",
    "posterize",
    "solarize",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_SHARPNESS = RAND_AUGMENT_OPS.index("sharpness")
_NUM_POINTWISE = RAND_AUGMENT_OPS.index("rotate")  # from here on they move pixels
_MAX_MAGNITUDE = 10.0
_MAX_ROTATION = math.radians(30)
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.45  # of the side
_MAX_BLEND = 0.9  # colour, contrast, brightness, sharpness: factors 1 - 0.9 to 1 + 0.9
_MAX_POSTERIZED_BITS = 4  # taken from 8


def make_augment(config: ConfigDict, class_names: Sequence[str]) -> Augment:
    """The function that `config.dataset.augment` asks for; with all off it returns what it gets.

    It maps (key, video [B,T,H,W,3], label [B] or [B,K], mask [B], num_frames [B]) to (video,
    label). The video keeps its dtype: uint8, or floats in [-1, 1]. Rows with mask False and frames
    from `num_frames` on stay as they are, bit for bit. With mixup or cutmix the label becomes the
    target distribution, float32 [B, K]; without, it keeps its kind.

    Args:
        config: the whole config; `dataset.augment` (but for the changes in time),
            `dataset.short_clips`, `dataset.frame_packing` and `model.num_classes` are read.
        class_names: in index order.

    Raises:
        ValueError: a value cannot be; the message names its key. Or clips are to be flipped, and
            what class they are then is unknown (see `input_pipeline.label_maps.mirror_map`).
    """
    options = config.dataset.augment
    check_options(config)
    flips = options.horizontal_flip > 0
    class_map = _mirror_map(options, class_names) if flips else None
    changes = _level_changes(options)
    mixes = options.mixup_alpha > 0 or options.cutmix_alpha > 0
    ragged = config.dataset.short_clips == "ragged"

    def augment(
        key: PRNGKey, video: Video, label: Label, mask: Mask, num_frames: NumFrames
    ) -> tuple[Video, Label]:
        if not (flips or changes or mixes):
            return video, label
        given = video
        real = (jnp.arange(video.shape[1]) < num_frames[:, None]) & mask[:, None]  # [B, T]
        if class_map is not None:
            key_flip = jax.random.fold_in(key, _FLIP)
            video, label = _flip(key_flip, video, label, class_map, options.horizontal_flip)
        if changes or mixes:
            levels = _to_levels(video)
            for stream, change in changes:
                levels = change(jax.random.fold_in(key, stream), levels, real)
            if mixes:
                target = _as_target(label, config.model.num_classes)
                key_mix = jax.random.fold_in(key, _MIX)
                frames = num_frames if ragged else None
                levels, label = _mix(key_mix, levels, target, mask, frames, options)
            video = _from_levels(levels, video.dtype)
        return jnp.where(real[:, :, None, None, None], video, given), label

    return augment


def check_options(config: ConfigDict) -> None:
    """Checks every key of `config.dataset.augment` that this module reads.

    Raises:
        ValueError: a value cannot be, or does not go together with `dataset.frame_packing`.
    """
    options = config.dataset.augment
    prefix = "dataset.augment."
    crop, colour, rand = options.random_resized_crop, options.colour_jitter, options.rand_augment
    for key, value, low, high in (
        ("horizontal_flip", options.horizontal_flip, 0, 1),
        ("random_erasing.probability", options.random_erasing.probability, 0, 1),
        ("colour_jitter.hue", colour.hue, 0, 0.5),
        ("colour_jitter.brightness", colour.brightness, 0, math.inf),
        ("colour_jitter.contrast", colour.contrast, 0, math.inf),
        ("colour_jitter.saturation", colour.saturation, 0, math.inf),
        ("rand_augment.magnitude", rand.magnitude, 0, _MAX_MAGNITUDE),
        ("rand_augment.num_ops", rand.num_ops, 0, math.inf),
        ("mixup_alpha", options.mixup_alpha, 0, math.inf),
        ("cutmix_alpha", options.cutmix_alpha, 0, math.inf),
    ):
        if not low <= value <= high:
            raise ValueError(f"{prefix}{key} is {value}; expected {low} to {high}")
    for key, value, high in (
        ("random_resized_crop.scale", crop.scale, 1.0),
        ("random_resized_crop.aspect", crop.aspect, math.inf),
        ("scale_jitter", options.scale_jitter, math.inf),
        ("random_erasing.area", options.random_erasing.area, 1.0),
    ):
        if len(value) != 2 or not 0 < value[0] <= value[1] <= high or value[1] == math.inf:
            limit = f" <= {high:g}" if high < math.inf else ""
            raise ValueError(
                f"{prefix}{key} is {tuple(value)}; expected (lowest, highest) with "
                f"0 < lowest <= highest{limit}"
            )
    coloured = [key for key in ("brightness", "contrast", "saturation", "hue") if colour[key]]
    if config.dataset.frame_packing == "channel_planes" and (coloured or rand.num_ops):
        raise ValueError(
            f"{prefix}{'colour_jitter.' + coloured[0] if coloured else 'rand_augment.num_ops'} "
            "needs the three colours of one moment, but dataset.frame_packing=channel_planes mixes "
            "moments: set it to 0, or dataset.frame_packing=rgb"
        )


def _mirror_map(options: ConfigDict, class_names: Sequence[str]) -> np.ndarray:
    class_map = label_maps.mirror_map(class_names, options.mirror_classes)
    if np.all(class_map == label_maps.NEVER):
        raise ValueError(
            "dataset.augment.horizontal_flip: the mirror image of no class is among the chosen "
            f"ones ({', '.join(class_names)}): add their partners to dataset.classes, or set "
            "it to 0"
        )
    return class_map


def _level_changes(options: ConfigDict) -> list[tuple[int, Callable[..., Array]]]:
    """(stream, function of key, levels and real frames) of every change that is on, in order."""
    crop, colour = options.random_resized_crop, options.colour_jitter
    strengths = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
    changes = []
    if any(tuple(pair) != (1.0, 1.0) for pair in (crop.scale, crop.aspect, options.scale_jitter)):
        changes.append(
            (
                _CROP,
                lambda key, levels, real: _resample(
                    levels,
                    _draw_boxes(key, len(levels), crop.scale, crop.aspect, options.scale_jitter),
                ),
            )
        )
    if any(strengths):
        changes.append(
            (_COLOUR, lambda key, levels, real: _colour_jitter(key, levels, real, strengths))
        )
    if options.rand_augment.num_ops:
        num_ops, magnitude = options.rand_augment.num_ops, options.rand_augment.magnitude
        changes.append(
            (_RAND, lambda key, levels, real: _rand_augment(key, levels, real, num_ops, magnitude))
        )
    if options.random_erasing.probability:
        erasing = options.random_erasing
        changes.append(
            (
                _ERASE,
                lambda key, levels, real: _erase(key, levels, erasing.probability, erasing.area),
            )
        )
    return changes


def _to_levels(video: Video) -> Levels:
    levels = jnp.moveaxis(jnp.asarray(video, jnp.float32), -1, 1)
    return levels if video.dtype == jnp.uint8 else (levels + 1) * 127.5


def _from_levels(levels: Levels, dtype: jnp.dtype) -> Array:
    """Video [B, T, H, W, 3] of a dtype that `_to_levels` takes; clipped to its range."""
    levels = jnp.moveaxis(levels, 1, -1)
    if dtype == jnp.uint8:
        return jnp.round(jnp.clip(levels, 0, 255)).astype(dtype)
    return jnp.clip(levels / 127.5 - 1, -1, 1).astype(dtype)


def _per_clip(values: Array) -> Array:
    """[B] -> [B, 1, 1, 1, 1], to go with a video."""
    return values[:, None, None, None, None]


def _log_uniform(key: PRNGKey, shape: tuple[int, ...], limits: Sequence[float]) -> Array:
    low, high = (math.log(limit) for limit in limits)
    return jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))


# ---- flip ----


def _flip(
    key: PRNGKey, video: Video, label: Label, class_map: np.ndarray, probability: float
) -> tuple[Array, Array]:
    """Mirrors clips whose mirrored class there is, and gives them that class."""
    present = class_map != label_maps.NEVER  # [K]
    if label.ndim == 1:
        can = (label >= 0) & jnp.asarray(present)[jnp.maximum(label, 0)]
        mirrored = jnp.asarray(class_map)[jnp.maximum(label, 0)].astype(label.dtype)
    else:
        can = ~((label > 0) & ~present).any(-1)
        # Column k goes to column class_map[k]. Those without a place are 0 wherever `can`.
        moves = np.zeros((len(class_map), len(class_map)), np.float32)
        moves[np.flatnonzero(present), class_map[present]] = 1
        mirrored = jnp.matmul(label, moves, precision="highest").astype(label.dtype)
    flip = jnp.logical_and(can, jax.random.bernoulli(key, probability, can.shape))
    label = jnp.where(flip if label.ndim == 1 else flip[:, None], mirrored, label)
    return jnp.where(_per_clip(flip), video[:, :, :, ::-1], video), label


# ---- crop and scale ----


def _draw_boxes(
    key: PRNGKey,
    num_clips: int,
    scale: Sequence[float],
    aspect: Sequence[float],
    zoom: Sequence[float],
) -> Boxes:
    """Random boxes; those of a zoom below 1 may reach beyond the frame.

    Args:
        key: of the draws.
        num_clips: B.
        scale: share of the frame's area, lowest and highest.
        aspect: width over height, lowest and highest; where the box would not fit, it is cut.
        zoom: how much larger things are then shown, about a random point: lowest and highest.
    """
    keys = jax.random.split(key, 5)
    area = jax.random.uniform(keys[0], (num_clips,), minval=scale[0], maxval=scale[1])
    ratio = _log_uniform(keys[1], (num_clips,), aspect)
    sides = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=-1)), 1)  # [B, 2]
    corner = jax.random.uniform(keys[2], (num_clips, 2)) * (1 - sides)
    zoomed = sides / _log_uniform(keys[3], (num_clips, 1), zoom)
    corner += jax.random.uniform(keys[4], (num_clips, 2)) * (sides - zoomed)
    return jnp.concatenate([corner, zoomed], axis=-1)


def _resample(levels: Levels, boxes: Boxes) -> Levels:
    """Shows each clip's box at the size of the frame: linear, smoothed where it shrinks.

    Rows and columns are resampled by one matrix product each, without gathers.
    """
    height, width = levels.shape[-2:]

    def resample_clip(clip: ClipLevels, box: Float[Array, "4"]) -> Array:
        scale = 1 / box[2:]
        translation = -box[:2] * scale * jnp.array([height, width])
        # Outside of the frame it puts 0, which the shift makes grey.
        return jax.image.scale_and_translate(
            clip - _GREY, clip.shape, (2, 3), scale, translation, method="linear", antialias=True
        )

    return jax.vmap(resample_clip)(levels, boxes) + _GREY


# ---- colour; `clip` is one clip's levels, so that its frames share the statistics ----


def _blend(base: Array, clip: Array, factor: Array) -> Array:
    return jnp.clip(base + factor * (clip - base), 0, 255)


def _grey(clip: ClipLevels) -> Float[Array, "T H W"]:
    return _LUMA[0] * clip[0] + _LUMA[1] * clip[1] + _LUMA[2] * clip[2]


def _mean_grey(clip: ClipLevels, real: RealFrames) -> Float[Array, ""]:
    """Of the clip's real frames."""
    per_frame = jnp.where(real, clip.mean((2, 3)), 0)  # [3, T]
    return (_LUMA * per_frame.sum(1)).sum() / jnp.maximum(real.sum(), 1)


def _brightness(clip: ClipLevels, factor: Array) -> Array:
    return _blend(jnp.zeros(()), clip, factor)


def _contrast(clip: ClipLevels, factor: Array, real: RealFrames) -> Array:
    """Away from, or towards, the mean grey of the clip's real frames."""
    return _blend(_mean_grey(clip, real), clip, factor)


def _saturation(clip: ClipLevels, factor: Array) -> Array:
    return _blend(_grey(clip), clip, factor)


def _hue(clip: ClipLevels, shift: Array) -> Array:
    """Turns the hue by `shift` of a full circle; value and saturation (HSV) stay."""
    red, green, blue = clip
    value = clip.max(0)
    chroma = value - clip.min(0)
    safe = jnp.where(chroma > 0, chroma, 1)
    hue = jnp.where(  # 0 to 6: red, yellow, green, cyan, blue, magenta
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    # A colour falls from `value` by `chroma` as the hue leaves its third of the circle.
    shifted = []
    for phase in (5, 3, 1):
        place = hue + 6 * shift + phase
        place -= 6 * jnp.floor(place / 6)  # jnp.mod takes ten times as long
        shifted.append(value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1))
    return jnp.stack(shifted)


def _colour_jitter(key: PRNGKey, levels: Levels, real: Real, strengths: Sequence[float]) -> Levels:
    """Brightness, contrast, saturation and hue, in this order, each by a random amount."""
    keys = jax.random.split(key, 4)
    shape = (len(levels),)

    def factor(key: PRNGKey, strength: float) -> PerClip:
        low = max(0.0, 1 - strength)
        return jax.random.uniform(key, shape, minval=low, maxval=1 + strength)

    brightness, contrast, saturation, hue = strengths
    if brightness:
        levels = jax.vmap(_brightness)(levels, factor(keys[0], brightness))
    if contrast:
        levels = jax.vmap(_contrast)(levels, factor(keys[1], contrast), real)
    if saturation:
        levels = jax.vmap(_saturation)(levels, factor(keys[2], saturation))
    if hue:
        shift = jax.random.uniform(keys[3], shape, minval=-hue, maxval=hue)
        levels = jax.vmap(_hue)(levels, shift)
    return levels


# ---- RandAugment ----


def _rand_augment(
    key: PRNGKey, levels: Levels, real: Real, num_ops: int, magnitude: float
) -> Levels:
    """`num_ops` operations for each clip, drawn with replacement, each with a random sign.

    Those that move pixels go first, composed into one resampling, then the others in their order.
    """
    ops = jax.random.randint(key, (len(levels), num_ops), 0, len(RAND_AUGMENT_OPS))
    key_sign = jax.random.fold_in(key, 1)
    signs = jax.random.rademacher(key_sign, ops.shape, jnp.float32)
    strength = signs * (magnitude / _MAX_MAGNITUDE)
    matrices = jax.vmap(_matrix)(ops, strength)
    levels = _if_any(ops >= _NUM_POINTWISE, jax.vmap(_warp), levels, matrices)
    for i in range(num_ops):
        drawn = (ops[:, i], strength[:, i])
        changed = (ops[:, i] > 0) & (ops[:, i] < _SHARPNESS)
        levels = _if_any(changed, jax.vmap(_change_colours), levels, *drawn, real)
        levels = _if_any(ops[:, i] == _SHARPNESS, jax.vmap(_sharpen), levels, *drawn)
    return levels


def _if_any(
    chosen: Array, change: Callable[..., Array], levels: Levels, *arguments: Array
) -> Array:
    """`change` of all the clips, which leaves those that are not `chosen` as they are.

    A batch without any is spared. Besides, XLA computes a conditional's input once; else it fuses
    the changes and computes pixels anew for each use: on a CPU that took 20 times as long.
    """
    return jax.lax.cond(chosen.any(), change, lambda levels, *_: levels, levels, *arguments)


def _matrix(ops: Ops, strength: Strengths) -> Float[Array, "2 3"]:
    """The map from a shown place to its source, of all operations that move pixels.

    Places are (x, y, 1) in shares of the side, from the middle of the frame.
    """
    total = jnp.eye(3)
    for i in range(len(ops)):
        on = {name: ops[i] == index for index, name in enumerate(RAND_AUGMENT_OPS)}

        def amount(name: str, most: float, on: dict[str, Array] = on, i: int = i) -> Array:
            return jnp.where(on[name], most * strength[i], 0)

        angle = amount("rotate", _MAX_ROTATION)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        step = jnp.stack(
            [
                cos,
                sin + amount("shear_x", _MAX_SHEAR),
                amount("translate_x", _MAX_TRANSLATION),
                -sin + amount("shear_y", _MAX_SHEAR),
                cos,
                amount("translate_y", _MAX_TRANSLATION),
                jnp.zeros(()),
                jnp.zeros(()),
                jnp.ones(()),
            ]
        ).reshape(3, 3)
        # Sums of products, not a matrix product: that would be rounded on TPUs and GPUs.
        total = (total[:, :, None] * step[None]).sum(1)
    return total[:2]


def _warp(clip: ClipLevels, matrix: Float[Array, "2 3"]) -> Array:
    """Shows at each place its source in the clip, bilinearly; grey where that is outside."""
    height, width = clip.shape[-2:]
    x = (jnp.arange(width) + 0.5) / width - 0.5
    y = (jnp.arange(height)[:, None] + 0.5) / height - 0.5
    source_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]  # [H, W]
    source_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    column = (source_x + 0.5) * width - 0.5
    row = (source_y + 0.5) * height - 0.5
    left, top = jnp.floor(column), jnp.floor(row)
    pixels = clip.reshape(-1, height * width) - _GREY  # [3 T, H W]
    shown = jnp.zeros_like(pixels)
    for dy in (0, 1):
        for dx in (0, 1):
            at_row, at_column = top + dy, left + dx
            weight = (1 - jnp.abs(row - at_row)) * (1 - jnp.abs(column - at_column))
            inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            index = jnp.where(inside, at_row * width + at_column, 0).astype(jnp.int32).reshape(-1)
            weight = jnp.where(inside, weight, 0).reshape(-1)
            shown += weight * jnp.take(pixels, index, axis=1, mode="clip")
    return shown.reshape(clip.shape) + _GREY


def _change_colours(
    clip: ClipLevels, op: Int[Array, ""], strength: Float[Array, ""], real: RealFrames
) -> Array:
    """One of the operations before sharpness; the clip as it is for any other.

    All of them are special cases of one formula. A `lax.switch` under vmap would compute every
    branch for every clip, and a loop over clips would tear a batch from its devices.
    """
    on = {name: op == index for index, name in enumerate(RAND_AUGMENT_OPS)}
    factor = 1 + _MAX_BLEND * strength
    low, stretch = _stretch(clip, real)
    stretch = jnp.where(on["autocontrast"], stretch, 1)
    blended = on["colour"] | on["contrast"] | on["brightness"]
    own = stretch * jnp.where(blended, factor, 1)  # [3]
    of_grey = jnp.where(on["colour"], 1 - factor, 0)
    offset = jnp.where(on["contrast"], (1 - factor) * _mean_grey(clip, real), 0)
    offset -= jnp.where(on["autocontrast"], stretch * low, 0)  # [3]
    own, offset = own[:, None, None, None], offset[:, None, None, None]
    clip = jnp.clip(own * clip + of_grey * _grey(clip) + offset, 0, 255)
    clip = _posterize(clip, jnp.where(on["posterize"], jnp.abs(strength), 0))
    return _solarize(clip, jnp.where(on["solarize"], jnp.abs(strength), 0))


def _sharpen(clip: ClipLevels, op: Int[Array, ""], strength: Float[Array, ""]) -> Array:
    """Sharpens or smooths; the clip as it is for any other operation."""
    factor = jnp.where(op == _SHARPNESS, 1 + _MAX_BLEND * strength, 1)
    return _blend(_smooth(clip), clip, factor)


def _stretch(clip: ClipLevels, real: RealFrames) -> tuple[Colour, Colour]:
    """The lowest level of each colour in the real frames, and what brings the highest to 255."""
    low = jnp.where(real, clip.min((2, 3)), 255).min(1)
    high = jnp.where(real, clip.max((2, 3)), 0).max(1)
    flat = high <= low  # stays as it is, as in Pillow
    return jnp.where(flat, 0, low), jnp.where(flat, 1, 255 / jnp.where(flat, 1, high - low))


def _posterize(clip: ClipLevels, strength: Float[Array, ""]) -> Array:
    """Keeps 8 (strength 0) to 4 (strength 1) bits of each colour."""
    step = 2 ** jnp.round(_MAX_POSTERIZED_BITS * strength)
    # Levels need not be whole: at step 1 nothing is taken from them.
    return jnp.where(step > 1, jnp.floor(clip / step) * step, clip)


def _solarize(clip: ClipLevels, strength: Float[Array, ""]) -> Array:
    """Inverts the levels from 256 (strength 0) or 0 (strength 1) on."""
    return jnp.where(clip >= 256 * (1 - strength), 255 - clip, clip)


def _smooth(clip: ClipLevels) -> Array:
    """Pillow's SMOOTH: a 3 x 3 mean, the middle weighing 5 of 13; the border stays."""
    rows = clip[:, :, :-2] + clip[:, :, 1:-1] + clip[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = (sums + 4 * clip[:, :, 1:-1, 1:-1]) / 13
    return clip.at[:, :, 1:-1, 1:-1].set(smooth)


# ---- rectangles: erasing, mixup and cutmix ----


def _inside(top: Array, left: Array, bottom: Array, right: Array, height: int, width: int) -> Array:
    """Masks [B, 1, 1, H, W] of the pixels top <= y < bottom, left <= x < right."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    top, left, bottom, right = map(_per_clip, (top, left, bottom, right))
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def _erase(key: PRNGKey, levels: Levels, probability: float, area: Sequence[float]) -> Levels:
    """Covers, in some clips, the same rectangle of every frame with grey."""
    num_clips, _, _, height, width = levels.shape
    keys = jax.random.split(key, 4)
    share = jax.random.uniform(keys[0], (num_clips,), minval=area[0], maxval=area[1])
    aspect = _log_uniform(keys[1], (num_clips,), _ERASED_ASPECT)
    rows = jnp.clip(jnp.round(height * jnp.sqrt(share / aspect)), 1, height)
    columns = jnp.clip(jnp.round(width * jnp.sqrt(share * aspect)), 1, width)
    place = jax.random.uniform(keys[2], (2, num_clips))
    top = jnp.floor(place[0] * (height - rows + 1))
    left = jnp.floor(place[1] * (width - columns + 1))
    chosen = jax.random.bernoulli(keys[3], probability, (num_clips,))
    erased = _inside(top, left, top + rows, left + columns, height, width)
    return jnp.where(erased & _per_clip(chosen), _GREY, levels)


def _as_target(label: Label, num_classes: int) -> Float[Array, "B K"]:
    if label.ndim == 2:
        return jnp.asarray(label)
    return jax.nn.one_hot(label, num_classes)


def _partners(key: PRNGKey, mask: Mask) -> Partners:
    """For each real clip another one, drawn at random; padding and a lone clip get themselves.

    The real clips stand in a random circle, each followed by its partner.
    """
    num_clips = len(mask)
    rank = jax.random.uniform(key, (num_clips,))
    circle = jnp.argsort(jnp.where(mask, rank, 2.0))  # the real clips first
    num_real = jnp.maximum(mask.sum(), 1)
    place = jnp.arange(num_clips)
    following = jnp.where(place < num_real, (place + 1) % num_real, place)
    return jnp.zeros(num_clips, jnp.int32).at[circle].set(circle[following].astype(jnp.int32))


def _own_weights(
    key: PRNGKey, num_clips: int, height: int, width: int, options: ConfigDict
) -> Float[Array, "B 1 1 h w"]:
    """How much of each pixel stays the clip's own: 0 to 1; h, w are 1 where all are alike."""
    keys = jax.random.split(key, 4)
    shape = (num_clips,)
    mixup_alpha, cutmix_alpha = options.mixup_alpha, options.cutmix_alpha
    if mixup_alpha:
        alike = _per_clip(jax.random.beta(keys[0], mixup_alpha, mixup_alpha, shape))
        if not cutmix_alpha:
            return alike
    ratio = jnp.sqrt(1 - jax.random.beta(keys[1], cutmix_alpha, cutmix_alpha, shape))
    middle = jax.random.uniform(keys[2], (2, num_clips))
    top, bottom = (jnp.round(height * (middle[0] + s * ratio / 2)) for s in (-1, 1))
    left, right = (jnp.round(width * (middle[1] + s * ratio / 2)) for s in (-1, 1))
    cut = 1.0 - _inside(top, left, bottom, right, height, width)
    if not mixup_alpha:
        return cut
    return jnp.where(_per_clip(jax.random.bernoulli(keys[3], shape=shape)), alike, cut)


def _mix(
    key: PRNGKey,
    levels: Levels,
    target: Float[Array, "B K"],
    mask: Mask,
    num_frames: NumFrames | None,
    options: ConfigDict,
) -> tuple[Levels, Float[Array, "B K"]]:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of real clips, by a fair coin if both.

    A clip's share of its target is its share of the pixels: exactly, also where a cutmix rectangle
    was cut by the border. With `num_frames`, a shorter partner goes on with its last frame; a
    longer one ends with the clip.
    """
    num_clips, _, length, height, width = levels.shape
    key_partner, key_weights = jax.random.split(key)
    partner = _partners(key_partner, mask)
    other = levels[partner]
    if num_frames is not None:
        last = (jnp.asarray(num_frames) - 1)[partner]
        frame = jnp.minimum(jnp.arange(length), last[:, None])  # [B, T]
        other = jnp.take_along_axis(other, frame[:, None, :, None, None], axis=2)
    own = _own_weights(key_weights, num_clips, height, width, options)
    share = own.mean((1, 2, 3, 4))[:, None]  # [B, 1]
    mixed_target = share * target + (1 - share) * target[partner]
    return own * levels + (1 - own) * other, mixed_target
