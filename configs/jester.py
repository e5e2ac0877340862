"""RViT on 20BN-Jester: the reference's recipe to the letter.

    python -m rvit_jax.main --config=configs/jester.py       # the released archive's network
    python -m rvit_jax.main --config=configs/jester.py:v2    # the later source's network

`data/jester` holds the extracted download: `20bn-jester-v1/<id>/00001.jpg` and
`annotations/jester-v1-{train,validation,test}.csv`. The paper reports 92.31 % top-1 on the
validation split; it has not been measured with this code.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str | None = None) -> ConfigDict:
    """Returns the archive's network (linear attention) or, for "v2", the later source's."""
    config = base.get_config()  # whose defaults are the recipe
    if variant == "v2":
        config.model.attention = "softmax"
        config.model.readout = "class_and_hidden_tokens"
        config.model.head = "mlp"
        config.model.unused_reattention = True
    elif variant is not None:
        raise ValueError(f"configs/jester.py has no variant {variant!r}: leave it out, or say :v2")
    return config
