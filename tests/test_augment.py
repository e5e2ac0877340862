"""Changes of training clips: one draw a clip, checked against Pillow; classes by the motions."""

import ast
import colorsys
import functools
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from configs import base
from input_pipeline import gestures, label_maps
from input_pipeline.jester import CLASS_NAMES
from rvit_jax import augment

CLIPS, FRAMES, SIDE = 8, 3, 16
OPS = augment.RAND_AUGMENT_OPS
KEY = jax.random.key(3)
# Compiled, as in the training step; op by op they take ten times as long to test.
CHANGE_COLOURS, SHARPEN, HUE = map(
    jax.jit, (augment._change_colours, augment._sharpen, augment._hue)
)
WARP, MATRIX, RESAMPLE, PARTNERS = map(
    jax.jit, (augment._warp, augment._matrix, augment._resample, augment._partners)
)

CHANGES = {  # each alone
    "flip": {"horizontal_flip": 0.5},
    "crop": {"random_resized_crop": {"scale": (0.3, 0.9), "aspect": (0.75, 1.33)}},
    "scale_jitter": {"scale_jitter": (0.7, 1.4)},
    "colour_jitter": {
        "colour_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    },
    "rand_augment": {"rand_augment": {"num_ops": 1, "magnitude": 9.0}},
    "random_erasing": {"random_erasing": {"probability": 0.7}},
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
}


def config_with(**changes) -> ConfigDict:
    config = base.get_config()
    config.dataset.augment.update(changes)
    return config


def make(ragged: bool = False, **changes) -> augment.Augment:
    return _compiled(ragged, repr(changes))


@functools.cache  # of two tests with the same changes, the second finds them compiled
def _compiled(ragged: bool, changes: str) -> augment.Augment:
    config = config_with(**ast.literal_eval(changes))
    config.dataset.short_clips = "ragged" if ragged else "repeat_last"
    return jax.jit(augment.make_augment(config, CLASS_NAMES))


def batch(num_clips: int = CLIPS, *, still: bool = False, dtype=np.uint8, seed: int = 0):
    """(video, label, mask, num_frames): noise, of equal frames if `still`; the last row padding."""
    random = np.random.default_rng(seed)
    video = random.integers(0, 256, (num_clips, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    if still:
        video[:] = video[:, :1]
    if dtype != np.uint8:
        video = (video / 127.5 - 1).astype(dtype)
    label = random.integers(0, 27, num_clips).astype(np.int32)
    mask = np.arange(num_clips) < num_clips - 1
    video[-1], label[-1] = 0, -1
    return video, label, mask, np.where(mask, FRAMES, 1).astype(np.int32)


def levels_of(image: np.ndarray) -> jnp.ndarray:
    """uint8 [H, W, 3] -> one clip of two equal frames, float32 [3, 2, H, W]."""
    return jnp.asarray(np.stack([image, image]).transpose(3, 0, 1, 2), jnp.float32)


def image_of(levels) -> np.ndarray:
    """The second frame of a clip, float [H, W, 3]."""
    return np.asarray(levels)[:, 1].transpose(1, 2, 0)


def smooth_image(side: int = 48, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC))


# ---- what holds for every change ----


def test_off_is_the_identity_and_adds_no_operation():
    inputs = batch()
    change = augment.make_augment(config_with(), ("anything", "at all"))
    video, label = change(KEY, *inputs)
    assert video is inputs[0]
    assert label is inputs[1]

    def step(key, *inputs):
        video, label = change(key, *inputs)
        return video.sum() + label.sum()

    def plain_step(key, video, label, mask, num_frames):
        return video.sum() + label.sum()

    assert str(jax.make_jaxpr(step)(KEY, *inputs)) == str(jax.make_jaxpr(plain_step)(KEY, *inputs))


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_shares_one_draw_among_the_frames_of_a_clip(name):
    change = make(**CHANGES[name])
    given = batch(still=True)
    video, label = map(np.asarray, change(KEY, *given))
    assert (video.dtype, video.shape) == (np.uint8, given[0].shape)
    np.testing.assert_array_equal(video, np.broadcast_to(video[:, :1], video.shape))
    assert np.any(video != given[0])
    # Same key, same bits; another key, other ones.
    again, label_again = change(KEY, *given)
    np.testing.assert_array_equal(again, video)
    np.testing.assert_array_equal(label_again, label)
    others = [np.asarray(change(jax.random.key(seed), *given)[0]) for seed in (4, 5)]
    assert all(np.any(other != video) for other in others)
    # Padding is untouched.
    np.testing.assert_array_equal(video[-1], given[0][-1])


@pytest.mark.parametrize("name", CHANGES)
def test_equal_clips_are_changed_differently(name):
    video, label, _, num_frames = batch(still=True)
    if "mix" in name:  # a mixture of equal clips is that clip: look at the targets
        label[:] = np.arange(CLIPS)
        _, targets = make(**CHANGES[name])(KEY, video, label, np.ones(CLIPS, bool), num_frames)
        assert len(np.unique(np.sort(targets)[:, -1].round(5))) > CLIPS / 2
        return
    video[:], label[:], num_frames[:] = video[0], 0, FRAMES
    changed, _ = make(**CHANGES[name])(KEY, video, label, np.ones(CLIPS, bool), num_frames)
    assert len(np.unique(np.asarray(changed).reshape(CLIPS, -1), axis=0)) > 1


def test_all_together_keep_the_range_the_padding_and_the_frames_past_the_end():
    everything = {key: value for change in CHANGES.values() for key, value in change.items()}
    video, label, mask, num_frames = batch(dtype=np.float32)
    num_frames[:2] = (1, 2)
    mask[4] = False  # padding in the middle, as where processes' rows meet
    changed, target = map(
        np.asarray, make(ragged=True, **everything)(KEY, video, label, mask, num_frames)
    )
    assert (changed.dtype, changed.shape) == (video.dtype, video.shape)
    assert -1 <= changed.min() < changed.max() <= 1
    np.testing.assert_array_equal(changed[~mask], video[~mask])
    np.testing.assert_array_equal(changed[0, 1:], video[0, 1:])
    np.testing.assert_array_equal(changed[1, 2:], video[1, 2:])
    assert all(np.any(changed[row] != video[row]) for row in np.flatnonzero(mask))
    np.testing.assert_allclose(target[mask].sum(1), 1, atol=1e-6)


def test_switching_one_change_on_leaves_the_draws_of_another():
    inputs = batch(64)
    _, alone = make(horizontal_flip=0.5)(KEY, *inputs)
    _, beside = make(horizontal_flip=0.5, scale_jitter=(0.5, 2.0))(KEY, *inputs)
    np.testing.assert_array_equal(alone, beside)


# ---- flip ----


def test_flips_mirror_the_columns_and_the_class():
    video, label, mask, num_frames = batch()
    label[:3] = [CLASS_NAMES.index(name) for name in ("Swiping Left", "Thumb Up", "Swiping Right")]
    changed, new = map(np.asarray, make(horizontal_flip=1.0)(KEY, video, label, mask, num_frames))
    np.testing.assert_array_equal(changed, video[:, :, :, ::-1])
    names = [CLASS_NAMES[index] for index in new[:3]]
    assert names == ["Swiping Right", "Thumb Up", "Swiping Left"]
    assert new[-1] == -1


def test_a_class_without_its_partner_is_never_flipped():
    names = ("Thumb Up", "Swiping Left")
    change = jax.jit(augment.make_augment(config_with(horizontal_flip=1.0), names))
    video, label, mask, num_frames = batch(3)
    label[:] = (0, 1, -1)
    changed, new = map(np.asarray, change(KEY, video, label, mask, num_frames))
    np.testing.assert_array_equal(new, label)
    np.testing.assert_array_equal(changed[0], video[0, :, :, ::-1])
    np.testing.assert_array_equal(changed[1], video[1])


def test_several_labels_are_mirrored_one_by_one():
    names = ("Swiping Left", "Thumb Up", "Swiping Right", "Sliding Two Fingers Up")
    change = jax.jit(augment.make_augment(config_with(horizontal_flip=1.0), names))
    video, _, mask, num_frames = batch(3)
    label = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32)
    _, new = change(KEY, video, label, mask, num_frames)
    np.testing.assert_array_equal(new, [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])


def test_the_probabilities_are_those_of_the_config():
    num_clips = 10_000
    video = np.zeros((num_clips, 1, 4, 4, 3), np.uint8)
    video[:, :, :, 0] = 255
    rest = (np.zeros(num_clips, np.int32), np.ones(num_clips, bool), np.ones(num_clips, np.int32))
    flipped, _ = make(horizontal_flip=0.3)(KEY, video, *rest)
    erased, _ = make(random_erasing={"probability": 0.25, "area": (0.2, 0.3)})(KEY, video, *rest)
    for changed, probability in ((flipped, 0.3), (erased, 0.25)):
        share = np.any(np.asarray(changed) != video, axis=(1, 2, 3, 4)).mean()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / num_clips)
    ops = jax.random.randint(KEY, (num_clips,), 0, len(OPS))
    assert np.bincount(ops).min() > 0.8 * num_clips / len(OPS)


