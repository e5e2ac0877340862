"""What `scripts/benchmark.py` times: the same model and the same work in JAX and in PyTorch.

Every function here makes a `Run`, which does its work once and returns when the result is there.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from ml_collections import ConfigDict

from rvit_jax import RViT, losses, optimizer, precision, sharding, steps
from rvit_jax.model import CompiledRViT
from rvit_jax.schedule import resolve
from weights_converter import mapping, run_archive
from weights_converter.torch_rvit import TorchRViT

OURS, EAGER = "rvit_jax", "PyTorch eager"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Run = Callable[[], Any]
Makers = dict[str, Callable[[], Run]]  # name -> what builds it
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: turns of each contender.
        seconds: after which a measurement starts no further round.
        num_devices: host devices that share a batch, on the CPU.
        torch_compile: whether torch.compile takes part.
        quick: fewer and smaller measurements.
        dtypes: of the arithmetic. bfloat16 is all of it in PyTorch's inference and streaming, all
            but what `rvit_jax.precision` lists in ours; in training it is ours at level O1 and
            PyTorch's autocast.
        matmul_precision: of float32 products on a GPU, both sides: "float32" or "tf32".
    """

    rounds: int = 20
    seconds: float = 40.0
    num_devices: int = 1
    torch_compile: bool = True
    quick: bool = False
    dtypes: tuple[str, ...] = ("float32",)
    matmul_precision: str = "float32"


def torch_device() -> torch.device:
    """Where PyTorch runs: on the kind of device that JAX runs on.

    Raises:
        ValueError: it cannot.
    """
    backend = jax.default_backend()
    if backend == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    if backend == "cpu":
        return torch.device("cpu")
    raise ValueError(
        f"JAX runs on {backend}, where PyTorch {torch.__version__} cannot: install PyTorch for "
        "it, or compare on the CPU with JAX_PLATFORMS=cpu"
    )


def synchronise() -> None:
    """Waits for PyTorch's GPU, where it runs on one."""
    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def make_oracle(config: ConfigDict, dtype: str = "float32") -> TorchRViT:
    """PyTorch's model, in evaluation mode; its weights are drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    return TorchRViT(config.model).eval().to(torch_device(), DTYPES[dtype])


def make_model(
    config: ConfigDict, dtype: str = "float32", layout: sharding.Layout | None = None
) -> RViT:
    """The same weights in our model, in evaluation mode, whole on each device of the layout."""
    torch.manual_seed(config.seed)
    weights = {name: w.numpy() for name, w in TorchRViT(config.model).state_dict().items()}
    flat = mapping.to_flax(weights, config.model)
    model = RViT(config.model, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(config.seed))
    model.eval()
    mapping.load_into(model, {path: array.astype(jnp.dtype(dtype)) for path, array in flat.items()})
    if layout is not None:
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, layout.place(state, whole=True))
    return model


@dataclasses.dataclass(frozen=True)
class Variant:
    """How ours runs.

    Attributes:
        schedule: `config.model.schedule`.
        layout: the devices that share each batch.
    """

    schedule: str
    layout: sharding.Layout


def our_variants(config: ConfigDict, batch_size: int, settings: Settings) -> dict[str, Variant]:
    """Name -> variant: the config's own, the other order of computing, several devices."""
    own, number = config.model.schedule, settings.num_devices
    other = {"frames": "layers", "layers": "frames"}[resolve(own)]
    one = layout_of(config, batch_size, 1)
    variants = {OURS: Variant(own, one), f"{OURS}, {other}": Variant(other, one)}
    if number > 1 and batch_size % number == 0:
        several = layout_of(config, batch_size, number)
        variants[f"{OURS}, {number} devices"] = Variant(own, several)
    return variants


def layout_of(config: ConfigDict, batch_size: int, num_devices: int) -> sharding.Layout:
    """The first so many devices, sharing batches as in a run of training."""
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size
    config.mesh.update(data=num_devices, fsdp=1)
    return sharding.make_layout(config)


def torch_variants(
    settings: Settings, *, training: bool = False
) -> dict[str, Callable[[torch.nn.Module], Callable]]:
    """Name -> a function that makes a faster callable of a module."""
    variants: dict[str, Callable] = {EAGER: lambda module: module}
    if not training:
        variants["TorchScript frozen"] = lambda module: torch.jit.freeze(torch.jit.script(module))
    if settings.torch_compile:
        # dynamic=False: each batch size gets code of its own, the fastest.
        variants["torch.compile"] = functools.partial(torch.compile, dynamic=False)
        if torch_device().type == "cuda":
            variants["torch.compile, CUDA graphs"] = functools.partial(
                torch.compile, dynamic=False, mode="reduce-overhead"
            )
    return variants


