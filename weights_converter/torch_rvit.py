"""RViT in PyTorch: the oracle of the parity tests, of `verify`, and the benchmark's baseline.

Our own module, with the module tree, the parameter names and the signature of the reference
(Jiewen-Yang/RViT, `model/RViT.py` and the module that its README prints), so that weights move
between the two by name. It computes as the reference does: a Python loop over frames, attention
through an [S, S] matrix. `torch.jit.script` and `torch.jit.trace` accept every variant, and
`.double()` makes it a float64 oracle.

Letters: B batch, T frames, H W pixels, P patch side, N patches, S = N + 1 tokens (class token
first), D hidden size, L layers, A heads, K classes.
"""

from typing import Final

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from rvit_jax.config import check_model_config


class HeadsLast(nn.Module):
    """Moves the head axis last, for the LayerNorm over heads."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, A, S, S] -> [B, S, S, A]."""
        return maps.permute(0, 2, 3, 1)


class HeadsFirst(nn.Module):
    """Moves the head axis back."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, S, S, A] -> [B, A, S, S]."""
        return maps.permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    """Linear, exact GELU, dropout, Linear, dropout."""

    def __init__(self, hidden_size: int, mlp_dim: int, dropout_rate: float):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(hidden_size, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout_rate),
            nn.Linear(mlp_dim, hidden_size),
            nn.Dropout(dropout_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return self.net(x)


class MultiHeadDotProductAttention(nn.Module):
    """The attention gate: queries, keys and values read the frame and the state at once.

    `carry_reattention` adds the re-attention parameters to a kind that does not use them, as the
    later source does.
    """

    num_heads: Final[int]
    is_linear: Final[bool]
    is_reattention: Final[bool]

    def __init__(self, hidden_size: int, num_heads: int, kind: str, carry_reattention: bool):
        super().__init__()
        self.num_heads = num_heads
        self.is_linear = kind == "linear"
        self.is_reattention = kind == "reattention"
        self.scale = (hidden_size // num_heads) ** -0.5
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_qkv_h = nn.Linear(hidden_size, 3 * hidden_size)
        self.elu = nn.ELU()
        self.to_out = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Dropout(0.0))
        if self.is_reattention or carry_reattention:
            self.reattn_weights = nn.Parameter(torch.randn(num_heads, num_heads))
            self.reattn_norm = nn.Sequential(HeadsLast(), nn.LayerNorm(num_heads), HeadsFirst())

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """[B, S, D] and [B, S, D], both normalised -> [B, S, D]."""
        batch, tokens, hidden_size = x.shape
        head_width = hidden_size // self.num_heads
        qkv = self.to_qkv(x) + self.to_qkv_h(hidden)  # [B, S, 3D]
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, A, S, D/A] each

        if self.is_linear:  # no scale, no normaliser
            maps = torch.matmul(self.elu(query) + 1.0, (self.elu(key) + 1.0).transpose(-1, -2))
        else:
            maps = torch.matmul(query * self.scale, key.transpose(-1, -2)).softmax(dim=-1)
        if self.is_reattention:
            maps = torch.einsum("bhij,hg->bgij", maps, self.reattn_weights)
            maps = self.reattn_norm(maps)

        out = torch.matmul(maps, value)  # [B, A, S, S] x [B, A, S, D/A]
        return self.to_out(out.transpose(1, 2).reshape(batch, tokens, hidden_size))


class Encoder1DBlock(nn.Module):
    """One layer on one frame."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        self.layer_norm_input = nn.LayerNorm(config.hidden_size)
        self.layer_norm_hidden = nn.LayerNorm(config.hidden_size)
        self.layer_norm_out = nn.LayerNorm(config.hidden_size)
        self.attention = MultiHeadDotProductAttention(
            config.hidden_size, config.num_heads, config.attention, config.unused_reattention
        )
        self.mlp = FeedForward(config.hidden_size, config.mlp_dim, config.block_dropout_rate)
        self.drop_out_attention = nn.Dropout(config.block_dropout_rate)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and state [B, S, D], positions added -> tokens, the state plus the gate."""
        gate = self.attention(self.layer_norm_input(x), self.layer_norm_hidden(hidden))
        y = x + self.drop_out_attention(gate)
        return y + self.mlp(self.layer_norm_out(y)), gate + hidden