# ---- crop and scale ----


def test_the_whole_frame_is_the_identity():
    levels = levels_of(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    whole = RESAMPLE(levels[None], jnp.array([[0.0, 0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(whole[0], levels, atol=1e-3)


@pytest.mark.parametrize("box", [(0.25, 0.125, 0.5, 0.75), (0.1, 0.3, 0.33, 0.61)])
def test_crops_are_pillows(box):
    image = smooth_image()
    top, left, height, width = box
    corners = tuple(48 * side for side in (left, top, left + width, top + height))
    expected = Image.fromarray(image).resize((48, 48), Image.Resampling.BILINEAR, box=corners)
    shown = image_of(RESAMPLE(levels_of(image)[None], jnp.array([box]))[0])
    np.testing.assert_allclose(shown, np.asarray(expected), atol=1.1)


def test_shrinking_smooths_and_leaves_grey_around():
    stripes = np.zeros((SIDE, SIDE, 3), np.uint8)
    stripes[:, ::2] = 254
    shown = image_of(RESAMPLE(levels_of(stripes)[None], jnp.array([[-0.5, -0.5, 2, 2]]))[0])
    np.testing.assert_allclose(shown[:4], 127.5, atol=1e-3)
    np.testing.assert_allclose(shown[:, -4:], 127.5, atol=1e-3)
    np.testing.assert_allclose(shown[5:11, 5:11], 127, atol=1)  # aliased, it would be 0 or 254
    # A white picture of half the size covers the middle quarter.
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    shown = image_of(RESAMPLE(levels_of(white)[None], jnp.array([[-0.5, -0.5, 2, 2]]))[0])
    assert np.count_nonzero(shown[..., 0] > 250) == SIDE**2 // 4


def test_boxes_have_the_areas_and_shapes_asked_for_and_lie_inside():
    boxes = np.asarray(augment._draw_boxes(KEY, 10_000, (0.2, 0.6), (0.75, 1.25), (1.0, 1.0)))
    top, left, height, width = boxes.T
    area, aspect = height * width, width / height
    assert area.min() >= 0.2 - 1e-5
    assert area.max() <= 0.6 + 1e-5
    assert abs(area.mean() - 0.4) < 0.005
    assert 0.75 - 1e-4 <= aspect.min() < 0.76
    assert 1.24 < aspect.max() <= 1.25 + 1e-4
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-5
    zoomed = np.asarray(augment._draw_boxes(KEY, 10_000, (1.0, 1.0), (1.0, 1.0), (0.5, 2.0)))
    np.testing.assert_allclose(zoomed[:, 2], zoomed[:, 3], rtol=1e-5)
    assert abs(np.log2(zoomed[:, 2]).mean()) < 0.03


# ---- colours ----

ENHANCERS = {
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def apply_op(name: str, image: np.ndarray, strength: float) -> np.ndarray:
    clip, op = levels_of(image), jnp.int32(OPS.index(name))
    if name == "sharpness":
        return image_of(SHARPEN(clip, op, jnp.float32(strength)))
    return image_of(CHANGE_COLOURS(clip, op, jnp.float32(strength), jnp.ones(2, bool)))


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.6])
@pytest.mark.parametrize("name", ENHANCERS)
def test_enhancements_are_pillows(name, strength):
    image = smooth_image(24)
    expected = np.asarray(ENHANCERS[name](Image.fromarray(image)).enhance(1 + 0.9 * strength))
    np.testing.assert_allclose(apply_op(name, image, strength), expected, atol=1.6)


@pytest.mark.parametrize("strength", [-1.0, 0.5, 0.0])
def test_posterize_solarize_and_autocontrast_are_pillows(strength):
    image = np.random.default_rng(1).integers(30, 200, (24, 24, 3), dtype=np.uint8)
    pillow = Image.fromarray(image)
    bits = 8 - round(4 * abs(strength))
    threshold = round(256 * (1 - abs(strength)))
    for name, expected, tolerance in (
        ("posterize", ImageOps.posterize(pillow, bits), 0),
        ("solarize", ImageOps.solarize(pillow, threshold), 0),
        ("autocontrast", ImageOps.autocontrast(pillow), 1.01),
        ("identity", pillow, 0),
    ):
        shown = apply_op(name, image, strength)
        np.testing.assert_allclose(shown, np.asarray(expected), atol=tolerance + 1e-3)


def test_a_flat_colour_survives_autocontrast():
    image = np.full((8, 8, 3), (10, 20, 200), np.uint8)
    np.testing.assert_allclose(apply_op("autocontrast", image, 1.0), image, atol=1e-3)


def test_statistics_are_those_of_the_real_frames():
    image = np.random.default_rng(1).integers(30, 200, (8, 8, 3), dtype=np.uint8)
    clip = levels_of(image).at[:, 0].set(0)
    for name in ("autocontrast", "contrast"):
        op = jnp.int32(OPS.index(name))
        shown = CHANGE_COLOURS(clip, op, jnp.float32(0.5), jnp.array([False, True]))
        np.testing.assert_allclose(image_of(shown), apply_op(name, image, 0.5), atol=1e-3)


@given(colour=st.tuples(*[st.integers(0, 255)] * 3), shift=st.floats(-0.5, 0.5, width=32))
def test_hue_is_that_of_colorsys(colour, shift):
    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
    expected = np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)) * 255
    clip = jnp.asarray(colour, jnp.float32)[:, None, None, None]
    np.testing.assert_allclose(HUE(clip, jnp.float32(shift)).ravel(), expected, atol=0.01)


@pytest.mark.parametrize("key", ["brightness", "contrast", "saturation"])
def test_colour_jitter_draws_factors_within_its_strength(key):
    clips = 400
    video = np.zeros((clips, 1, 2, 2, 3), np.uint8)
    video[:, :, 0], video[:, :, 1] = (80, 100, 120), (120, 100, 80)
    rest = (np.zeros(clips, np.int32), np.ones(clips, bool), np.ones(clips, np.int32))
    changed, _ = make(colour_jitter={key: 0.5})(KEY, video, *rest)
    changed = np.asarray(changed, np.float32)[:, 0, :, 0]
    grey = video[0, 0, :, 0] @ np.float32((0.299, 0.587, 0.114))  # of the two rows
    base = {"brightness": [0, 0], "contrast": [grey.mean()] * 2, "saturation": grey}[key]
    factor = (changed[:, 0, 0] - base[0]) / (80 - base[0])
    assert 0.45 < factor.min() < 0.6
    assert 1.4 < factor.max() < 1.55
    np.testing.assert_allclose(factor.mean(), 1, atol=0.06)


# ---- what moves pixels ----


def warp(image: np.ndarray, matrix) -> np.ndarray:
    return image_of(WARP(levels_of(image), jnp.asarray(matrix, jnp.float32)))


def matrix_of(name: str, strength: float) -> np.ndarray:
    ops = jnp.array([OPS.index(name), OPS.index("solarize")], jnp.int32)
    return np.asarray(MATRIX(ops, jnp.array([strength, 1.0], jnp.float32)))


def test_a_quarter_turn_and_none_are_exact():
    image = smooth_image(24)
    np.testing.assert_allclose(warp(image, np.eye(3)[:2]), image, atol=2e-3)
    # The source of what is shown at the right is at the top: a quarter turn clockwise.
    turned = warp(image, [[0, 1, 0], [-1, 0, 0]])
    np.testing.assert_allclose(turned, np.rot90(image, -1), atol=2e-3)


@pytest.mark.parametrize("strength", [-1.0, 0.4])
@pytest.mark.parametrize("name", OPS[augment._NUM_POINTWISE :])
def test_moves_are_pillows(name, strength):
    side, image = 48, smooth_image(48)
    angle = np.radians(30) * strength
    turn = [[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]]
    expected = {
        "rotate": turn,
        "shear_x": [[1, 0.3 * strength, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [0.3 * strength, 1, 0]],
        "translate_x": [[1, 0, 0.45 * strength], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, 0.45 * strength]],
    }[name]
    matrix = matrix_of(name, strength)
    np.testing.assert_allclose(matrix, expected, atol=1e-6)
    (a, b, x), (c, d, y) = np.array(expected)
    middle = side / 2  # Pillow counts pixels from the corner
    coefficients = (
        a, b, side * x + middle * (1 - a - b), c, d, side * y + middle * (1 - c - d),
    )  # fmt: skip
    method, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    pillow = Image.fromarray(image).transform((side, side), method, coefficients, bilinear)
    cover = Image.new("L", (side, side), 255)
    inside = np.asarray(cover.transform((side, side), method, coefficients, bilinear)) == 255
    inside = np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MinFilter(5))) > 0
    inside = inside & np.pad(np.ones((side - 4, side - 4), bool), 2)  # not Pillow's borders
    shown = warp(image, matrix)
    assert inside.sum() > 0.3 * side**2
    np.testing.assert_allclose(shown[inside], np.asarray(pillow)[inside], atol=1.1)
    if name.startswith("translate"):
        outside = np.asarray(cover.transform((side, side), method, coefficients)) == 0
        assert outside.any()
        assert np.median(np.abs(shown[outside] - 127.5)) < 1e-3


