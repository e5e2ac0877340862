"""Small configs and models for the tests."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

import rvit_jax
from configs import base
from input_pipeline.files import write_json
from rvit_jax.checkpoint import describe_model


def small_config(**model) -> ConfigDict:
    """The base config with a model of a few thousand parameters and `model`'s keys changed."""
    config = base.get_config()
    config.model.update(
        image_size=16, patch_size=8, hidden_size=16, num_heads=4, mlp_dim=24, num_classes=5
    )
    config.model.update(model)
    return config


def small_model(*, seed: int = 0, **model) -> rvit_jax.RViT:
    """A small model in evaluation mode."""
    built = rvit_jax.RViT(small_config(**model).model, rngs=nnx.Rngs(seed))
    built.eval()
    return built


def random_video(num_clips: int, num_frames: int, side: int = 16, *, seed: int = 0) -> jax.Array:
    """float32 [B, T, H, W, 3] in [-1, 1]."""
    shape = (num_clips, num_frames, side, side, 3)
    video = np.random.default_rng(seed).uniform(-1.0, 1.0, shape)
    return jax.numpy.asarray(video, jax.numpy.float32)


def saved_model(
    folder: Path, *, seed: int = 0, class_names: Sequence[str] | None = None, **model
) -> Path:
    """A checkpoint folder with a small untrained model, as `rvit_jax.load` takes it."""
    if class_names is not None:
        model["num_classes"] = len(class_names)
    config = small_config(**model)
    config.dataset.num_frames = 6
    built = small_model(seed=seed, **model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "params", nnx.to_pure_dict(nnx.state(built)))
    names = class_names or [f"class {index}" for index in range(config.model.num_classes)]
    write_json(folder / "model.json", {**describe_model(config, names), "step": 0, "metrics": None})
    return folder