class Encoder(nn.Module):
    """All layers on one frame. The same positions enter every layer and every layer's state."""

    state_keeps_positions: Final[bool]

    def __init__(self, config: ConfigDict):
        super().__init__()
        self.state_keeps_positions = config.state_keeps_positions
        self.dropout = nn.Dropout(config.dropout_rate)
        # The reference wraps each block in a list of its own; names read `layers.{l}.0.`.
        self.layers = nn.ModuleList(
            nn.ModuleList([Encoder1DBlock(config)]) for _ in range(config.num_layers)
        )

    def forward(
        self, x: Tensor, hidden: list[Tensor], pos_embedding: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, S, D], L states [B, S, D], [1, S, D] -> tokens [B, S, D], L new states."""
        new_hidden: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            # A list of modules too. (TorchScript, which reads this, wants no word behind the code.)
            for block in layer:  # type: ignore[attr-defined]
                x = self.dropout(x + pos_embedding)
                x, state = block(x, hidden[index] + pos_embedding)
                new_hidden.append(state if self.state_keeps_positions else state - pos_embedding)
        return x, new_hidden


class MLPHead(nn.Module):
    """The later source's head on F features: MLP, Linear."""

    def __init__(self, hidden_size: int, num_classes: int, dropout_rate: float):
        super().__init__()
        self.mlp = FeedForward(hidden_size, 4 * hidden_size, dropout_rate)
        self.class_ = nn.Linear(hidden_size, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, K]."""
        return self.class_(self.mlp(features))


class TorchRViT(nn.Module):
    """RViT from `config.model`, initialised as PyTorch does it.

    Linear and Conv: uniform in +-1/sqrt(fan-in), weight and bias; learned tokens, positions and
    re-attention weights: unit normal; LayerNorm: ones and zeros.

    Raises:
        ValueError: see `config.check_model_config`.
    """

    num_layers: Final[int]
    concatenates: Final[bool]
    has_mlp_head: Final[bool]
    learned_hidden_token: Final[bool]

    def __init__(self, config: ConfigDict):
        super().__init__()
        check_model_config(config)
        hidden_size, layers = config.hidden_size, config.num_layers
        self.num_layers = layers
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.concatenates = config.readout == "class_and_hidden_tokens"
        self.has_mlp_head = config.head == "mlp"
        self.learned_hidden_token = config.learned_hidden_token

        self.embedding = nn.Conv2d(3, hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_embedding = nn.Parameter(torch.randn(1, self.num_patches + 1, hidden_size))
        self._cls = nn.Parameter(torch.randn(1, 1, hidden_size))
        self._seq = nn.Parameter(torch.randn(layers, 1, 1, hidden_size))
        self.transformer = Encoder(config)
        features = (layers + 1) * hidden_size if self.concatenates else hidden_size
        if self.has_mlp_head:
            self.fc = MLPHead(features, config.num_classes, config.block_dropout_rate)
        else:
            self.to_cls_token = nn.Identity()
            self.classifier = nn.Sequential(
                nn.LayerNorm(features), nn.Linear(features, config.num_classes)
            )

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros [L, B, N, D], as `forward` takes them for the start of a clip."""
        hidden_size = self.pos_embedding.shape[2]
        return self.pos_embedding.new_zeros(
            self.num_layers, batch_size, self.num_patches, hidden_size
        )

    def forward(
        self, video: Tensor, state: Tensor, num_frames: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reads whole clips.

        Args:
            video: [B*T, 3, H, W] float in [-1, 1], clip by clip: row b*T + t is frame t of clip b.
            state: [L, B, N, D]; token 0 of the start (`_seq`) is prepended here.
            num_frames: [B] integers in 1..T; a clip's state and read-out freeze at its last real
                frame. The reference has no such argument. None: all T frames are real.

        Returns:
            Logits [B, K] and state [L, B, S, D].
        """
        batch = state.shape[1]
        frames = video.shape[0] // batch
        tokens = self.embed(video).unflatten(0, (batch, frames))  # [B, T, S, D]
        first = self._seq.expand(-1, batch, -1, -1)  # [L, B, 1, D]
        if not self.learned_hidden_token:
            first = torch.zeros_like(first)
        hidden = list(torch.cat([first, state], dim=2).unbind(0))  # L x [B, S, D]
        last = tokens[:, 0, 0]  # [B, D], replaced at frame 0

        for t in range(frames):
            x, new_hidden = self.transformer(tokens[:, t], hidden, self.pos_embedding)
            if num_frames is None:
                last, hidden = x[:, 0], new_hidden
            else:
                real = (num_frames > t).unsqueeze(1)  # [B, 1]
                last = torch.where(real, x[:, 0], last)
                pairs = zip(new_hidden, hidden, strict=True)
                hidden = [torch.where(real.unsqueeze(2), new, old) for new, old in pairs]

        stacked = torch.stack(hidden)  # [L, B, S, D]
        return self.read_out(last, stacked), stacked

    def embed(self, video: Tensor) -> Tensor:
        """Frames [B*T, 3, H, W] -> tokens [B*T, S, D], patches row by row."""
        patches = self.embedding(video).flatten(2).transpose(1, 2)
        return torch.cat([self._cls.expand(patches.shape[0], -1, -1), patches], dim=1)

    def read_out(self, class_token: Tensor, hidden: Tensor) -> Tensor:
        """The last frame's class token [B, D] and the state [L, B, S, D] -> logits [B, K]."""
        if self.concatenates:  # token 0 of every layer's state follows
            parts = torch.cat([class_token.unsqueeze(0), hidden[:, :, 0]])  # [L+1, B, D]
            features = parts.transpose(0, 1).flatten(1)  # [B, (L+1)*D]
        else:
            features = class_token
        if self.has_mlp_head:
            return self.fc(features)
        return self.classifier(self.to_cls_token(features))
