"""Draws a gesture: a moving hand in front of a person, in a room, before a cheap camera.

`Motion` says where the hand is and what its fingers do in each frame; it holds nothing about looks.
`draw_frames` invents the looks (room, light, clothing, skin, camera) and draws the frames. The law
of the looks is its own mirror image and its own time reversal, so whatever tells a gesture from its
mirrored or reversed counterpart is in the `Motion` alone.

Lengths are in image heights: x to the right of the image's middle, y downwards from its top edge.
"""

import dataclasses

import cv2
import numpy as np

IMAGE_HEIGHT = 100  # pixels, as in 20BN-Jester
IMAGE_WIDTHS = (132, 140, 150, 156, 166, 176)  # pixels

_SUBPIXEL_BITS = 4  # polygon corners are handed to OpenCV in 1/16 pixels
_MARGIN = 12  # pixels of room beyond the picture's edges that a shaking camera can see
_CORNERS = 16  # of every polygon

# The hand seen from its palm, in palm half-widths: x towards the thumb, y towards the fingertips.
_WRIST = (0.0, -1.0)
_PALM = 0.93 * np.array(
    [(-0.52, -1.15), (0.52, -1.15), (0.74, -1.0), (0.92, -0.6), (1.0, -0.1), (1.02, 0.35),
     (0.95, 0.75), (0.8, 0.95), (0.45, 1.05), (0.05, 1.1), (-0.4, 1.02), (-0.78, 0.85),
     (-0.95, 0.6), (-1.0, 0.1), (-0.92, -0.6), (-0.74, -1.0)]
)  # fmt: skip
# Index, middle, ring and little finger.
_KNUCKLE = np.array([(0.68, 0.75), (0.23, 0.86), (-0.23, 0.8), (-0.68, 0.6)])
_FINGER_LENGTH = np.array([1.6, 1.8, 1.65, 1.3])
_FINGER_RADIUS = np.array([0.25, 0.26, 0.25, 0.22])
_FAN_CLOSED = np.array([0.06, 0.02, -0.03, -0.08])  # radians towards the thumb
_FAN_SPREAD = np.array([0.36, 0.11, -0.15, -0.42])  # added at spread 1
_THUMB_ROOT = (0.7, -0.35)
_THUMB_LENGTH, _THUMB_RADIUS = 1.75, 0.28

_BOX = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
_DISC = np.stack([np.cos(np.arange(32) * np.pi / 16), np.sin(np.arange(32) * np.pi / 16)], axis=-1)

_SKIN_TONES = np.array(  # blue, green, red: OpenCV's order, in this file throughout
    [(172, 196, 236), (140, 172, 224), (120, 154, 206), (94, 128, 184), (70, 100, 156),
     (58, 82, 128)]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Motion:
    """What one hand does in a clip of T frames."""

    place: np.ndarray  # [T, 2] middle of the palm, image heights
    size: np.ndarray  # [T] half the palm's width, image heights; grows towards the camera
    turn: np.ndarray  # [T] radians clockwise as seen in the image; 0 = fingers up
    pitch: np.ndarray  # [T] radians the hand tips towards or from the camera; shortens it
    extension: np.ndarray  # [T, 5] thumb, index … little: 1 straight, 0 curled over the palm
    spread: np.ndarray  # [T] 0 fingers side by side … 1 fanned out
    thumb: np.ndarray  # [T] radians between thumb and fingers; below 0 it lies over the palm
    elbow: np.ndarray  # [2] where the forearm comes from, image heights
    thumb_side: int  # +1: thumb at the image's right when the fingers point up, -1: left

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.size)

    def mirrored(self) -> "Motion":
        """The motion seen in a mirror: left for right."""
        flip = np.array([-1.0, 1.0])
        return dataclasses.replace(
            self,
            place=self.place * flip,
            turn=-self.turn,
            elbow=self.elbow * flip,
            thumb_side=-self.thumb_side,
        )

    def reversed(self) -> "Motion":
        """The motion of the film run backwards."""
        arrays = ("place", "size", "turn", "pitch", "extension", "spread", "thumb")
        return dataclasses.replace(self, **{name: getattr(self, name)[::-1] for name in arrays})


