"""What a model costs: parameters, operations, memory and time, part by part.

    python -m rvit_jax.profile --config=FILE|--checkpoint=DIR [--config.model.KEY=VALUE ...]
        [--batch_size=1] [--frames=T] [--seconds=1] [--json] [--debug]

FLOPs are those of the matrix products, a multiplication and an addition as two; normalisation,
softmax, GELU and sums are left out, a few percent. For one frame, in the letters of
`rvit_jax/shapes.py`, with M the MLP's inner size:

    patch embedding        2 N 3P^2 D
    a layer's attention    2 S D 3D for the frame, the same for the state, 2 S D D on the way out,
                           and between tokens
                               linear        2 S D C + 2 S D C      k^T v, then q (k^T v)
                               softmax       2 S S D + 2 S S D      q k^T, then the weighted values
                               reattention   softmax's + 2 A A S S  the mixing of the heads
    a layer's MLP          2 S D M + 2 S M D; in the last layer of the class token alone, S = 1
    read-out, F features   linear head 2 F K; mlp head 2 F 4F + 2 4F F + 2 F K, where F is D, or
                           (L + 1) D for readout "class_and_hidden_tokens"

A clip in one call reads out once, after its last frame; frame by frame, every step reads out. XLA's
own count of the compiled step, elementwise operations included, is printed beside it.

Milliseconds are medians of compiled calls on data that lies on the device. Each part is also timed
alone, as a program of its own, by turns with the whole step, so that a busy machine slows all
alike. The parts need not add up: the compiler joins some of them, and every program costs a call.
So the sum is printed beside the whole, and neither is scaled to fit the other.
"""

from input_pipeline.command_line import leave_at_once, own_flags

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from configs import base
from rvit_jax import precision
from rvit_jax.checkpoint import load
from rvit_jax.command import ArgumentError, parse, run, start
from rvit_jax.config import check_config
from rvit_jax.layers import MLP, UnusedParam
from rvit_jax.model import EncoderBlock, RViT

LEAST_REPEATS = 5

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a compiled function, and what to give it


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model.

    Attributes:
        name: for people.
        parameters: numbers in it.
        flops: of one frame of one stream, see the module's docstring.
        every_frame: False for what a clip in one call computes once.
    """

    name: str
    parameters: int
    flops: int
    every_frame: bool = True


def count_parts(model: RViT) -> list[Part]:
    """The model's parts, in the order of the computation; together they are all of it."""
    tokens = model.class_token, model.pos_embedding, model.hidden_class_token
    num_patches, size = model.num_patches, model.class_token.shape[-1]
    patch_values = 3 * model.patch_embedding.patch_size**2
    parts = [
        Part(
            "patch embedding",
            _size(model.patch_embedding),
            2 * num_patches * patch_values * size,
        ),
        Part("tokens, positions", sum(token.size for token in tokens), 0),
    ]
    for index, layer in enumerate(model.layers):
        last = index == len(model.layers) - 1
        norms = _size(layer.norm_input) + _size(layer.norm_hidden)
        parts += [
            Part(
                f"layer {index}: attention",
                norms + _size(layer.attention),
                attention_flops(layer, num_patches + 1, size),
            ),
            Part(
                f"layer {index}: MLP",
                _size(layer.norm_out) + _size(layer.mlp),
                _mlp_flops(layer.mlp, 1 if last else num_patches + 1),
            ),
        ]
    head_flops = _matrix_flops(model.head.dense, 1)
    if hasattr(model.head, "mlp"):
        head_flops += _mlp_flops(model.head.mlp, 1)
    parts.append(Part("read-out", _size(model.head), head_flops, every_frame=False))
    return parts


