"""RViT on Charades: half a minute at home, several of 157 actions in each video.

    python -m rvit_jax.main --config=configs/charades.py      # RViT-XL, 64 frames
    python -m rvit_jax.main --config=configs/charades.py:l    # RViT-L, 32 frames

    # From a model trained on Kinetics-400, as is usual for a set of 7,985 videos:
    python -m rvit_jax.main --config=configs/charades.py --config.init_from=results/kinetics400

`data/charades` holds `Charades_v1_{train,test}.csv`, `Charades_v1_classes.txt` and
`Charades_v1_480/<id>.mp4`; its test split is "validation" here, as in what is published. Made for 8
GPUs of 80 GB; on fewer, a smaller --config.batch_size. The paper reports 66.1 mAP; it has not been
measured with this code. The sizes are derived from the paper's figures; the training recipe is not
in it: optimizer, schedule, views and epochs are ours.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str | None = None) -> ConfigDict:
    """Returns the config of RViT-XL or, for "l", of RViT-L."""
    if variant not in (None, "l"):
        raise ValueError(f"configs/charades.py has no variant {variant!r}: leave it out, or say :l")
    config = base.get_large_config(xl=variant is None)

    config.model.num_classes = 157

    config.dataset.name = "charades"
    config.dataset.data_dir = "data/charades"
    config.dataset.sampling = "random"  # labels are the whole video's: in evaluation, evenly spread
    config.dataset.augment.mirror_classes = "unchanged"  # no class depends on left and right

    config.loss.name = "binary_cross_entropy"  # each action for itself
    config.loss.label_smoothing = 0.0

    config.optimizer.warmup_epochs = 2.0
    return config