def make_video(config: ConfigDict, batch_size: int, num_frames: int | None = None) -> np.ndarray:
    """Noise, float32 [B, T, H, W, 3] in [-1, 1]."""
    side = config.model.image_size
    shape = (batch_size, num_frames or config.dataset.num_frames, side, side, 3)
    rng = np.random.default_rng(config.seed)
    return rng.uniform(-1.0, 1.0, shape).astype(np.float32)


def make_batch(config: ConfigDict, batch_size: int, num_frames: int | None = None) -> Batch:
    """The same with labels, as the input pipeline gives it: uint8."""
    video = make_video(config, batch_size, num_frames)
    label = np.random.default_rng(config.seed).integers(0, config.model.num_classes, batch_size)
    return {
        "video": ((video + 1.0) * 127.5).round().astype(np.uint8),
        "label": label.astype(np.int32),
        "num_frames": np.full(batch_size, video.shape[1], np.int32),
        "mask": np.ones(batch_size, np.bool_),
    }


def for_torch(video: np.ndarray) -> torch.Tensor:
    """`run_archive.for_torch` in PyTorch's own memory order."""
    return run_archive.for_torch(video).contiguous()


def to_host(values: jax.Array | torch.Tensor | np.ndarray) -> np.ndarray:
    """The values in float32."""
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def reference_logits(config: ConfigDict, video: np.ndarray) -> np.ndarray:
    """Ours in full float32: what every contender's logits [B, K] are compared with."""
    with jax.default_matmul_precision("highest"):
        return to_host(CompiledRViT(make_model(config))(video)[0])


