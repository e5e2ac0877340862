"""Checks a config at the edge; each message names the key, the value and the remedy.

Imported without JAX, which takes seconds that a wrong argument need not wait for.
"""

from typing import Any

from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import clips, label_maps, sampling, transforms, video_files
from input_pipeline.command_line import leaf_keys, suggest
from input_pipeline.jester import CLASS_NAMES

LEVELS = ("O0", "O1", "O2")  # see `precision`
ATTENTION_KINDS = ("linear", "softmax", "reattention")
_CHOICES = {
    "opt_level": LEVELS,
    "model.attention": ATTENTION_KINDS,
    "model.readout": ("class_token", "class_and_hidden_tokens"),
    "model.head": ("linear", "mlp"),
    "model.remat": ("none", "dots", "frames", "layers"),
    "model.schedule": ("auto", "frames", "layers"),
    "dataset.name": input_pipeline.NAMES,
    "dataset.sampling": sampling.SAMPLINGS,
    "dataset.resize": transforms.RESIZES,
    "dataset.decoder": transforms.DECODERS,
    "dataset.on_error": clips.ON_ERROR,
    "dataset.missing": video_files.MISSING,
    "dataset.augment.mirror_classes": label_maps.MIRROR_RULES,
    "dataset.short_clips": sampling.SHORT_CLIPS,
    "dataset.frame_packing": clips.FRAME_PACKINGS,
    "dataset.frame_order": sampling.FRAME_ORDERS,
    "optimizer.name": ("adamw", "adam", "sgd", "lamb"),
    "optimizer.schedule": ("step", "cosine", "constant"),
    "loss.name": ("smoothed_cross_entropy", "cross_entropy", "binary_cross_entropy"),
    "on_nonfinite": ("stop", "skip"),
}
_TEXTS = ("dataset.classes", "optimizer.frozen")  # other keys of several values hold numbers
# Least and greatest value, both allowed; None: no limit.
_RANGES = {
    "seed": (0, 2**32 - 1),
    "model.image_size": (1, None),
    "model.patch_size": (1, None),
    "model.hidden_size": (1, None),
    "model.num_layers": (1, None),
    "model.num_heads": (1, None),
    "model.mlp_dim": (1, None),
    "model.num_classes": (2, None),
    "model.segment_frames": (1, None),
    "model.dropout_rate": (0.0, 0.99),
    "model.block_dropout_rate": (0.0, 0.99),
    "dataset.num_frames": (1, None),
    "dataset.frame_stride": (1, None),
    "dataset.frame_rate": (0.01, 1e4),
    "dataset.num_workers": (0, None),
    "dataset.timeout_s": (0.0, None),
    "dataset.augment.time_reversal": (0.0, 1.0),
    "dataset.generate.train": (0, None),
    "dataset.generate.validation": (0, None),
    "dataset.generate.test": (0, None),
    "dataset.generate.seed": (0, None),
    "views.temporal": (1, None),
    "views.spatial": (1, None),
    "optimizer.learning_rate": (0.0, None),
    "optimizer.weight_decay": (0.0, None),
    "optimizer.warmup_epochs": (0.0, None),
    "optimizer.step_epochs": (1, None),
    "optimizer.step_factor": (0.0, None),
    "optimizer.clip_norm": (0.0, None),
    "optimizer.layer_decay": (0.0, 1.0),
    "optimizer.accumulation_steps": (1, None),
    "ema_decay": (0.0, 0.999999),
    "loss.label_smoothing": (0.0, 1.0),
    "batch_size": (1, None),
    "mesh.data": (-1, None),
    "mesh.fsdp": (1, None),
    "num_epochs": (1, None),
    "evaluate_every_epochs": (1, None),
    "checkpoint_every_steps": (0, None),
    "keep_checkpoints": (1, None),
}


def lookup(config: ConfigDict, dotted: str) -> Any:
    """The value of a dotted key; None where the config has no such key."""
    value = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, ConfigDict) else None
    return value


def check_choice(key: str, value: Any) -> None:
    """Raises ValueError where a dotted key of `_CHOICES` cannot have the value."""
    if value not in _CHOICES[key]:
        raise ValueError(f"config.{key}={value!r} is unknown{suggest(value, _CHOICES[key])}")


def check_model_config(model: ConfigDict) -> None:
    """Raises ValueError where `config.model` cannot make a model."""
    _check_values(ConfigDict({"model": model}))
    if model.image_size % model.patch_size:
        raise ValueError(
            f"config.model.image_size={model.image_size} is not divisible by "
            f"config.model.patch_size={model.patch_size}: frames are cut in whole patches; "
            f"take {_nearest_multiple(model.image_size, model.patch_size)}"
        )
    if model.hidden_size % model.num_heads:
        heads = [n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0]
        nearest = min(heads, key=lambda n: abs(n - model.num_heads))
        raise ValueError(
            f"config.model.num_heads={model.num_heads} does not divide "
            f"config.model.hidden_size={model.hidden_size}: heads share its channels evenly; "
            f"the nearest number that does is {nearest}"
        )
    if model.unused_reattention and model.attention == "reattention":
        raise ValueError(
            "config.model.unused_reattention=True is for attention 'linear' and 'softmax'; "
            "'reattention' uses these parameters: set it to False"
        )


