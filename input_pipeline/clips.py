"""What becomes of one clip: its frames are chosen, decoded, resized and laid out."""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from input_pipeline import label_maps, sampling, transforms
from input_pipeline.cpus import in_threads
from input_pipeline.order import Place
from input_pipeline.source import Source, VideoInfo

Clip = dict[str, Any]

FRAME_PACKINGS = ("rgb", "channel_planes")
ON_ERROR = ("fail", "skip")


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """What makes a clip of a video; each attribute is the config key of the same name.

    Attributes:
        training: draw what may be random; else every reading of a clip gives the same.
    """

    image_size: int
    num_frames: int
    frame_stride: int = 1
    frame_rate: float = 12.0
    sampling: str = "head"
    short_clips: str = "repeat_last"
    length_buckets: tuple[int, ...] = ()
    frame_packing: str = "rgb"
    frame_order: str = "forward"
    resize: str = "squash"
    decoder: str = "pillow"
    on_error: str = "fail"
    temporal_views: int = 1
    spatial_views: int = 1
    time_reversal: float = 0.0
    frame_rate_jitter: tuple[float, float] = (1.0, 1.0)
    seed: int = 0
    training: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict, *, training: bool) -> ClipOptions:
        """Takes the options from a whole config; there is one view in training."""
        dataset = config.dataset
        views = {} if training else config.views
        return cls(
            image_size=config.model.image_size,
            num_frames=dataset.num_frames,
            frame_stride=dataset.frame_stride,
            frame_rate=dataset.frame_rate,
            sampling=dataset.sampling,
            short_clips=dataset.short_clips,
            length_buckets=tuple(dataset.length_buckets) if training else (),
            frame_packing=dataset.frame_packing,
            frame_order=dataset.frame_order,
            resize=dataset.resize,
            decoder=dataset.decoder,
            on_error=dataset.on_error,
            temporal_views=views.get("temporal", 1),
            spatial_views=views.get("spatial", 1),
            time_reversal=dataset.augment.time_reversal,
            frame_rate_jitter=tuple(dataset.augment.frame_rate_jitter),
            seed=config.seed,
            training=training,
        )

    def __post_init__(self):
        """Refuses values that cannot be, and two that cannot go together."""
        for key, choices in (
            ("sampling", sampling.SAMPLINGS),
            ("short_clips", sampling.SHORT_CLIPS),
            ("frame_packing", FRAME_PACKINGS),
            ("frame_order", sampling.FRAME_ORDERS),
            ("resize", transforms.RESIZES),
            ("decoder", transforms.DECODERS),
            ("on_error", ON_ERROR),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"dataset.{key} is {getattr(self, key)!r}; choose one of: {', '.join(choices)}"
                )
        if self.frame_packing == "channel_planes" and self.short_clips == "ragged":
            raise ValueError(
                "dataset.frame_packing=channel_planes mixes the planes of all T frames, so every "
                "clip must have T: set dataset.short_clips=repeat_last"
            )
        jitters, spread = self.frame_rate_jitter != (1.0, 1.0), ("uniform", "random")
        in_order = self.frame_order == "forward" and self.frame_packing == "rgb"
        if self.training and (self.time_reversal > 0 or jitters) and not in_order:
            raise ValueError(
                "dataset.augment.time_reversal and frame_rate_jitter need frames in their order: "
                "set dataset.frame_order=forward and dataset.frame_packing=rgb"
            )
        if self.training and jitters and self.sampling in spread:
            raise ValueError(
                "dataset.augment.frame_rate_jitter has no effect with "
                f"dataset.sampling={self.sampling}, whose frames are spread over the whole video: "
                "set it to (1.0, 1.0), or sampling to 'dense'"
            )
        if self.length_buckets and self.short_clips != "ragged":
            raise ValueError(
                f"dataset.length_buckets={self.length_buckets} are for clips of several lengths, "
                f"but dataset.short_clips={self.short_clips} gives all of them "
                f"{self.num_frames} frames: set it to 'ragged', or length_buckets to ()"
            )
        buckets = list(self.length_buckets)
        if buckets != sorted(set(buckets)) or not set(buckets) <= {*range(1, self.num_frames + 1)}:
            raise ValueError(
                f"dataset.length_buckets is {self.length_buckets}; expected numbers of frames that "
                f"rise from 1 to at most dataset.num_frames={self.num_frames}"
            )
        if self.temporal_views > 1 and self.sampling == "head":
            raise ValueError(
                f"views.temporal={self.temporal_views} asks for clips from other places of a "
                "video, but dataset.sampling=head takes its beginning alone: set it to 'dense', "
                "'uniform' or 'random'"
            )
        if self.spatial_views > 1 and self.resize != "short_side":
            raise ValueError(
                f"views.spatial={self.spatial_views} asks for crops along a frame's longer side, "
                f"but dataset.resize={self.resize} leaves none: set it to 'short_side'"
            )

    @property
    def draws(self) -> bool:
        """Whether a clip may come out otherwise in another epoch."""
        return self.training and (
            self.sampling in ("random", "dense")
            or self.resize == "short_side"
            or self.time_reversal > 0
            or self.frame_rate_jitter != (1.0, 1.0)
        )