def capture(function: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Records what `function` does as a CUDA graph; returns it and the outputs that it refills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # JAX has threads of its own, which may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function()
    return graph, outputs


def varied(config: ConfigDict, variant: Variant | None) -> tuple[ConfigDict, Variant]:
    """The config as the variant wants it; without one, as it is."""
    if variant is None:
        return config, Variant(config.model.schedule, layout_of(config, 1, 1))
    config = config.copy_and_resolve_references()
    config.model.schedule = variant.schedule
    return config, variant


# ------------------------------------------------------------------------------------- inference


def jax_inference(
    config: ConfigDict, video: np.ndarray, dtype: str = "float32", variant: Variant | None = None
) -> Run:
    """Clips that lie on the device -> logits, as a user calls a loaded model."""
    config, variant = varied(config, variant)
    compiled = CompiledRViT(make_model(config, dtype, variant.layout))
    video = jax.device_put(video.astype(jnp.dtype(dtype)), variant.layout.rows)
    return lambda: jax.block_until_ready(compiled(video))[0]


def torch_inference(
    config: ConfigDict,
    video: np.ndarray,
    dtype: str = "float32",
    make: Callable[[torch.nn.Module], Callable] = lambda module: module,
) -> Run:
    """The same in PyTorch; `make` makes a faster callable of the oracle."""
    oracle = make_oracle(config, dtype)
    frames = for_torch(video).to(torch_device(), DTYPES[dtype])
    state = oracle.initial_state(len(video)).detach()
    with torch.inference_mode():
        function = make(oracle)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        logits, _ = function(frames, state)
        synchronise()
        return logits

    return run


def torch_inference_graph(config: ConfigDict, video: np.ndarray, dtype: str) -> Run:
    """The eager oracle as one CUDA graph."""
    oracle = make_oracle(config, dtype)
    frames = for_torch(video).to(torch_device(), DTYPES[dtype])
    state = oracle.initial_state(len(video)).detach()
    graph, outputs = capture(lambda: oracle(frames, state))

    def run() -> torch.Tensor:
        graph.replay()
        synchronise()
        return outputs[0]

    return run


def inference(config: ConfigDict, settings: Settings, video: np.ndarray, dtype: str) -> Makers:
    """All contenders for clips [B, T, H, W, 3]."""
    partial = functools.partial
    makers: Makers = {
        name: partial(jax_inference, config, video, dtype, variant)
        for name, variant in our_variants(config, len(video), settings).items()
    }
    for name, make in torch_variants(settings).items():
        makers[name] = partial(torch_inference, config, video, dtype, make)
    if torch_device().type == "cuda":
        makers["PyTorch CUDA graph"] = partial(torch_inference_graph, config, video, dtype)
    return makers


# -------------------------------------------------------------------------------------- training


def our_train_step(
    config: ConfigDict, level: str, layout: sharding.Layout
) -> tuple[Callable, steps.TrainState]:
    """The training step of an `opt_level`, not compiled, and the state of step 0."""
    schedule = optax.constant_schedule(config.optimizer.learning_rate)
    adamw = optimizer.make_optimizer(config.optimizer, schedule)
    adamw = precision.make_optimizer_for(level, adamw)
    model = make_model(config)
    model.dtype, dtype = precision.compute_dtype(level), precision.param_dtype(level)
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    graphdef, state = steps.create_train_state(model, adamw)
    train_step = steps.make_train_step(
        graphdef,
        adamw,
        losses.make_loss(config.loss),
        seed=config.seed,
        ragged=False,
        spread=layout.spread,
    )
    return train_step, layout.place(state)


def jax_training(
    config: ConfigDict, batch: Batch, dtype: str = "float32", variant: Variant | None = None
) -> Run:
    """A step on a batch that lies on the device; returns the sums of `steps`, loss among them."""
    config, variant = varied(config, variant)
    level = {"float32": "O0", "bfloat16": "O1"}[dtype]
    train_step, state = our_train_step(config, level, variant.layout)
    train_step = variant.layout.compile_step(train_step)
    batch = variant.layout.send(batch)

    def run() -> dict[str, jax.Array]:
        nonlocal state
        state, sums = jax.block_until_ready(train_step(state, batch))
        return sums

    return run


class TorchTraining:
    """The same step in PyTorch; a call returns the loss.

    Attributes:
        oracle: in training mode; its gradients are those of the last step.
    """

    def __init__(
        self,
        config: ConfigDict,
        batch: Batch,
        make: Callable[[torch.nn.Module], Callable] = lambda module: module,
        dtype: str = "float32",
    ):
        """`make` makes a faster callable of the oracle; bfloat16 is PyTorch's autocast."""
        self._dtype = dtype
        recipe, device = config.optimizer, torch_device()
        smoothed = config.loss.name == "smoothed_cross_entropy"
        self._smoothing = config.loss.label_smoothing if smoothed else 0.0
        self._clip_norm = recipe.clip_norm
        self.oracle = make_oracle(config).train()
        self._function = make(self.oracle)
        self._adamw = torch.optim.AdamW(
            self.oracle.parameters(),
            lr=recipe.learning_rate,
            betas=tuple(recipe.betas),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._frames = for_torch(batch["video"]).to(device)  # uint8
        self._label = torch.from_numpy(batch["label"]).long().to(device)
        self._state = self.oracle.initial_state(len(self._label)).detach()

    def __call__(self) -> torch.Tensor:
        """One step."""
        video = (self._frames.float() / 255.0 - 0.5) / 0.5
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self._dtype != "float32"):
            logits, _ = self._function(video, self._state)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), self._label, label_smoothing=self._smoothing
        )
        self._adamw.zero_grad()
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self.oracle.parameters(), self._clip_norm)
        self._adamw.step()
        synchronise()
        return loss.detach()

    def gradient_norm(self) -> float:
        """Of the last step, over all parameters."""
        gradients = [p.grad for p in self.oracle.parameters() if p.grad is not None]
        return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def training(config: ConfigDict, settings: Settings, batch: Batch, dtype: str) -> Makers:
    """All contenders for a step on `batch`, from uint8 frames on the device."""
    partial = functools.partial
    makers: Makers = {
        name: partial(jax_training, config, batch, dtype, variant)
        for name, variant in our_variants(config, len(batch["label"]), settings).items()
    }
    for name, make in torch_variants(settings, training=True).items():
        makers[name] = partial(TorchTraining, config, batch, make, dtype)
    return makers


# ------------------------------------------------------------------------------------- streaming


