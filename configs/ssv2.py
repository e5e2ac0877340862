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
    if variant not in (None, "xl"):
        raise ValueError(f"configs/ssv2.py has no variant {variant!r}: leave it out, or say :xl")
    config = base.get_large_config(xl=variant == "xl")

    config.model.num_classes = 174

    config.dataset.name = "ssv2"
    config.dataset.data_dir = "data/ssv2"
    config.dataset.sampling = "random"  # the whole action counts: in evaluation, evenly spread
    return config
