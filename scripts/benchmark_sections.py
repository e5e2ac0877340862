"""What `scripts/benchmark.py` measures: a function for each section, which yields its rows.

The loader's section stands in `benchmark_loader.py`.

A row is what one measurement adds to its section of benchmark.json; seconds, bytes and fractions.
"""

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import benchmark_contenders as sides
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import logging as absl_logging
from benchmark_contenders import DTYPES, EAGER, OURS, Run, Settings
from benchmark_report import Row, fitted_exponent, medians, speedup, speedups, spread
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from rvit_jax import RViT
from rvit_jax.config import LEVELS
from rvit_jax.profile import count_parts

LOGITS_BAR = 1e-3  # x max abs logit: float32 contenders further apart are not the same function
TRAINING_BAR = 1e-3  # relative, of loss and gradient norm without dropout
DROPOUT_BAR = 0.25  # relative, of first losses that differ by their random numbers alone
MIN_ROUNDS = 3
MIN_TURN_S = 0.1  # faster calls are repeated within a turn
PAUSE_S = 0.02  # before each turn: threads of the one before stop waiting for more work
STREAM_WARM_UP = 3  # frames at the start of each clip that are not counted
MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that sets the peak
BATCH_SIZES = (1, 4, 8)  # of inference; the first two with --quick
SCALING_SIZES: dict[tuple[str, str], tuple[int, ...]] = {
    ("inference", "num_frames"): (8, 18, 36, 72, 144, 288),
    ("inference", "batch_size"): (1, 2, 4, 8),
    ("inference", "num_layers"): (2, 4, 8, 12),
    ("training", "num_frames"): (8, 36, 288),
}


def configure(settings: Settings) -> None:
    """Sets both frameworks alike; before either has computed anything."""
    warnings.filterwarnings("ignore", module=r"torch(\.|$)")
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Both frameworks share a GPU: neither may take it whole at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured
    if settings.num_devices > 1:
        jax.config.update("jax_num_cpu_devices", settings.num_devices)
    if jax.default_backend() == "gpu":
        tf32 = settings.matmul_precision == "tf32"
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "highest")
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


# ---------------------------------------------------------------------------------- taking turns


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation, built and run in.

    Attributes:
        name: as the tables show it.
        run: one call.
        result: of the first call.
        first_call_s: seconds of building and of the first call, compiling included.
        call_s: seconds of a later call, roughly.
    """

    name: str
    run: Run
    result: Any
    first_call_s: float
    call_s: float


def build(name: str, make: Callable[[], Run]) -> Contender:
    """Builds a contender and runs it in."""
    start = time.perf_counter()
    run = make()
    result = run()
    first_call_s = time.perf_counter() - start
    if isinstance(result, torch.Tensor):
        result = result.clone()  # a CUDA graph's next call writes over it
    run()  # TorchScript optimises in its second call
    return Contender(name, run, result, first_call_s, time_calls(run, 1)[0])


def build_all(makers: sides.Makers) -> tuple[list[Contender], dict[str, str]]:
    """The contenders, and why those are missing that failed; ours and eager must not."""
    if "torch.compile" in makers:
        torch.compiler.reset()  # forgets other batch sizes, which would make its code more general
    contenders, failed = [], {}
    for name, make in makers.items():
        if name.startswith("torch.compile"):
            note(f"{name}: compiling, up to minutes")
        try:
            contenders.append(build(name, make))
        except Exception as error:
            if name.startswith(OURS) or name == EAGER:
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            note(f"{name} is left out: {failed[name]}")
    return contenders, failed


def measure(
    contenders: Sequence[Contender],
    settings: Settings,
    what: str,
    *,
    seed: int,
    calls: int | None = None,
    skip: int = 0,
) -> dict[str, list[list[float]]]:
    """Lets contenders take turns; name -> round -> seconds of each call.

    Args:
        contenders: built.
        settings: rounds and time limit.
        what: for the progress bar.
        seed: of the order within each round.
        calls: in one turn; by default as many as fill `MIN_TURN_S`.
        skip: calls at the start of each turn that are not counted.
    """
    rng = np.random.default_rng(seed)
    samples: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    start = time.monotonic()
    gc.collect()
    gc.disable()
    try:
        for index in progress(range(settings.rounds), what):
            for turn in rng.permutation(len(contenders)):
                contender = contenders[turn]
                number = calls or max(1, math.ceil(MIN_TURN_S / contender.call_s))
                time.sleep(PAUSE_S)
                samples[contender.name].append(time_calls(contender.run, number)[skip:])
            if time.monotonic() - start > settings.seconds and index + 1 >= MIN_ROUNDS:
                break
    finally:
        gc.enable()
    return samples


def time_calls(run: Run, number: int) -> list[float]:
    """Seconds of each of `number` calls."""
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar on stderr; a line where that is no terminal."""
    if sys.stderr.isatty():
        return tqdm(items, desc=what, leave=False, mininterval=0.5)
    note(what)
    return items