class ClipReader:
    """Reads a clip by its index in the source: -> uint8 [T, H, W, 3], or [V, T, H, W, 3] in views.

    With `cache`, a clip's pixels stay in memory after its first reading. Threads may share one.
    """

    def __init__(self, source: Source, options: ClipOptions, *, cache: bool = False):
        """Reads nothing yet.

        Raises:
            ValueError: a cache of clips that are drawn anew each epoch.
        """
        if cache and options.draws:
            raise ValueError(
                "dataset.cache keeps each clip as it was first read, but it is drawn anew each "
                f"epoch (dataset.sampling={options.sampling}, dataset.resize={options.resize}, "
                f"augment.time_reversal={options.time_reversal}, augment.frame_rate_jitter="
                f"{options.frame_rate_jitter}): set dataset.cache=False"
            )
        # Also a check: the classes must be known, and the range possible.
        self._reversed = None
        if options.training and options.time_reversal:
            self._reversed = label_maps.reversal_map(source.class_names)
        label_maps.jitter_stride(1.0, options.frame_rate_jitter, random=np.random.default_rng(0))
        self._source = source
        self._options = options
        self._cache: dict[int, Clip] | None = {} if cache else None
        self._locks: dict[int, threading.Lock] = {}
        size, views = options.image_size, options.temporal_views * options.spatial_views
        shape = (options.num_frames, size, size, 3)
        self._no_video = np.zeros(shape if views == 1 else (views, *shape), np.uint8)

    def __call__(self, place: Place) -> Clip:
        """Returns the clip of a place, or for padding a row of zeros with `mask` False."""
        index, epoch, num_frames = place
        clip = self._empty(clip_id="") if index < 0 else self._clip(index, epoch)
        if not num_frames:
            return clip
        clip = dict(clip)  # in training there is one view
        for key in ("video", "frame_indices"):
            clip[key] = clip[key][:num_frames]
        return clip

    def lengths(self) -> np.ndarray:
        """The bucket of each clip: the least number of frames a batch must have to hold it.

        With frame-rate jitter that of the most frames it may come to. A clip that cannot be read
        takes all frames under `on_error="skip"`.

        Returns:
            int [num_clips]; each is one of `length_buckets`, or `num_frames`.

        Raises:
            ValueError: a clip cannot be read; the message names it.
            FileNotFoundError: it is gone.
        """
        buckets = np.array([*self._options.length_buckets, self._options.num_frames])
        source = self._source
        counts = in_threads(
            self._most_frames,
            len(source.ids),
            progress=f"looking up the lengths of {source.name}",
            delay_s=3.0,
        )
        most = np.fromiter(counts, np.int64)
        return buckets[np.searchsorted(buckets, most)]

    def _most_frames(self, index: int) -> int:
        options = self._options
        try:
            info = self._source.video_info(index)
        except (ValueError, FileNotFoundError):
            if options.on_error == "skip":
                return options.num_frames
            raise
        indices = sampling.choose_frames(
            info,
            options.sampling,
            options.num_frames,
            stride=options.frame_stride * options.frame_rate_jitter[0],
            frame_rate=options.frame_rate,
        )
        return len(indices)

    def _clip(self, index: int, epoch: int) -> Clip:
        if self._cache is None:
            return self._read(index, epoch)
        # One lock a clip: reading ahead into the next epoch may ask for a clip in the making.
        with self._locks.setdefault(index, threading.Lock()):
            if index not in self._cache:
                self._cache[index] = self._read(index, epoch)
            return self._cache[index]

    def _empty(self, clip_id: str) -> Clip:
        labels = self._source.labels
        no_label = -1 if labels is None or labels.ndim == 1 else np.zeros_like(labels[0])
        views = self._no_video.shape[:-4]
        return {
            "video": self._no_video,
            "label": no_label,
            "num_frames": np.ones(views, np.int32),
            "frame_indices": np.full((*views, self._options.num_frames), -1, np.int32),
            "mask": False,
            "id": clip_id,
        }

    def _read(self, index: int, epoch: int) -> Clip:
        """Decodes a clip."""
        clip_id = self._source.ids[index]
        try:
            video, num_frames, indices, label = self._decode(index, epoch)
        except (ValueError, FileNotFoundError) as error:
            if self._options.on_error == "skip":
                logging.warning("skipping the clip %s: %s", clip_id, error)
                return self._empty(clip_id)
            raise
        except Exception as error:
            # Above all a StopIteration, which Grain would take for the end of the data, and
            # anything that could not travel from a worker process to this one.
            raise RuntimeError(
                f"reading the clip {clip_id!r} of the {self._source.name} split failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        return {
            "video": video,
            "label": label,
            "num_frames": num_frames,
            "frame_indices": indices,
            "mask": True,
            "id": clip_id,
        }

    def _decode(
        self, index: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int | np.ndarray]:
        """The video, its number of real frames, which of the source they are, and the label."""
        options, labels = self._options, self._source.labels
        random = None
        if options.training:
            random = label_maps.clip_generator(options.seed, epoch, self._source.ids[index])
        chosen: list[np.ndarray] = []  # per temporal view
        label = -1 if labels is None else labels[index]

        def choose(info: VideoInfo) -> np.ndarray:
            nonlocal label
            for view in range(options.temporal_views):
                indices, label = self._choose(index, info, view, label, random)
                chosen.append(indices)
            return np.unique(np.concatenate(chosen))

        frames = self._source.read(index, choose)
        where = {frame: row for row, frame in enumerate(np.unique(np.concatenate(chosen)).tolist())}
        place = None if random is None else random.random()  # of the crop, one for all frames
        video = self._no_video.copy()
        rows = video.reshape(-1, *video.shape[-4:])  # [V, T, H, W, 3]
        for spatial in range(options.spatial_views):
            centre = (spatial + 0.5) / options.spatial_views if place is None else place
            resize = functools.cache(
                lambda row, centre=centre: transforms.resize_array(
                    frames[row],
                    options.image_size,
                    options.resize,
                    centre,
                    decoder=options.decoder,
                )
            )
            for temporal, indices in enumerate(chosen):
                row = rows[temporal * options.spatial_views + spatial]
                for t, frame in enumerate(indices.tolist()):
                    row[t] = resize(where[frame])
        if options.frame_packing == "channel_planes":
            rows[:] = [transforms.pack_channel_planes(row) for row in rows]
        return video, *self._describe(chosen, video.shape[:-4]), label

    def _describe(
        self, chosen: list[np.ndarray], views: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Number of frames [] or [V], and which they are, [T] or [V, T]; -1 behind the last."""
        options = self._options
        each = [indices for indices in chosen for _ in range(options.spatial_views)]
        num_frames = np.array([len(indices) for indices in each], np.int32)
        padded = np.full((len(each), options.num_frames), -1, np.int32)
        for row, indices in zip(padded, each, strict=True):
            row[: len(indices)] = indices
        return num_frames.reshape(views), padded.reshape(*views, options.num_frames)

    def _choose(
        self,
        index: int,
        info: VideoInfo,
        view: int,
        label: int | np.ndarray,
        random: np.random.Generator | None,
    ) -> tuple[np.ndarray, int | np.ndarray]:
        """The frames of a view, and the label of what they show."""
        options, stride = self._options, float(self._options.frame_stride)
        if random is not None:
            stride = label_maps.jitter_stride(stride, options.frame_rate_jitter, random=random)
        indices = sampling.choose_frames(
            info,
            options.sampling,
            options.num_frames,
            stride=stride,
            frame_rate=options.frame_rate,
            place=(view + 0.5) / options.temporal_views,
            random=random,
        )
        indices = sampling.order_frames(
            indices, options.frame_order, seed=options.seed, clip_id=self._source.ids[index]
        )
        if self._reversed is not None:
            assert random is not None  # in training there is one
            indices, label = label_maps.reverse_at_random(
                indices,
                label,
                self._reversed,
                probability=options.time_reversal,
                random=random,
            )
        if options.short_clips == "repeat_last":
            indices = sampling.repeat_last(indices, options.num_frames)
        return indices, label
