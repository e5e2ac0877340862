"""The letters of every shape in this repository, and the array types written with them.

    B  clips in a batch              N  patches of a frame: (H / P) * (W / P)
    T  frames of a clip              S  tokens of a frame: N + 1, the class token first
    H W  height and width, pixels    D  hidden size      A  heads      C  D / A
    P  side of a patch, pixels       L  layers           K  classes

Images are channels last. The annotations are checked at run time in the tests only.
"""

from jaxtyping import Array, Bool, Float, Int, Key, UInt8

# Float in [-1, 1], or uint8 in [0, 255], which the model normalises itself.
Video = Float[Array, "B T H W 3"] | UInt8[Array, "B T H W 3"]
Frame = Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"]
Tokens = Float[Array, "B S D"]
Hidden = Float[Array, "L B S D"]
ClassTokens = Float[Array, "B D"]
Logits = Float[Array, "B K"]
NumFrames = Int[Array, "B"]
Mask = Bool[Array, "B"]
PRNGKey = Key[Array, ""]