def note(text: str) -> None:
    """A line on stderr."""
    tqdm.write(text, file=sys.stderr)


def contenders_row(
    contenders: Sequence[Contender],
    failed: dict[str, str],
    rounds: dict[str, list[float]],
    further: dict[str, Row],
    **head: Any,
) -> Row:
    """`head`, each contender's figures with its `further` ones, and our speedups."""
    return {
        **head,
        "contenders": {
            contender.name: {
                **spread(rounds[contender.name]),
                **further[contender.name],
                "first_call_s": contender.first_call_s,
            }
            for contender in contenders
        },
        "speedups": speedups(rounds),
        "failed": failed,
    }


# ------------------------------------------------------------------------------------- inference


def relative_error(reference: np.ndarray, values: np.ndarray) -> float:
    """The largest difference, in units of the largest absolute value of `reference`."""
    return float(np.abs(values - reference).max() / np.abs(reference).max())


def check_logits(
    reference: np.ndarray, logits: dict[str, np.ndarray], dtype: str, settings: Settings
) -> dict[str, float]:
    """Relative errors by contender, told on stderr too.

    Raises:
        ValueError: contenders compute different functions.
    """
    errors = {name: relative_error(reference, values) for name, values in logits.items()}
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    note(f"{dtype} logits against ours in float32: {told}")
    if dtype == "float32" and settings.matmul_precision == "float32":
        for name, error in errors.items():
            _check_same(f"{name}: its logits", error, LOGITS_BAR)
    return errors


def _check_same(what: str, error: float, bar: float) -> None:
    if not error <= bar:  # a NaN is no agreement either
        raise ValueError(
            f"{what} differ by {error:.1e}, above {bar:g}: what computes something else is not "
            "worth timing"
        )