def attention_flops(layer: EncoderBlock, num_tokens: int, size: int) -> int:
    """FLOPs of one layer's attention gate, for one frame of `num_tokens` S tokens of `size` D."""
    gate = layer.attention
    projections = sum(
        _matrix_flops(matrix, num_tokens)
        for matrix in (gate.to_qkv, gate.to_qkv_hidden, gate.to_out)
    )
    if gate.kind == "linear":
        return projections + 2 * (2 * num_tokens * size * (size // gate.num_heads))
    between_tokens = 2 * (2 * num_tokens**2 * size)
    if gate.kind == "reattention":
        between_tokens += 2 * gate.num_heads**2 * num_tokens**2
    return projections + between_tokens


def _mlp_flops(mlp: MLP, rows: int) -> int:
    return _matrix_flops(mlp.dense_in, rows) + _matrix_flops(mlp.dense_out, rows)


def _matrix_flops(dense: nnx.Linear, rows: int) -> int:
    return 2 * rows * dense.kernel.size


def _size(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))


def profile_model(
    model: RViT,
    *,
    batch_size: int = 1,
    num_frames: int,
    seconds: float = 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Counts, compiles and times a model; on JAX's default device.

    Args:
        model: in either mode; it is measured in evaluation mode and left as it is.
        batch_size: streams, or clips, of each call.
        num_frames: of a clip.
        seconds: that the step with its parts is timed, and the clip, at least; everything is
            called 5 times or more.
        say: told what begins.

    Returns:
        A dict that JSON can hold. Bytes, milliseconds and FLOPs; `parts` holds the rows of
        `count_parts` with `ms_alone`, at this batch size, `total` their sums.
    """
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    model.eval()
    parts = count_parts(model)
    side = model.image_size
    random = np.random.default_rng(0)
    shape = (batch_size, num_frames, side, side, 3)
    video = jnp.asarray(random.integers(0, 256, shape, np.uint8))
    hidden = model.initial_hidden(batch_size)

    say("compiling the step, the clip and the parts")
    step, leaves = _with_leaves(model, lambda model, *inputs: model.step(*inputs))
    compiled_step = step.lower(leaves, video[:, 0], hidden).compile()
    clip, _ = _with_leaves(model, lambda model, *inputs: model(*inputs))
    compiled_clip = clip.lower(leaves, video).compile()
    calls: dict[str, Call] = {"step": (compiled_step, (leaves, video[:, 0], hidden))}
    calls |= _part_calls(model, video[:, 0], hidden)
    say("timing")
    times = _medians_ms(calls, seconds)
    times |= _medians_ms({"clip": (compiled_clip, (leaves, video))}, seconds)

    rows = _rows(parts, num_frames, times)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "name"}
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "batch_size": batch_size,
        "num_frames": num_frames,
        "image_size": side,
        "parts": rows,
        "total": total,
        "parameters_without_use": _unused(model),
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
        "state_bytes_per_stream": hidden.nbytes // batch_size,
        "xla": _xla_beside(compiled_step, batch_size, total["flops_per_frame"]),
        "memory": {"step": _memory(compiled_step), "clip": _memory(compiled_clip)},
        "step_ms": times["step"],
        "clip_ms": times["clip"],
        # Of one frame of one stream.
        "step_ms_per_frame": times["step"] / batch_size,
        "clip_ms_per_frame": times["clip"] / (batch_size * num_frames),
    }


def _rows(parts: Sequence[Part], num_frames: int, times: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "name": part.name,
            "parameters": part.parameters,
            "flops_per_frame": part.flops,
            "flops_per_clip": part.flops * (num_frames if part.every_frame else 1),
            # Sums of tokens go into the parts beside them.
            "ms_alone": times.get(part.name, 0.0),
        }
        for part in parts
    ]


def _unused(model: RViT) -> int:
    """Parameters that take no part in the computation."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, UnusedParam)))


def _with_leaves(
    module: nnx.Module, function: Callable[..., Any]
) -> tuple[jax.stages.Wrapped, list[Any]]:
    """`function(module, *inputs)` compiled with the weights as its first argument, and those.

    As constants the compiler could work on them beforehand.
    """
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)

    def call(leaves: list[Any], *inputs: Any) -> Any:
        return function(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)), *inputs)

    return jax.jit(call), leaves


