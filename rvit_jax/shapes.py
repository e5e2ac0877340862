"""The letters of every shape in this repository, and the array types written with them.

    B  clips in a batch              N  patches of a frame: (H / P) * (W / P)
    T  frames of a clip              S  tokens of a frame: N + 1, the class token first
    H W  height and width, pixels    D  hidden size      A  heads      C  D / A
    P  side of a patch, pixels       L  layers           K  classes

Images are channels last. The annotations are checked at run time in the tests only.
"""

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

# What users hand over may come from NumPy.
HostOrDevice = jax.Array | np.ndarray

# Float in [-1, 1], or uint8 in [0, 255], which the model normalises itself.
Video = Float[HostOrDevice, "B T H W 3"] | UInt8[HostOrDevice, "B T H W 3"]
Frame = Float[HostOrDevice, "B H W 3"] | UInt8[HostOrDevice, "B H W 3"]
Tokens = Float[Array, "B S D"]
Projected = Float[Array, "B S Z"]  # Z = 3 D: queries, keys, values
OneToken = Float[Array, "B 1 D"]
Hidden = Float[Array, "L B S D"]
ClassTokens = Float[Array, "B D"]
Logits = Float[Array, "B K"]
NumFrames = Int[HostOrDevice, "B"]
Mask = Bool[HostOrDevice, "B"]
PRNGKey = Key[Array, ""]