def measure_inference(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """Whole clips at several batch sizes."""
    for dtype in settings.dtypes:
        peak = matrix_peak(dtype)
        for batch_size in BATCH_SIZES[:2] if settings.quick else BATCH_SIZES:
            yield inference_row(config, settings, batch_size, dtype, peak)


def inference_row(
    config: ConfigDict, settings: Settings, batch_size: int, dtype: str, peak: float
) -> Row:
    """One batch size and dtype; `peak` in FLOP/s."""
    video = sides.make_video(config, batch_size)
    contenders, failed = build_all(sides.inference(config, settings, video, dtype))
    logits = {contender.name: sides.to_host(contender.result) for contender in contenders}
    errors = check_logits(sides.reference_logits(config, video), logits, dtype, settings)
    what = f"inference, B = {batch_size}, {dtype}"
    rounds = medians(measure(contenders, settings, what, seed=config.seed))
    num_frames = video.shape[1]
    work = flops_per_frame(config.model)["needed"] * batch_size * num_frames
    further = {}
    for name, seconds in rounds.items():
        median = float(np.median(seconds))
        further[name] = {
            "clips_per_s": batch_size / median,
            "share_of_matrix_peak": work / median / peak,
            "relative_error": errors[name],
        }
    head = {"batch_size": batch_size, "num_frames": num_frames, "dtype": dtype}
    return contenders_row(contenders, failed, rounds, further, **head, matrix_peak_flops_per_s=peak)


def matrix_peak(dtype: str) -> float:
    """FLOP/s of the faster framework in one large matrix product, the best of several."""
    device = sides.torch_device()
    size = MATRIX_SIZES[device.type]
    random = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    ours = jnp.asarray(random, dtype)
    theirs = torch.from_numpy(random).to(device, DTYPES[dtype])
    product = jax.jit(jnp.matmul)

    def run_torch() -> None:
        torch.matmul(theirs, theirs)
        sides.synchronise()

    best = math.inf
    for run in (lambda: product(ours, ours).block_until_ready(), run_torch):
        run()
        best = min(best, *time_calls(run, 8))
    return 2 * size**3 / best


def flops_per_frame(model: ConfigDict) -> dict[str, int]:
    """Floating-point operations in the matrix products of one frame of one clip.

    "reference": as the reference does it, every token of every layer, attention through its
    S x S weights. "needed": linear attention as q (k^T v), and the last layer's MLP for its class
    token alone. The read-out's head is left out.
    """
    needed = count_parts(nnx.eval_shape(lambda: RViT(model, rngs=nnx.Rngs(0))))
    num_patches = (model.image_size // model.patch_size) ** 2
    tokens, size = num_patches + 1, model.hidden_size
    embedding = 2 * num_patches * 3 * model.patch_size**2 * size
    projections = 2 * tokens * size * 7 * size  # q, k, v of the frame and of the state; output
    attention = 4 * tokens * tokens * size
    if model.attention == "reattention":
        attention += 2 * tokens * tokens * model.num_heads**2
    mlp = 4 * tokens * size * model.mlp_dim
    return {
        "reference": embedding + model.num_layers * (projections + attention + mlp),
        "needed": sum(part.flops for part in needed if part.every_frame),
    }


# -------------------------------------------------------------------------------------- training


def measure_training(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """One optimizer step at B = 4, with the config's dropout.

    Raises:
        ValueError: the contenders do not make the same step.
    """
    batch = sides.make_batch(config, 4)
    errors = training_errors(config, batch)
    if settings.matmul_precision == "float32":
        for name, error in errors.items():
            _check_same(f"training step: its {name} and PyTorch's", error, TRAINING_BAR)
    for dtype in settings.dtypes:
        yield training_row(config, settings, batch, dtype, errors)


def training_row(
    config: ConfigDict,
    settings: Settings,
    batch: sides.Batch,
    dtype: str,
    errors: dict[str, float],
) -> Row:
    """One dtype; `errors` of the float32 step without dropout."""
    contenders, failed = build_all(sides.training(config, settings, batch, dtype))
    first = {contender.name: mean_loss(contender.result) for contender in contenders}
    for name, loss in first.items():
        error = abs(loss / first[OURS] - 1)
        _check_same(f"training step: first losses of {name} and ours", error, DROPOUT_BAR)
    rounds = medians(measure(contenders, settings, f"training, B = 4, {dtype}", seed=config.seed))
    return contenders_row(
        contenders,
        failed,
        rounds,
        {name: {"first_loss": loss} for name, loss in first.items()},
        batch_size=batch["video"].shape[0],
        num_frames=batch["video"].shape[1],
        dtype=dtype,
        relative_errors_without_dropout=errors,
    )


def training_errors(config: ConfigDict, batch: sides.Batch) -> dict[str, float]:
    """Relative errors of the first step's loss and gradient norm, without dropout."""
    config = config.copy_and_resolve_references()
    config.model.update(dropout_rate=0.0, block_dropout_rate=0.0)
    config.optimizer.clip_norm = 0.0
    theirs = sides.TorchTraining(config, batch)
    their_loss = float(theirs())
    sums = sides.jax_training(config, batch)()
    errors = {
        "loss": abs(mean_loss(sums) / their_loss - 1),
        "gradient_norm": abs(float(sums["grad_norm"]) / theirs.gradient_norm() - 1),
    }
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    note(f"training step against PyTorch's, without dropout: {told}")
    return errors


def mean_loss(result: Any) -> float:
    """Over the clips, from what either side's step returns."""
    return float(result["loss"] / result["clips"] if isinstance(result, dict) else result)


# ------------------------------------------------------------------------------------- precision


def measure_precision(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """Our step of training at each `opt_level`, at B = 4 on one device: time and bytes."""
    batch = sides.make_batch(config, 4)
    levels, contenders = {}, []
    for level in progress(LEVELS, "precision: compiling"):
        compiled, run, kept = sides.compile_training(config, batch, level)
        levels[level] = {**kept, **planned_bytes(compiled)}
        contenders.append(build(level, lambda run=run: run))
    rounds = medians(measure(contenders, settings, "precision", seed=config.seed))
    for level, seconds in rounds.items():
        levels[level].update(spread(seconds), speedup=speedup(rounds["O0"], seconds))
    size, frames = batch["video"].shape[:2]
    yield {"batch_size": size, "num_frames": frames, "levels": levels}


# ------------------------------------------------------------------------------------- streaming


def measure_streaming(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """Latency of one frame at B = 1."""
    for dtype in settings.dtypes:
        yield streaming_row(config, settings, dtype)


def streaming_row(config: ConfigDict, settings: Settings, dtype: str) -> Row:
    """One dtype. The figures per round are medians of its frames; p50 and p95 are of all frames."""
    video = sides.make_video(config, 1)
    num_frames = video.shape[1]
    contenders, failed = build_all(sides.streaming(config, settings, video, dtype))
    logits = {}
    for contender in contenders:
        contender.run.t = 0
        logits[contender.name] = sides.to_host([contender.run() for _ in range(num_frames)][-1])
    errors = check_logits(sides.reference_logits(config, video), logits, dtype, settings)
    skip = min(STREAM_WARM_UP, num_frames - 1)
    what = f"streaming, {dtype}"
    samples = measure(contenders, settings, what, seed=config.seed, calls=num_frames, skip=skip)
    further = {}
    for name, turns in samples.items():
        p50, p95 = np.percentile(np.concatenate(turns), [50, 95]).tolist()
        further[name] = {"p50_s": p50, "p95_s": p95, "relative_error": errors[name]}
    head = {"batch_size": 1, "num_frames": num_frames, "dtype": dtype}
    row = contenders_row(contenders, failed, medians(samples), further, **head)
    return {**row, "flops": step_flops(config, dtype)}


def step_flops(config: ConfigDict, dtype: str) -> dict[str, float | None]:
    """Of one frame at B = 1: XLA's count for the compiled step, and the counts by hand."""
    model = sides.make_model(config, dtype)
    frame = sides.make_video(config, 1, 1)[:, 0].astype(jnp.dtype(dtype))
    compiled, _ = sides.compile_call(model, "step", frame, model.initial_hidden(1))
    counted = (compiled.cost_analysis() or {}).get("flops")
    by_hand = flops_per_frame(config.model)
    share = None if counted is None else counted / by_hand["reference"]
    return {"xla_of_step": counted, **by_hand, "xla_over_reference": share}


# --------------------------------------------------------------------------------------- scaling


def measure_scaling(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """Our model over one size at a time, float32; the others are B = 1 and the config's T, L.

    The operations themselves grow faster than L: of the last layer's MLP most is not needed.
    """
    for (what, over), values in SCALING_SIZES.items():
        if settings.quick:
            if what == "training":
                continue
            values = values[:2]
        title = f"scaling, {what} over {over}"
        points, contenders = {}, []
        for value in progress(values, f"{title}: compiling"):
            scaled = config.copy_and_resolve_references()
            if over == "num_layers":
                scaled.model.num_layers = value
            elif over == "num_frames":
                scaled.dataset.num_frames = value
            batch_size = value if over == "batch_size" else 1
            figures, run = compile_one(scaled, what, batch_size)
            flops = flops_per_frame(scaled.model)["needed"] * scaled.dataset.num_frames * batch_size
            points[str(value)] = {over: value, "forward_flops": flops, **figures}
            contenders.append(build(str(value), lambda run=run: run))
        rounds = medians(measure(contenders, settings, title, seed=config.seed))
        for value, seconds in rounds.items():
            points[value].update(spread(seconds))
        yield {
            "what": what,
            "over": over,
            "points": list(points.values()),
            "exponent": fitted_exponent(values, [p["median_s"] for p in points.values()]),
            "flops_exponent": fitted_exponent(
                values, [p["forward_flops"] for p in points.values()]
            ),
        }


def compile_one(config: ConfigDict, what: str, batch_size: int) -> tuple[Row, Run]:
    """Seconds of tracing and compiling, XLA's memory in bytes; and a call of what was compiled."""
    if what == "training":
        batch = sides.make_batch(config, batch_size)
        start = time.perf_counter()
        compiled, run, _ = sides.compile_training(config, batch)
    else:
        model = sides.make_model(config)
        video = jax.device_put(sides.make_video(config, batch_size))
        start = time.perf_counter()
        compiled, run = sides.compile_call(model, "__call__", video)
    return {"compile_s": time.perf_counter() - start, **planned_bytes(compiled)}, run


def planned_bytes(compiled: jax.stages.Compiled) -> Row:
    """XLA's own account of a program's memory; None where it gives none."""
    analysis = compiled.memory_analysis()
    return {
        f"{name}_bytes": getattr(analysis, f"{field}_size_in_bytes", None)
        for name, field in (("temporary", "temp"), ("argument", "argument"))
    }


# ---------------------------------------------------------------------------------------- memory


def measure_memory(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """Peaks of processes of their own, each of which runs one implementation at B = 4."""
    context = multiprocessing.get_context("spawn")
    work = ("inference",) if settings.quick else ("inference", "training")
    cases = [(what, side) for what in work for side in (OURS, EAGER)]
    for what, side in progress(cases, "memory"):
        ignore = (signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C means, this process decides
        with ProcessPoolExecutor(1, context, signal.signal, ignore) as pool:
            figures = pool.submit(peak_memory, config, settings, what, side, 4).result()
        head = {"batch_size": 4, "num_frames": config.dataset.num_frames}
        yield {"what": what, "implementation": side, **head, **figures}


def peak_memory(
    config: ConfigDict, settings: Settings, what: str, side: str, batch_size: int
) -> dict[str, int | None]:
    """Bytes that this process, which has done nothing else, holds at most in steady calls."""
    configure(settings)
    before = process_memory("VmRSS")
    if what == "training":
        make = sides.jax_training if side == OURS else sides.TorchTraining
        run = make(config, sides.make_batch(config, batch_size))
    else:
        make = sides.jax_inference if side == OURS else sides.torch_inference
        run = make(config, sides.make_video(config, batch_size))
    time_calls(run, 2)
    gc.collect()
    on_gpu = sides.torch_device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM counts from here
    time_calls(run, 3)
    device_peak = None
    if on_gpu and side == OURS:
        device_peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    elif on_gpu:
        device_peak = torch.cuda.max_memory_allocated()
    return {
        "rss_before_bytes": before,
        "peak_rss_bytes": process_memory("VmHWM"),
        "device_peak_bytes": device_peak,
    }


def process_memory(field: str) -> int:
    """Bytes by a field of Linux's /proc/self/status; elsewhere, the peak since the start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


SECTIONS: dict[str, Callable[[ConfigDict, Settings], Iterator[Row]]] = {
    "inference": measure_inference,
    "training": measure_training,
    "precision": measure_precision,
    "streaming": measure_streaming,
    "scaling": measure_scaling,
    "memory": measure_memory,
}