def _medians_ms(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Name -> the median of a call's milliseconds; the calls take turns."""
    for function, arguments in calls.values():
        for _ in range(2):  # the first one may compile
            jax.block_until_ready(function(*arguments))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_REPEATS or time.perf_counter() < end:
        rounds += 1
        for name, (function, arguments) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def attend(layer: EncoderBlock, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The part "attention" of a layer: what goes to its MLP, and its gate, [B, S, D] both."""
    gate = layer.attention(layer.norm_input(x), layer.norm_hidden(g).astype(x.dtype))
    return x + gate, gate


def transform(layer: EncoderBlock, y: jax.Array) -> jax.Array:
    """The part "MLP" of a layer, [B, S, D]."""
    return y + layer.mlp(layer.norm_out(y))


def run_parts(
    model: RViT,
    frame: jax.Array,
    hidden: jax.Array,
    call: Callable[..., Any],
) -> jax.Array:
    """One step, part by part, as `RViT.step` computes it; returns the logits [B, K].

    Args:
        model: in evaluation mode.
        frame: [B, H, W, 3].
        hidden: [L, B, S, D].
        call: (part's name, module, function, *inputs) -> `function(module, *inputs)`.
    """
    x = call("patch embedding", model, RViT.embed, frame)
    positions = model.pos_embedding[...]
    new_hidden = []
    for index, layer in enumerate(model.layers):
        g = hidden[index] + positions
        y, gate = call(f"layer {index}: attention", layer, attend, x + positions, g)
        if index == len(model.layers) - 1:
            y = y[:, :1]
        x = call(f"layer {index}: MLP", layer, transform, y)
        new_hidden.append(model.next_state(gate, hidden[index], g))
    return call("read-out", model, RViT.read_out, x[:, 0], jnp.stack(new_hidden))


def _part_calls(model: RViT, frame: jax.Array, hidden: jax.Array) -> dict[str, Call]:
    """Part -> a call of its own, on what it is given within a step."""
    calls: dict[str, Call] = {}

    def call(name: str, module: nnx.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        compiled, leaves = _with_leaves(module, function)
        calls[name] = (compiled, (leaves, *inputs))
        return compiled(leaves, *inputs)

    run_parts(model, frame, hidden, call)
    return calls


def _xla_flops(compiled: jax.stages.Compiled) -> float | None:
    """XLA's count for one call; None where a backend does not tell."""
    return (compiled.cost_analysis() or {}).get("flops")


def _xla_beside(step: jax.stages.Compiled, batch_size: int, flops: int) -> dict[str, float | None]:
    """XLA's count of a step, for one stream, and how many times `flops` it is."""
    counted = _xla_flops(step)
    if counted is None:
        return {"flops_per_frame": None, "ratio": None}
    return {"flops_per_frame": counted / batch_size, "ratio": counted / batch_size / flops}


def _memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of one call; None where a backend does not tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return {
        "temporary": analysis.temp_size_in_bytes,
        "inputs": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
    }


def format_table(profile: dict[str, Any]) -> str:
    """A profile for people."""
    total = profile["total"]
    head = ("part", "parameters", "MFLOPs/frame", "share", "MFLOPs/clip", "ms alone")
    rows = [
        (
            row["name"],
            f"{row['parameters']:,}",
            f"{row['flops_per_frame'] / 1e6:,.3f}",
            f"{row['flops_per_frame'] / total['flops_per_frame']:.1%}",
            f"{row['flops_per_clip'] / 1e6:,.2f}",
            f"{row['ms_alone']:.3f}" if row["ms_alone"] else "-",
        )
        for row in [*profile["parts"], {"name": "sum", **total}]
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = [_line(head, widths), rule, *(_line(row, widths) for row in rows)]
    lines.insert(-1, rule)
    return "\n".join([*lines, "", *_summary(profile)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])


def _summary(profile: dict[str, Any]) -> list[str]:
    batch_size, num_frames = profile["batch_size"], profile["num_frames"]
    xla, memory = profile["xla"], profile["memory"]
    facts = [
        ("device", f"{profile['device']} ({profile['platform']})"),
        (
            "input",
            f"batch size {batch_size}, {num_frames} frames a clip of "
            f"{profile['image_size']} x {profile['image_size']} pixels",
        ),
        ("parameters", _bytes(profile["parameter_bytes"])),
        ("state", f"{_bytes(profile['state_bytes_per_stream'])} a stream"),
    ]
    if profile["parameters_without_use"]:
        facts.append(("without use", f"{profile['parameters_without_use']:,} of the parameters"))
    if xla["flops_per_frame"] is not None:
        facts.append(
            (
                "XLA's count",
                f"{xla['flops_per_frame'] / 1e6:,.3f} MFLOPs a step and stream, "
                f"{xla['ratio']:.3f} x ours (elementwise operations are in it)",
            )
        )
    for name in ("step", "clip"):
        if memory[name] is not None:
            facts.append(
                (
                    f"{name}, memory",
                    f"{_bytes(memory[name]['temporary'])} temporary, inputs with parameters "
                    f"{_bytes(memory[name]['inputs'])}, outputs {_bytes(memory[name]['outputs'])}",
                )
            )
    facts += [
        (
            "step, time",
            f"{profile['step_ms']:.3f} ms, {profile['step_ms_per_frame']:.3f} ms a frame and "
            f"stream (its parts alone: {profile['total']['ms_alone']:.3f} ms)",
        ),
        (
            "clip, time",
            f"{profile['clip_ms']:.3f} ms, {profile['clip_ms_per_frame']:.3f} ms a frame and clip",
        ),
    ]
    return [f"{name:<14}{fact}" for name, fact in facts]


def _bytes(number: int | float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(
        argv,
        "Config file, and a variant after a colon: configs/jester.py:v2. Any key of the model is "
        "set with --config.model.KEY=VALUE; configs/base.py lists them.",
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "In place of --config: a workdir (its best checkpoint), one checkpoint folder or a "
        "converted model.",
        flag_values=values,
    )
    flags.DEFINE_integer("batch_size", 1, "Streams, or clips, of each call.", 1, flag_values=values)
    flags.DEFINE_integer(
        "frames", None, "Frames of a clip; by default the config's.", 1, flag_values=values
    )
    flags.DEFINE_float(
        "seconds",
        1.0,
        "How long the step with its parts is timed, and the clip.",
        0.0,
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "Print one JSON document.", flag_values=values)
    return values


def _check_arguments(argv: list[str]) -> None:
    """What absl would say at length, or not at all."""
    for name in ("config", "checkpoint"):
        if f"--{name}=" in argv:
            raise ArgumentError(f"--{name}= is empty: say what to profile (--help lists the flags)")
    names = [argument.lstrip("-").partition("=")[0] for argument in argv[1:]]
    if ("config" in names) == ("checkpoint" in names) and not {"help", "h", "?"} & set(names):
        raise ArgumentError(
            "say either --config=FILE, for a new model, or --checkpoint=DIR (--help lists the "
            "flags)"
        )
    if "checkpoint" in names and any(name.startswith("config.") for name in names):
        raise ArgumentError(
            "--config.KEY=VALUE is for --config: a checkpoint's model is what it is"
        )


def _profile(argv: list[str]) -> None:
    _check_arguments(argv)
    values = define_flags(argv)
    parse(values, argv, __doc__)
    if values.checkpoint is not None:
        loaded = load(values.checkpoint)
        config, model = loaded.config, loaded.model.module
    else:
        config = values.config
        try:
            check_config(config, base.get_config())
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        model = precision.make_model(config, rngs=nnx.Rngs(config.seed))
    profile = profile_model(
        model,
        batch_size=values.batch_size,
        num_frames=values.frames or config.dataset.num_frames,
        seconds=values.seconds,
        say=lambda message: print(message, file=sys.stderr, flush=True),
    )
    profile["model"] = config.model.to_dict()
    print(json.dumps(profile, indent=2) if values.json else format_table(profile))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_profile, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
