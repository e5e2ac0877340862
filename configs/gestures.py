"""A small RViT that learns generated gestures on a laptop.

python -m rvit_jax.main --config=configs/gestures.py        # 8 classes that differ in time only
python -m rvit_jax.main --config=configs/gestures.py:all    # Jester's 27 classes

The clips are drawn on the first run. Decoded clips are kept in memory: 2.8 GB for the eight
classes, 6.8 GB for the 27 (--config.dataset.cache=False decodes them in every epoch instead).
"""

from ml_collections import ConfigDict

from configs import base

# Four pairs; the clips of each pair are the other's run backwards.
TIME_CLASSES = (
    "Swiping Left",
    "Swiping Right",
    "Swiping Down",
    "Swiping Up",
    "Pushing Hand Away",
    "Pulling Hand In",
    "Turning Hand Clockwise",
    "Turning Hand Counterclockwise",
)


def get_config(variant: str | None = None) -> ConfigDict:
    """Returns the config for the eight classes, or, for "all", for the 27."""
    config = base.get_config()

    config.model.image_size = 48
    config.model.patch_size = 12
    config.model.hidden_size = 96
    config.model.num_heads = 4
    config.model.mlp_dim = 384
    config.model.num_classes = len(TIME_CLASSES)
    config.model.attention = "softmax"
    config.model.readout = "class_and_hidden_tokens"
    config.model.block_dropout_rate = 0.0

    config.dataset.name = "gestures"
    config.dataset.data_dir = "data/gestures"
    config.dataset.classes = TIME_CLASSES
    config.dataset.num_frames = 15  # every third frame of 28 to 43: 10 to 15
    config.dataset.frame_stride = 3
    config.dataset.short_clips = "ragged"
    config.dataset.cache = True
    config.dataset.generate.train = 24_576
    config.dataset.generate.validation = 2_048
    config.dataset.generate.test = 2_048

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.3
    config.optimizer.clip_norm = 1.0

    config.batch_size = 64
    config.num_epochs = 2
    config.test_after_training = True

    if variant == "all":
        config.model.image_size = 64  # for the fingers
        config.model.patch_size = 16
        config.model.hidden_size = 128
        config.model.mlp_dim = 512
        config.model.num_classes = 27
        config.dataset.classes = ()
        config.dataset.data_dir = "data/gestures_all"
        config.dataset.generate.train = 32_768
        config.dataset.generate.test = 4_096
        config.num_epochs = 10
    elif variant is not None:
        raise ValueError(
            f"configs/gestures.py has no variant {variant!r}: leave it out, or say :all"
        )
    return config