def test_moves_compose_in_their_order():
    ops = jnp.array([OPS.index("rotate"), OPS.index("translate_x")], jnp.int32)
    both = np.asarray(MATRIX(ops, jnp.array([1.0, 0.5], jnp.float32)))
    one, two = (
        np.vstack([matrix_of(n, s), [0, 0, 1]]) for n, s in (("rotate", 1), ("translate_x", 0.5))
    )
    np.testing.assert_allclose(both, (one @ two)[:2], atol=1e-6)


# ---- erasing, mixup, cutmix ----


def test_erased_rectangles_are_grey_and_of_the_area_asked_for():
    video, label, _, num_frames = batch(200)
    video[:] = 7
    erasing = {"probability": 1.0, "area": (0.1, 0.2)}
    changed, _ = make(random_erasing=erasing)(KEY, video, label, np.ones(200, bool), num_frames)
    erased = np.asarray(changed)[:, 0, :, :, 0] == 128
    np.testing.assert_array_equal(np.asarray(changed)[:, 0][~erased], 7)
    for picture in erased:
        rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
        assert picture.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    share = erased.mean((1, 2))
    assert 0.06 < share.min() < share.max() < 0.25
    assert abs(share.mean() - 0.15) < 0.01


@pytest.mark.parametrize("name", ["mixup", "cutmix", "both"])
def test_targets_are_the_shares_of_the_pixels(name):
    num_clips = CLIPS
    video, label, mask, num_frames = batch(num_clips)
    label[:-1] = np.arange(num_clips - 1)
    mask[3] = False
    video[:] = 20 * np.arange(num_clips)[:, None, None, None, None].astype(np.uint8)  # one colour
    changes = {**CHANGES["mixup"], **CHANGES["cutmix"]} if name == "both" else CHANGES[name]
    changed, target = map(np.asarray, make(**changes)(KEY, video, label, mask, num_frames))
    real = np.flatnonzero(mask)
    np.testing.assert_allclose(target[mask].sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(target[:, 3], np.eye(num_clips)[3])  # padding is in no mixture
    cut = []
    for row in real:
        present = np.flatnonzero(target[row])
        (partner,) = [index for index in present if index != row] or [row]
        own = target[row, row]
        pictures = changed[row]
        if len(np.unique(pictures)) == 2:  # cutmix: the pasted area, to the pixel
            cut.append(row)
            np.testing.assert_allclose((pictures == 20 * row).mean(), own, atol=1e-6)
            assert np.isin(pictures, (20 * row, 20 * partner)).all()
        elif own not in (0, 1):
            expected = own * 20 * row + (1 - own) * 20 * partner
            np.testing.assert_allclose(pictures, expected, atol=0.51)
    assert {"mixup": not cut, "cutmix": bool(cut), "both": 0 < len(cut) < len(real)}[name]


def test_the_cutmix_share_varies_as_it_should():
    num_clips = 5_000
    keys = jax.random.split(KEY, 2)
    options = config_with(cutmix_alpha=1.0).dataset.augment
    own = np.asarray(augment._own_weights(keys[0], num_clips, 16, 16, options)).mean((1, 2, 3, 4))
    # Uncut rectangles would leave 1/2 on average; those cut by the border leave more.
    assert 0.6 < own.mean() < 0.72
    options = config_with(mixup_alpha=0.4).dataset.augment
    own = np.asarray(augment._own_weights(keys[1], num_clips, 16, 16, options)).ravel()
    assert abs(own.mean() - 0.5) < 0.02
    np.testing.assert_allclose(own.var(), 0.25 / 1.8, atol=0.01)  # Beta(a, a): 1 / 4(2a + 1)


@given(mask=st.lists(st.booleans(), min_size=6, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_partners_are_other_real_clips_each_once(mask, seed):
    mask = np.array(mask)
    partner = np.asarray(PARTNERS(jax.random.key(seed), mask))
    real = np.flatnonzero(mask)
    np.testing.assert_array_equal(np.sort(partner), np.arange(6))
    np.testing.assert_array_equal(partner[~mask], np.flatnonzero(~mask))
    assert np.isin(partner[real], real).all()
    if len(real) > 1:
        assert np.all(partner[real] != real)


def test_a_shorter_partner_goes_on_with_its_last_frame():
    video = np.zeros((2, FRAMES, 4, 4, 3), np.uint8)
    video[0] = 100
    video[1, :2] = np.array([40, 200])[:, None, None, None]
    label, mask = np.array([0, 1], np.int32), np.ones(2, bool)
    num_frames = np.array([FRAMES, 2], np.int32)
    change = make(ragged=True, mixup_alpha=1.0)
    changed, target = map(np.asarray, change(KEY, video, label, mask, num_frames))
    own = target[0, 0]
    expected = [own * 100 + (1 - own) * other for other in (40, 200, 200)]
    np.testing.assert_allclose(changed[0, :, 0, 0, 0], expected, atol=0.51)
    np.testing.assert_array_equal(changed[1, 2], 0)


# ---- values that cannot be ----


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip is 1.5; expected 0 to 1"),
        ({"random_resized_crop": {"scale": (0.0, 1.0)}}, r"random_resized_crop.scale is \(0.0, 1"),
        ({"random_resized_crop": {"scale": (0.5, 1.2)}}, "0 < lowest <= highest <= 1"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter"),
        ({"colour_jitter": {"hue": 0.6}}, "colour_jitter.hue is 0.6; expected 0 to 0.5"),
        ({"rand_augment": {"magnitude": 11.0}}, "rand_augment.magnitude is 11.0"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha is nan"),
        ({"horizontal_flip": 0.5, "mirror_classes": "jestr"}, "mirror_classes is 'jestr'"),
    ],
)
def test_values_that_cannot_be_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        augment.make_augment(config_with(**changes), CLASS_NAMES)


def test_colours_of_scrambled_planes_are_refused():
    config = config_with(colour_jitter={"hue": 0.1})
    config.dataset.frame_packing = "channel_planes"
    with pytest.raises(ValueError, match=r"colour_jitter\.hue .*frame_packing=rgb"):
        augment.make_augment(config, CLASS_NAMES)


def test_flipping_classes_that_all_lack_their_partner_is_refused():
    with pytest.raises(ValueError, match="add their partners to"):
        augment.make_augment(config_with(horizontal_flip=0.5), ("Swiping Left",))


# ---- classes: the motions decide ----


def thumb_up(motion) -> float:
    """How far the thumb points up in the image; the thumb is `motion.thumb` from the fingers."""
    x = np.sin(motion.thumb) * motion.thumb_side
    up = np.cos(motion.thumb)
    return np.median(up * np.cos(motion.turn) - x * np.sin(motion.turn))


def rolling(motion) -> float:
    """The area swept in the plane of height and nearness: above 0 nearer over the top."""
    high = motion.place[:, 1] < 0.75
    up, near = -motion.place[high, 1], motion.size[high]
    up, near = up - up.mean(), near - near.mean()
    return np.sum(up[:-1] * near[1:] - up[1:] * near[:-1])


def seen_class(motion) -> str:
    """What a viewer would call a motion, by where the hand goes and what its fingers do."""
    fingers = np.median(motion.extension[:, 1:], axis=0)
    raised = motion.place[:, 1] < 0.9
    if not raised.any():
        return "No gesture"
    x, y = motion.place[raised].T
    if fingers.max() < 0.3:
        return "Thumb Up" if thumb_up(motion) > 0 else "Thumb Down"
    opening = motion.spread[-1] - motion.spread[0] + motion.thumb[-1] - motion.thumb[0]
    if abs(opening) > 0.8:
        way = "Zooming In With" if opening > 0 else "Zooming Out With"
        return f"{way} {'Two Fingers' if motion.extension[:, 3].max() < 0.3 else 'Full Hand'}"
    if np.median(motion.spread) > 0.65 and np.ptp(motion.turn) > 1.15:
        clockwise = motion.turn[-1] > motion.turn[0]
        return f"Turning Hand {'Clockwise' if clockwise else 'Counterclockwise'}"
    if motion.extension[:, 2].std() > 0.1:
        return "Drumming Fingers"
    if fingers.max() < 0.9:
        return f"Rolling Hand {'Forward' if rolling(motion) > 0 else 'Backward'}"
    two = fingers[2] < 0.3
    if np.max(motion.size) > 1.5 * np.min(motion.size):
        away = motion.size[-1] > motion.size[0]
        way = ("Pushing {} Away" if away else "Pulling {} In").format(
            "Two Fingers" if two else "Hand"
        )
        return way
    verb = "Sliding Two Fingers" if two else "Swiping"
    if np.ptp(x) > 0.65:
        return f"{verb} {'Left' if x[-1] < x[0] else 'Right'}"
    turn = motion.turn[raised]
    if np.abs(np.diff(turn)).sum() > 2.5 * max(np.ptp(turn), 0.2):
        return "Shaking Hand"
    if not two and np.median(motion.thumb) < 0.475 and np.ptp(motion.size) > 0:
        return "Stop Sign"
    return f"{verb} {'Down' if np.median(np.diff(y)) > 0 else 'Up'}"


MIRROR = label_maps.mirror_map(CLASS_NAMES)
REVERSAL = label_maps.reversal_map(CLASS_NAMES)
UNREVERSED = {"Thumb Up", "Thumb Down", "Stop Sign", "Doing other things"}


@pytest.mark.parametrize("name", [name for name in CLASS_NAMES if name != "Doing other things"])
def test_mirrored_and_reversed_motions_show_the_mapped_class(name):
    index = CLASS_NAMES.index(name)
    for seed in range(40):
        motion = gestures.draw_motion(name, np.random.default_rng(seed))
        assert seen_class(motion) == name, seed
        assert seen_class(motion.mirrored()) == CLASS_NAMES[MIRROR[index]], seed
        if REVERSAL[index] != label_maps.NEVER:
            assert seen_class(motion.reversed()) == CLASS_NAMES[REVERSAL[index]], seed
    assert (REVERSAL[index] == label_maps.NEVER) == (name in UNREVERSED)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_the_generator_makes_the_changed_motion_under_the_mapped_class(name):
    """With the same random numbers, one of the mapped class's drawings is the changed motion."""

    def drawn(version, seed):
        gesture, mirrored, backwards = version
        motion = gestures._GESTURES[gesture](np.random.default_rng(seed), 34)
        motion = motion.mirrored() if mirrored else motion
        return motion.reversed() if backwards else motion

    def same(a, b):
        return all(
            np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)
        )

    index = CLASS_NAMES.index(name)
    for class_map, change in ((MIRROR, "mirrored"), (REVERSAL, "reversed")):
        if class_map[index] == label_maps.NEVER:
            continue
        mapped = gestures._VERSIONS[CLASS_NAMES[class_map[index]]]
        for version in gestures._VERSIONS[name]:
            changed = getattr(drawn(version, 5), change)()
            assert any(same(changed, drawn(candidate, 5)) for candidate in mapped)


def test_the_whole_maps_of_jester():
    swaps = {
        "Swiping Left": "Swiping Right",
        "Sliding Two Fingers Left": "Sliding Two Fingers Right",
        "Turning Hand Clockwise": "Turning Hand Counterclockwise",
    }
    in_time = swaps | {
        "Swiping Down": "Swiping Up",
        "Sliding Two Fingers Down": "Sliding Two Fingers Up",
        "Pushing Hand Away": "Pulling Hand In",
        "Pushing Two Fingers Away": "Pulling Two Fingers In",
        "Rolling Hand Forward": "Rolling Hand Backward",
        "Zooming In With Full Hand": "Zooming Out With Full Hand",
        "Zooming In With Two Fingers": "Zooming Out With Two Fingers",
    }
    for class_map, pairs, never in ((MIRROR, swaps, set()), (REVERSAL, in_time, UNREVERSED)):
        both = pairs | {b: a for a, b in pairs.items()}
        becomes = {
            name: None if index == label_maps.NEVER else CLASS_NAMES[index]
            for name, index in zip(CLASS_NAMES, class_map, strict=True)
        }
        assert becomes == {
            name: None if name in never else both.get(name, name) for name in CLASS_NAMES
        }


@given(names=st.lists(st.sampled_from(CLASS_NAMES), min_size=1, unique=True))
def test_maps_of_some_classes_undo_themselves(names):
    for make_map, whole in ((label_maps.mirror_map, MIRROR), (label_maps.reversal_map, REVERSAL)):
        class_map = make_map(names)
        assert class_map.dtype == np.int32
        for index, becomes in enumerate(class_map):
            wanted = whole[CLASS_NAMES.index(names[index])]
            if becomes == label_maps.NEVER:
                assert wanted == label_maps.NEVER or CLASS_NAMES[wanted] not in names
            else:
                assert names[becomes] == CLASS_NAMES[wanted]
                assert class_map[becomes] == index


def test_something_something_swaps_the_sides_that_its_templates_name():
    names = [
        "Pulling [something] from right to left",
        "Pushing [something] from left to right",
        "Putting something upright on the table",
        "Plugging something into something but pulling it right out as you remove your hand",
        "Pulling [something] from left to right",
        "Turning the camera left while filming something",
        "Turning the camera right while filming something",
        "Moving something up",
    ]
    np.testing.assert_array_equal(label_maps.mirror_map(names), [4, -1, 2, 3, 0, 6, 5, 7])
    with pytest.raises(ValueError, match=r"mirror_classes=unchanged.*something_something"):
        label_maps.mirror_map(["Moving something up"])
    assert label_maps.mirror_map(["Moving something up"], "something_something").tolist() == [0]


def test_unknown_classes_are_refused_with_what_to_set():
    kinetics = ("abseiling", "air drumming")
    with pytest.raises(ValueError, match=r"'abseiling'.*augment\.mirror_classes=unchanged"):
        label_maps.mirror_map(kinetics)
    np.testing.assert_array_equal(label_maps.mirror_map(kinetics, "unchanged"), [0, 1])
    with pytest.raises(ValueError, match=r"'abseiling'.*augment\.time_reversal=0"):
        label_maps.reversal_map(kinetics)
    with pytest.raises(ValueError, match="did you mean 'Swiping Left'"):
        label_maps.reversal_map(["Swiping Lefd"])


# ---- changes in time ----


def test_reversal_gives_the_reversed_class_and_leaves_the_others():
    left, right, stop = map(CLASS_NAMES.index, ("Swiping Left", "Swiping Right", "Stop Sign"))
    indices = np.array([0, 2, 4])

    def reverse(label, probability=1.0):
        random = label_maps.clip_generator(1, 2, "17")
        return label_maps.reverse_at_random(
            indices, label, REVERSAL, probability=probability, random=random
        )

    assert [part.tolist() if hasattr(part, "tolist") else part for part in reverse(left)] == [
        [4, 2, 0], right,
    ]  # fmt: skip
    for label, probability in ((stop, 1.0), (-1, 1.0), (left, 0.0)):
        same, unchanged = reverse(label, probability)
        np.testing.assert_array_equal(same, indices)
        assert unchanged == label
    several = np.zeros(27, np.float32)
    several[[left, CLASS_NAMES.index("Shaking Hand")]] = 1
    assert np.flatnonzero(reverse(several)[1]).tolist() == [
        right,
        CLASS_NAMES.index("Shaking Hand"),
    ]
    several[stop] = 1
    assert reverse(several)[1] is several
    with pytest.raises(ValueError, match="time_reversal is 2"):
        reverse(left, 2)


def test_draws_in_time_depend_on_seed_epoch_and_clip_alone():
    def draw(*of):
        return label_maps.jitter_stride(2, (0.5, 2.0), random=label_maps.clip_generator(*of))

    assert draw(1, 0, "17") == draw(1, 0, "17")
    assert len({draw(1, 0, "17"), draw(2, 0, "17"), draw(1, 1, "17"), draw(1, 0, "18")}) == 4
    strides = [draw(1, epoch, str(clip)) for epoch in range(10) for clip in range(1000)]
    assert 1 <= min(strides) < 1.01 < 3.99 < max(strides) <= 4
    assert abs(np.mean(np.log2(strides)) - 1) < 0.03
    reversed_share = np.mean(
        [
            label_maps.reverse_at_random(
                np.arange(2), 0, REVERSAL, probability=0.3,
                random=label_maps.clip_generator(0, 0, str(clip)),
            )[1] != 0
            for clip in range(10_000)
        ]
    )  # fmt: skip
    assert abs(reversed_share - 0.3) < 0.025
    assert label_maps.jitter_stride(3, (1.0, 1.0), random=np.random.default_rng(0)) == 3
    with pytest.raises(ValueError, match=r"frame_rate_jitter is \(0, 1\)"):
        label_maps.jitter_stride(3, (0, 1), random=np.random.default_rng(0))