class OracleStep(torch.nn.Module):
    """The oracle frame by frame, with the signature of our `step`."""

    def __init__(self, oracle: TorchRViT):
        super().__init__()
        self.oracle = oracle

    def forward(
        self, frame: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame [B, 3, H, W] and state [L, B, S, D] -> logits [B, K] and the new state."""
        states = list(hidden.unbind(0))
        tokens = self.oracle.embed(frame)
        x, states = self.oracle.transformer(tokens, states, self.oracle.pos_embedding)
        stacked = torch.stack(states)
        return self.oracle.read_out(x[:, 0], stacked), stacked


class Stream:
    """Feeds a clip to a step, one frame a call, again and again; the answer comes to the host.

    Attributes:
        t: the next frame.
    """

    def __init__(self, step: Callable, frames: Sequence[Any], initial_hidden: Any):
        self.t = 0
        self._step, self._frames, self._initial_hidden = step, frames, initial_hidden
        self._hidden = initial_hidden

    def __call__(self) -> np.ndarray | torch.Tensor:
        """Returns the logits [1, K] after one more frame."""
        if self.t == 0:
            self._hidden = self._initial_hidden
        logits, self._hidden = self._step(self._frames[self.t], self._hidden)
        self.t = (self.t + 1) % len(self._frames)
        return logits.cpu() if isinstance(logits, torch.Tensor) else np.asarray(logits)


def torch_step(make: Callable[[torch.nn.Module], Callable], module: OracleStep) -> Callable:
    """A step that takes its frame from the host."""
    with torch.inference_mode():
        function = make(module)

    @torch.inference_mode()
    def step(frame: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return function(frame.to(hidden.device), hidden)

    return step


def torch_step_graph(module: OracleStep, frame: torch.Tensor, hidden: torch.Tensor) -> Callable:
    """The eager step as a CUDA graph that keeps the state in place."""
    frame_buffer, hidden_buffer = frame.to(hidden.device), hidden.clone()

    def step_in_place() -> torch.Tensor:
        logits, new_hidden = module(frame_buffer, hidden_buffer)
        hidden_buffer.copy_(new_hidden)
        return logits

    graph, logits = capture(step_in_place)

    def step(frame: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if hidden is not hidden_buffer:
            hidden_buffer.copy_(hidden)
        frame_buffer.copy_(frame)
        graph.replay()
        return logits, hidden_buffer

    return step


def streaming(config: ConfigDict, settings: Settings, video: np.ndarray, dtype: str) -> Makers:
    """All contenders for a stream of the frames of `video` [1, T, H, W, 3] on the host."""
    model = make_model(config, dtype)
    initial = model.initial_hidden(1)
    frames = list(np.moveaxis(video.astype(jnp.dtype(dtype)), 1, 0))  # T times [1, H, W, 3]
    makers: Makers = {OURS: lambda: Stream(CompiledRViT(model).step, frames, initial)}

    module = OracleStep(make_oracle(config, dtype)).eval()
    hidden = torch.from_numpy(to_host(initial).copy()).to(torch_device(), DTYPES[dtype])
    images = list(for_torch(video).to(DTYPES[dtype]).unsqueeze(1))  # T times [1, 3, H, W]
    for name, make in torch_variants(settings).items():
        if name != "torch.compile, CUDA graphs":  # it overwrites the state that is handed back
            makers[name] = lambda make=make: Stream(torch_step(make, module), images, hidden)
    if hidden.is_cuda:
        makers["PyTorch CUDA graph"] = lambda: Stream(
            torch_step_graph(module, images[0], hidden), images, hidden
        )
    return makers


# --------------------------------------------------------------------- compiled ahead of time


def compile_call(model: RViT, method: str, *arguments: Any) -> tuple[jax.stages.Compiled, Run]:
    """A method of our model, compiled for these arguments, and a call of it."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)

    def call(leaves: list[jax.Array], *arguments: Any) -> Any:
        return getattr(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)), method)(*arguments)

    compiled = jax.jit(call).lower(leaves, *arguments).compile()
    return compiled, lambda: jax.block_until_ready(compiled(leaves, *arguments))


def compile_training(
    config: ConfigDict, batch: Batch, level: str = "O0"
) -> tuple[jax.stages.Compiled, Run, dict[str, int]]:
    """Our training step, compiled for this batch, a call of it, and bytes of what it keeps."""
    batch = jax.device_put(batch)
    train_step, state = our_train_step(config, level, layout_of(config, 1, 1))
    leaves, treedef = jax.tree.flatten(state)
    kept = {
        f"{name}_bytes": sum(array.nbytes for array in jax.tree.leaves(tree))
        for name, tree in (("parameter", state.params), ("optimizer", state.opt_state))
    }

    def update(leaves: list[jax.Array], batch: dict[str, jax.Array]) -> list[jax.Array]:
        state, _ = train_step(jax.tree.unflatten(treedef, leaves), batch)
        return jax.tree.leaves(state)

    compiled = jax.jit(update, donate_argnums=0).lower(leaves, batch).compile()

    def run() -> None:
        nonlocal leaves
        leaves = jax.block_until_ready(compiled(leaves, batch))

    return compiled, run, kept
