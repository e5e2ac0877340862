"""RViT on Something-Something V2: 174 classes, many of them told apart by the direction of time.

    python -m rvit_jax.main --config=configs/ssv2.py       # RViT-L, 32 frames
    python -m rvit_jax.main --config=configs/ssv2.py:xl    # RViT-XL, 64 frames

`data/ssv2` holds the download: `20bn-something-something-v2/<id>.webm` (220,847 videos) and
`labels/{labels,train,validation,test}.json`. Made for 8 GPUs of 80 GB; on fewer, a smaller
--config.batch_size. The paper reports 66.1 % top-1 (L) and 67.9 % (XL) on the validation split; it
has not been measured with this code. The sizes are derived from the paper's figures (72.0 M and
107.7 M parameters); the training recipe is not in it: optimizer, schedule and epochs are ours.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str | None = None) -> ConfigDict:
    """Returns the config of RViT-L or, for "xl", of RViT-XL."""
    config = base.get_config()

    config.model.image_size = 224
    config.model.patch_size = 16
    config.model.hidden_size = 768
    config.model.num_layers = 8
    config.model.num_heads = 12
    config.model.mlp_dim = 3072
    config.model.num_classes = 174
    config.model.remat = "frames"

    config.dataset.name = "ssv2"
    config.dataset.data_dir = "data/ssv2"
    config.dataset.num_frames = 32
    config.dataset.sampling = "random"  # the whole action counts: in evaluation, evenly spread
    config.dataset.resize = "short_side"
    config.dataset.augment.horizontal_flip = 0.5  # left and right change places in the labels too
    config.dataset.num_workers = 16
    config.views.spatial = 3

    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.clip_norm = 1.0

    config.batch_size = 64
    config.num_epochs = 50

    if variant == "xl":
        config.model.num_layers = 12
        config.dataset.num_frames = 64
    elif variant is not None:
        raise ValueError(f"configs/ssv2.py has no variant {variant!r}: leave it out, or say :xl")
    return config