def check_config(config: ConfigDict, reference: ConfigDict, *, training: bool = True) -> None:
    """Checks a whole config before anything is read or written.

    Args:
        config: the config of a run.
        reference: `configs/base.py`'s, which holds every key with a value of the right type.
        training: the model is made from the config, not taken from a checkpoint.

    Raises:
        ValueError: an unknown or missing key, a wrong type, a value out of range, or two values
            that contradict each other.
    """
    known, given = leaf_keys(reference), leaf_keys(config)
    for key in given:
        if key not in known:
            raise ValueError(f"config has no key {key!r}{suggest(key, known)}")
    for key in known:
        if key not in given:
            raise ValueError(f"config lacks the key {key!r}: start from configs/base.py")
        value, default = lookup(config, key), lookup(reference, key)
        fits = isinstance(value, type(default)) and not (
            isinstance(value, bool) and not isinstance(default, bool)
        )
        if not fits and not (isinstance(default, float) and isinstance(value, int)):
            raise ValueError(
                f"config.{key}={value!r} is {type(value).__name__}, expected "
                f"{type(default).__name__}, such as {default!r}"
            )
        if isinstance(default, tuple):
            _check_entries(key, value, default)
    _check_values(config)
    _check_dataset(config)
    if config.mesh.data == 0:
        raise ValueError("config.mesh.data=0: -1 takes all devices, 1 or more as many")
    if training:
        from rvit_jax.augment import check_options  # brings JAX

        check_model_config(config.model)
        _check_classes(config)
        _check_warmup(config)
        _check_accumulation(config)
        _check_label_smoothing(config, reference)
        check_options(config)
        clips.ClipOptions.from_config(config, training=True)  # refuses what is no clip
    if len(config.optimizer.betas) != 2 or not all(0 <= b < 1 for b in config.optimizer.betas):
        raise ValueError(f"config.optimizer.betas={config.optimizer.betas}: two numbers in [0, 1)")


def _check_entries(key: str, values: tuple[Any, ...], default: tuple[Any, ...]) -> None:
    """Raises ValueError where one of a key's several values is of the wrong type."""
    text = key in _TEXTS
    what = f"{'texts' if text else 'numbers'}{f', such as {default}' if default else ''}"
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, str) if text else number):
            raise ValueError(f"config.{key}={values!r}: {value!r} is wrong, expected {what}")


def _check_values(config: ConfigDict) -> None:
    """Choices and ranges of the keys that `config` has."""
    for key in leaf_keys(config):
        value = lookup(config, key)
        if key in _CHOICES:
            check_choice(key, value)
        least, most = _RANGES.get(key, (None, None))
        if (least is not None and not value >= least) or (most is not None and not value <= most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"config.{key}={value} is out of range: {limits}")


def _check_classes(config: ConfigDict) -> None:
    names = config.dataset.classes
    if config.dataset.name in ("jester", "jester_tfds", "gestures"):
        names = names or CLASS_NAMES
    if names and len(names) != config.model.num_classes:
        which = "names" if config.dataset.classes else "=() means Jester's"
        raise ValueError(
            f"config.dataset.classes {which} {len(names)} classes, but "
            f"config.model.num_classes={config.model.num_classes}: make them agree"
        )


def _check_warmup(config: ConfigDict) -> None:
    schedule, warmup = config.optimizer.schedule, config.optimizer.warmup_epochs
    if schedule == "step" and warmup != int(warmup):
        raise ValueError(
            f"config.optimizer.warmup_epochs={warmup}: schedule 'step' warms up by whole epochs"
        )
    if schedule == "cosine" and warmup >= config.num_epochs:
        raise ValueError(
            f"config.optimizer.warmup_epochs={warmup} must be below "
            f"config.num_epochs={config.num_epochs}"
        )


def _check_accumulation(config: ConfigDict) -> None:
    size, parts = config.batch_size, config.optimizer.accumulation_steps
    if size % parts:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - parts))
        raise ValueError(
            f"config.optimizer.accumulation_steps={parts} does not divide "
            f"config.batch_size={size}: the parts are equal; the nearest number that does is "
            f"{nearest}"
        )


def _check_label_smoothing(config: ConfigDict, reference: ConfigDict) -> None:
    smoothing, name = config.loss.label_smoothing, config.loss.name
    ignored = name != "smoothed_cross_entropy"
    if ignored and smoothing not in (0, reference.loss.label_smoothing):
        raise ValueError(
            f"config.loss.label_smoothing={smoothing} has no effect with config.loss.name={name!r}"
            ": leave it out, or take 'smoothed_cross_entropy'"
        )


def _check_dataset(config: ConfigDict) -> None:
    dataset = config.dataset
    if len(set(dataset.classes)) != len(dataset.classes):
        raise ValueError(f"config.dataset.classes names a class twice: {list(dataset.classes)}")
    if dataset.cache and dataset.num_workers:
        raise ValueError(
            "config.dataset.cache=True keeps clips in this process's memory: set "
            "config.dataset.num_workers=0 (threads decode), or cache=False"
        )


def _nearest_multiple(value: int, factor: int) -> int:
    return max(1, round(value / factor)) * factor