def wander(rng: np.random.Generator, num_frames: int, slowness: float) -> np.ndarray:
    """A smooth random curve [T] of mean 0 and variance 1, alike at all times and backwards.

    `slowness` is the time in frames over which it stays about the same.
    """
    reach = int(3 * slowness) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / slowness) ** 2)
    noise = rng.standard_normal(num_frames + 2 * reach)
    return np.convolve(noise, kernel / np.linalg.norm(kernel), mode="valid")


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What a clip shows, before light and noise.

    Attributes:
        room: uint8 [H + margins, W + margins, 3].
        shake: the camera's, [T, 2] pixels.
        polygons: in drawing order, int32 [T, shapes, corners, 2], in parts of a pixel.
        colours: of each.
        num_behind: how many of them, the first, are not of the arm and hand.
    """

    room: np.ndarray
    shake: np.ndarray
    polygons: np.ndarray
    colours: list[tuple[float, ...]]
    num_behind: int


def _draw_scene(motion: Motion, rng: np.random.Generator) -> _Scene:
    num_frames = motion.num_frames
    width = int(rng.choice(IMAGE_WIDTHS))
    skin = _SKIN_TONES[rng.integers(len(_SKIN_TONES))] * rng.uniform(0.92, 1.08)
    clothing = _clothing_colour(rng, skin)
    shake = np.stack([wander(rng, num_frames, 5), wander(rng, num_frames, 5)], axis=-1)
    shake = np.clip(shake * rng.uniform(0, 1.2), 1 - _MARGIN, _MARGIN - 1)

    room = _draw_room(rng, width)
    behind = _person(rng, num_frames, skin, clothing)
    shapes = behind + _arm_and_hand(motion, rng, skin, clothing)
    colours = [tuple(np.clip(colour, 0, 255).tolist()) for _, colour in shapes]
    polygons = np.stack([np.broadcast_to(p, (num_frames, _CORNERS, 2)) for p, _ in shapes], axis=1)
    polygons = polygons * IMAGE_HEIGHT + (width / 2, 0) - shake[:, None, None]
    polygons = np.round(polygons * 2**_SUBPIXEL_BITS).astype(np.int32)
    return _Scene(room, shake, polygons, colours, len(behind))


def draw_hand_mask(motion: Motion, rng: np.random.Generator) -> np.ndarray:
    """Where `draw_frames`, from the same `rng`, shows arm and hand: bool [T, H, W]."""
    scene = _draw_scene(motion, rng)
    width = scene.room.shape[1] - 2 * _MARGIN
    masks = np.zeros((motion.num_frames, IMAGE_HEIGHT, width), np.uint8)
    for mask, polygons in zip(masks, scene.polygons[:, scene.num_behind :], strict=True):
        for polygon in polygons:
            cv2.fillConvexPoly(mask, polygon, 1, cv2.LINE_8, _SUBPIXEL_BITS)
    return masks.astype(bool)


def draw_frames(motion: Motion, rng: np.random.Generator) -> list[bytes]:
    """The JPEG files of a clip with this motion; all looks are drawn from `rng`."""
    num_frames, scene = motion.num_frames, _draw_scene(motion, rng)
    room, shake, width = scene.room, scene.shake, scene.room.shape[1] - 2 * _MARGIN

    light = _light(rng, width)
    flicker = 1 + rng.uniform(0, 0.03) * wander(rng, num_frames, 2)
    grain = rng.standard_normal((IMAGE_HEIGHT + 32, width + 32, 3), dtype=np.float32)
    grain = np.round(grain * rng.uniform(1, 5)).astype(np.int16)
    offsets = rng.integers(0, 32, (num_frames, 2))
    blur = rng.uniform(0.3, 0.8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]

    middle = np.array([width / 2, IMAGE_HEIGHT / 2]) - 0.5 + _MARGIN
    frames = []
    for t in range(num_frames):
        image = cv2.getRectSubPix(room, (width, IMAGE_HEIGHT), tuple(middle + shake[t]))
        for polygon, colour in zip(scene.polygons[t], scene.colours, strict=True):
            cv2.fillConvexPoly(image, polygon, colour, cv2.LINE_AA, _SUBPIXEL_BITS)
        image = cv2.GaussianBlur(image, (3, 3), blur)
        image = cv2.multiply(image, light, scale=flicker[t], dtype=cv2.CV_8U)
        y, x = offsets[t]
        image = cv2.add(image, grain[y : y + IMAGE_HEIGHT, x : x + width], dtype=cv2.CV_8U)
        frames.append(cv2.imencode(".jpg", image, quality)[1].tobytes())
    return frames


# ---- shapes: (polygon [T or 1, corners, 2] in image heights, colour), drawn in this order ----


def _arm_and_hand(motion: Motion, rng, skin, clothing) -> list:
    dark, bright = skin * rng.uniform(0.55, 0.68), skin * 1.1
    wrist = _to_image(motion, np.array([[_WRIST]]))[:, 0]
    elbow = np.broadcast_to(motion.elbow, wrist.shape)
    width = np.full(motion.num_frames, np.median(motion.size))
    cuff = wrist + (elbow - wrist) * rng.uniform(0.25, 1.1)  # beyond 1: short sleeves
    shapes = []

    def add(start, end, start_radius, end_radius, colour, rim_colour):
        rim = 0.012  # width of the dark line around a part, so that fingers stay apart
        shapes.append((_capsule(start, end, start_radius + rim, end_radius + rim), rim_colour))
        shapes.append((_capsule(start, end, start_radius, end_radius), colour))

    add(wrist, elbow, 0.52 * motion.size, 0.7 * width, skin, dark)
    add(cuff, elbow, 0.75 * width, 0.85 * width, clothing, clothing * 0.7)
    for growth, colour in ((1.1, dark), (1.0, skin)):
        shapes.append((_to_image(motion, growth * _PALM[None]), colour))
    for root, joint, tip, radius in _fingers(motion):
        add(root, joint, radius, 0.95 * radius, skin, dark)
        add(joint, tip, 0.95 * radius, 0.8 * radius, skin, dark)
        shapes.append((_capsule(joint, tip, 0.4 * radius, 0.35 * radius), bright))
    return shapes


def _fingers(motion: Motion):
    """Yields root, middle joint, tip [T, 2] and radius [T] of each finger; the thumb last."""
    for i in range(4):
        direction = _FAN_CLOSED[i] + motion.spread * _FAN_SPREAD[i]
        curl = 1 - motion.extension[:, i + 1]
        yield _finger(motion, _KNUCKLE[i], direction, curl, _FINGER_LENGTH[i], _FINGER_RADIUS[i])
    curl = 0.4 * (1 - motion.extension[:, 0])  # a thumb bends less than a finger
    yield _finger(motion, _THUMB_ROOT, motion.thumb, curl, _THUMB_LENGTH, _THUMB_RADIUS)


def _finger(motion: Motion, root, direction, curl, length, radius):
    # Curling bends the finger towards the camera, so that each half is seen shortened by the
    # cosine of its angle; beyond 90 degrees it comes back over the palm.
    along = np.stack([np.sin(direction), np.cos(direction)], axis=-1)  # [T, 2]
    lower = 0.52 * length * np.cos(1.3 * curl)[:, None] * along
    upper = 0.48 * length * np.cos(2.8 * curl)[:, None] * along
    points = root + np.stack([0 * lower, lower, lower + upper], axis=1)  # [T, 3, 2]
    return *np.moveaxis(_to_image(motion, points), 1, 0), radius * motion.size


def _to_image(motion: Motion, points: np.ndarray) -> np.ndarray:
    """Points [T or 1, N, 2] of the hand, in palm half-widths -> [T, N, 2] in image heights."""
    size, pitch, turn = (a[:, None] for a in (motion.size, motion.pitch, motion.turn))
    x = points[..., 0] * size * motion.thumb_side
    y = -points[..., 1] * size * np.cos(pitch)
    turned = (x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn))
    return np.stack(turned, axis=-1) + motion.place[:, None]


def _capsule(start, end, start_radius, end_radius) -> np.ndarray:
    """The outline [T, corners, 2] of a sausage from `start` to `end` [T, 2] with radii [T]."""
    delta = end - start
    heading = np.arctan2(delta[:, 1], delta[:, 0])[:, None]
    half = heading + np.linspace(-np.pi / 2, np.pi / 2, _CORNERS // 2)  # [T, corners / 2]

    def cap(middle, radius, angle):
        arc = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return middle[:, None] + arc * np.broadcast_to(radius, len(middle))[:, None, None]

    return np.concatenate(
        [cap(end, end_radius, half), cap(start, start_radius, half + np.pi)], axis=1
    )


def _ellipse(middle, x_radius: float, y_radius: float) -> np.ndarray:
    """The outline [T, corners, 2] of an ellipse around `middle` [T, 2]."""
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    return middle[:, None] + np.stack([x_radius * np.cos(angle), y_radius * np.sin(angle)], axis=-1)


def _beside(points: np.ndarray, x: float, y: float) -> np.ndarray:
    return points + np.array((x, y))


def _person(rng, num_frames: int, skin, clothing) -> list:
    """Head, neck, shoulders and chest of somebody who sways a little."""
    sway = np.stack([wander(rng, num_frames, 8), 0.4 * wander(rng, num_frames, 8)], axis=-1)
    nod = np.stack([wander(rng, num_frames, 6), 0.5 * wander(rng, num_frames, 6)], axis=-1)
    x, y = rng.uniform(-0.15, 0.15), rng.uniform(0.5, 0.66)
    neck = np.array((x, y)) + rng.uniform(0, 0.012) * sway  # [T, 2]
    head = _beside(neck, 0, -0.26) + rng.uniform(0, 0.012) * nod
    tall, broad, shoulder = rng.uniform((0.16, 0.115, 0.24), (0.19, 0.14, 0.32))
    face = skin * rng.uniform(0.78, 0.95)
    hair = np.array((20, 30, 40)) * rng.uniform(0.5, 3)
    long = 0.12 if rng.random() < 0.3 else rng.uniform(0.02, 0.06)  # how far hair hangs down
    left, right = _beside(neck, -shoulder, 0.17), _beside(neck, shoulder, 0.17)
    chest, waist = _beside(neck, 0, 0.32), _beside(neck, 0, 1.0)
    eyes = (_beside(head, -0.4 * broad, -0.01), _beside(head, 0.4 * broad, -0.01))
    return [
        (_ellipse(_beside(head, 0, long / 2 - 0.04), broad + 0.025, tall + long / 2), hair),
        (_capsule(head, _beside(neck, 0, 0.1), 0.075, 0.085), face * 0.85),
        (_capsule(left, right, 0.11, 0.11), clothing),
        (_capsule(chest, waist, shoulder + 0.1, shoulder + 0.06), clothing),
        (_ellipse(_beside(head, 0, 0.02), broad, tall), face),
        *((_ellipse(eye, 0.018, 0.012), hair * 0.5) for eye in eyes),
        (_ellipse(_beside(head, 0, 0.04), 0.012, 0.03), face * 0.85),
        (_ellipse(_beside(head, 0, 0.11), 0.045, 0.012), face * 0.7),
    ]


def _clothing_colour(rng, skin) -> np.ndarray:
    """A colour on which this skin is well seen."""
    while True:
        brightness = rng.uniform(25, 225)
        if abs(brightness - skin.mean()) > 45:
            return np.clip(brightness * (1 + 0.35 * rng.uniform(-1, 1, 3)), 5, 245)


# ---- the room and its light ----


def _draw_room(rng, width: int) -> np.ndarray:
    """A wall with large soft things before it, uint8 [height + margins, width + margins, 3]."""
    height, width = IMAGE_HEIGHT + 2 * _MARGIN, width + 2 * _MARGIN
    tint = 1 + 0.15 * rng.uniform(-1, 1, 3)
    patches = rng.uniform(60, 215) + rng.uniform(5, 22) * rng.standard_normal((4, 6, 1))
    room = cv2.resize(
        (patches * tint).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    room = np.clip(room, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(1, 7)):
        middle, half = rng.uniform((0, 0), (width, height)), rng.uniform(6, 38, 2)
        colour = rng.uniform(40, 215) * (1 + 0.25 * rng.uniform(-1, 1, 3))
        outline = _BOX if rng.random() < 0.6 else _DISC
        cv2.fillConvexPoly(room, (middle + half * outline).astype(np.int32), colour.tolist())
    return cv2.GaussianBlur(room, (0, 0), rng.uniform(0.8, 3))


def _light(rng, width: int) -> np.ndarray:
    """Brightness factors, float32 [height, width, 3]: stronger from one side, darker corners."""
    y, x = np.mgrid[-1 : 1 : IMAGE_HEIGHT * 1j, -1 : 1 : width * 1j].astype(np.float32)
    slope = rng.uniform(0, 0.22) * np.exp(2j * np.pi * rng.random())
    light = 1 + slope.real * x + slope.imag * y - rng.uniform(0, 0.08) * (x**2 + y**2)
    colour = rng.uniform(0.82, 1.08) * (1 + 0.06 * rng.uniform(-1, 1, 3))
    return (light[..., None] * colour).astype(np.float32)
