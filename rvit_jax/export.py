"""Exports a model, weights inside, for use without this package.

    python -m rvit_jax.export --checkpoint=DIR --output=DIR [--what=all|step|clip]
        [--format=stablehlo,savedmodel,onnx] [--dtype=uint8|float32] [--platforms=cpu,cuda,tpu]
        [--overwrite] [--debug]

Two programs, both by default:

    step   (frame [b, H, W, 3], hidden [L, b, S, D]) -> (logits [b, K], new_hidden [L, b, S, D])
    clip   (video [b, t, H, W, 3])                   -> (logits [b, K], hidden [L, b, S, D])

The clip starts from the initial state. b and t are free: one file serves every batch size and every
number of frames. Frames are already resized to H x W; with `--dtype=uint8`, the default, they are
pixels 0 to 255, which the program normalises itself, with float32 they are in [-1, 1]. The letters
are those of `rvit_jax/shapes.py`.

    OUTPUT/export.json          inputs, outputs, class names, preprocessing, versions, checksums
    OUTPUT/initial_hidden.npy   the state before the first frame, [L, 1, S, D]
    OUTPUT/step.jaxexport, clip.jaxexport   stablehlo: `jax.export`'s serialised StableHLO
    OUTPUT/savedmodel/                      savedmodel: TensorFlow, a signature per program
    OUTPUT/step.onnx, clip.onnx             onnx

Every file is then run in a fresh process, without this package, on random clips of two batch sizes
and two lengths. If its answers differ from the model's by more than 1e-5 of the largest value, the
command fails and leaves nothing. The check runs on the CPU where `--platforms` has it: accelerators
multiply float32 matrices with fewer bits, for the model as for its export. Files for other machines
alone cannot be checked; the command says so, and `check` in export.json.

To use it, with JAX and NumPy alone:

    import jax, numpy as np
    from jax import export

    step = export.deserialize(bytearray(open("OUTPUT/step.jaxexport", "rb").read()))
    step = jax.jit(step.call)
    hidden = np.load("OUTPUT/initial_hidden.npy")  # repeat it along axis 1 for more streams
    for frame in video:  # uint8 [H, W, 3]
        logits, hidden = step(frame[None], hidden)

`rvit_jax/run_export.py`, which needs nothing else of this package, does it for all formats.
`export.deserialize(...).mlir_module()` is the StableHLO as text, `.mlir_module_serialized` as a
portable artifact for other compilers.

SavedModel goes through `jax.experimental.jax2tf` and runs without JAX. ONNX goes through jax2onnx,
which is optional and not in requirements.txt, since its own requirements ask for an older
orbax-checkpoint than training; it needs nothing of that:

    pip install onnx onnx-ir onnxruntime && pip install --no-deps jax2onnx
"""

from input_pipeline.command_line import check_output_folder, leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from input_pipeline.files import folder_written_aside, write_json, written_aside
from rvit_jax import run_export
from rvit_jax.checkpoint import LoadedModel, describe_model, load
from rvit_jax.command import ArgumentError, parse, run, start
from rvit_jax.model import CompiledRViT, normalise

FORMAT = 1  # of export.json
BAR = 1e-5  # x the largest value of the model's answer
PROGRAMS = ("step", "clip")
FORMATS = ("stablehlo", "savedmodel", "onnx")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DTYPES = ("uint8", "float32")
# Packages that a format needs besides JAX, to be written and to be checked, and how to get them.
NEEDS = {
    "stablehlo": ((), ""),
    "savedmodel": (("tensorflow",), "pip install -r requirements.txt"),
    "onnx": (
        ("jax2onnx", "onnxruntime"),
        "pip install onnx onnx-ir onnxruntime && pip install --no-deps jax2onnx",
    ),
}


@dataclasses.dataclass(frozen=True)
class Argument:
    """An input or output of a program.

    Attributes:
        name: as the SavedModel and ONNX files call it.
        letters: of the shape, see `rvit_jax/shapes.py`.
        shape: sizes; "b" and "t" are free.
        dtype: NumPy's name.
    """

    name: str
    letters: str
    shape: tuple[int | str, ...]
    dtype: str

    def describe(self) -> dict[str, Any]:
        """For export.json."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is exported: a function of the weights and the inputs.

    Attributes:
        name: one of `PROGRAMS`.
        function: (leaves, *inputs) -> outputs.
        leaves: the weights, flat.
        inputs: without the weights.
        outputs: in the order of `function`'s.
    """

    name: str
    function: Callable[..., tuple[jax.Array, jax.Array]]
    leaves: list[np.ndarray]
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]

    def with_weights(self, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`function` with the weights as constants."""
        return self.function([jnp.asarray(leaf) for leaf in self.leaves], *inputs)

    def specs(self) -> list[jax.ShapeDtypeStruct]:
        """The inputs' shapes and types, b and t symbolic."""
        scope = jax.export.SymbolicScope()
        return [
            jax.ShapeDtypeStruct(
                jax.export.symbolic_shape(_polymorphic(argument), scope=scope), argument.dtype
            )
            for argument in self.inputs
        ]


def _polymorphic(argument: Argument) -> str:
    return f"({', '.join(map(str, argument.shape))})"


def make_programs(model: CompiledRViT, what: Sequence[str], dtype: str) -> list[Program]:
    """The programs named in `what`, of a model in evaluation mode."""
    module = model.module
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(jax.device_get(state))
    num_layers, _, num_tokens, size = module.initial_hidden(1).shape
    side = module.image_size
    num_classes = module.head.dense.out_features
    frame = Argument("frame", "B H W 3", ("b", side, side, 3), dtype)
    video = Argument("video", "B T H W 3", ("b", "t", side, side, 3), dtype)
    hidden = Argument("hidden", "L B S D", (num_layers, "b", num_tokens, size), "float32")
    new_hidden = dataclasses.replace(hidden, name="new_hidden")  # ONNX names each array once
    logits = Argument("logits", "B K", ("b", num_classes), "float32")

    def step(leaves: list[Any], frame: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        return model.step(frame, hidden)

    def clip(leaves: list[Any], video: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        return model(video)

    programs = {
        "step": Program("step", step, leaves, (frame, hidden), (logits, new_hidden)),
        "clip": Program("clip", clip, leaves, (video,), (logits, hidden)),
    }
    return [programs[name] for name in PROGRAMS if name in what]


def write_stablehlo(
    programs: Sequence[Program], folder: Path, platforms: Sequence[str]
) -> dict[str, str]:
    """Writes `NAME.jaxexport` for each program; returns program -> file."""
    for program in programs:
        lower = jax.export.export(jax.jit(program.with_weights), platforms=platforms)
        with _base_names_alone():
            exported = lower(*program.specs())
        (folder / f"{program.name}.jaxexport").write_bytes(exported.serialize())
    return {program.name: f"{program.name}.jaxexport" for program in programs}


@contextlib.contextmanager
def _base_names_alone() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of what is exported."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, r"^.*/")
    try:
        yield
    finally:
        jax.config.update(option, before)


def write_savedmodel(
    programs: Sequence[Program], folder: Path, platforms: Sequence[str]
) -> dict[str, str]:
    """Writes one SavedModel with a signature per program; returns program -> folder."""
    # Before TensorFlow is imported: it logs what it finds in the machine.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    from jax.experimental import jax2tf

    module = tf.Module()
    # As variables the programs share the weights; as constants each would hold them.
    module.weights = [tf.Variable(leaf) for leaf in programs[0].leaves]
    functions = {}
    for program in programs:
        names = [output.name for output in program.outputs]
        converted = jax2tf.convert(
            program.function,
            polymorphic_shapes=[None, *map(_polymorphic, program.inputs)],
            native_serialization_platforms=platforms,
            with_gradient=False,
        )

        # TensorFlow reads its signature: no annotations.
        def call(*inputs, converted=converted, names=names):  # type: ignore[no-untyped-def]
            return dict(zip(names, converted(module.weights, *inputs), strict=True))

        specs = [
            tf.TensorSpec(
                [None if isinstance(size, str) else size for size in argument.shape],
                argument.dtype,
                name=argument.name,
            )
            for argument in program.inputs
        ]
        functions[program.name] = tf.function(call, autograph=False, input_signature=specs)
    with _base_names_alone():
        concrete = {name: f.get_concrete_function() for name, f in functions.items()}
    tf.saved_model.save(module, str(folder / "savedmodel"), signatures=concrete)
    return {program.name: "savedmodel" for program in programs}


def write_onnx(programs: Sequence[Program], folder: Path, _: Sequence[str]) -> dict[str, str]:
    """Writes `NAME.onnx` for each program; returns program -> file."""
    # It warns of every optional package that is missing, and of constants without a known shape.
    for name in ("jax2onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import jax2onnx

    for program in programs:
        specs = program.specs()
        # Traced here: jax2onnx's own tracing replaces parts of Flax, and fails on this model's.
        closed = jax.make_jaxpr(program.with_weights)(*specs)
        jax2onnx.to_onnx(
            jax.extend.core.jaxpr_as_fun(closed),
            specs,
            model_name=f"rvit_{program.name}",
            return_mode="file",
            output_path=str(folder / f"{program.name}.onnx"),
            input_names=[argument.name for argument in program.inputs],
            output_names=[argument.name for argument in program.outputs],
        )
    return {program.name: f"{program.name}.onnx" for program in programs}


WRITERS = {"stablehlo": write_stablehlo, "savedmodel": write_savedmodel, "onnx": write_onnx}


def export_model(
    loaded: LoadedModel,
    output: Path,
    *,
    what: Sequence[str] = PROGRAMS,
    formats: Sequence[str] = ("stablehlo",),
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: str = "uint8",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes an export, and compares it with the model in a fresh process.

    Args:
        loaded: the model.
        output: new or empty folder, or with `overwrite` an earlier export.
        what: programs, of `PROGRAMS`.
        formats: of `FORMATS`.
        platforms: that StableHLO and SavedModel files will run on, of `PLATFORMS`.
        dtype: of the frames, one of `DTYPES`.
        overwrite: replace an earlier export.
        say: told what begins.

    Returns:
        The content of `export.json`.

    Raises:
        OSError: the folder is in use or cannot be written.
        ValueError: a format's library is missing, or a file does not answer as the model does.
    """
    check_output(output, overwrite=overwrite)
    check_packages(formats)
    platforms = tuple(platforms)
    programs = make_programs(loaded.model, what, dtype)
    with folder_written_aside(output.resolve(), replace=overwrite) as folder:
        np.save(folder / "initial_hidden.npy", jax.device_get(loaded.model.initial_hidden(1)))
        description = describe_export(loaded, programs, formats, platforms, dtype)
        for form in formats:
            say(f"writing {form}: {', '.join(program.name for program in programs)}")
            for name, file in WRITERS[form](programs, folder, platforms).items():
                description["programs"][name]["files"][form] = file
        description["files"] = {
            str(file.relative_to(folder)): {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        write_json(folder / "export.json", description)
        description["check"] = check_export(loaded, folder, formats, platforms, dtype, say)
        write_json(folder / "export.json", description)
        check_output(output, overwrite=overwrite)  # minutes have passed
    return description


def describe_export(
    loaded: LoadedModel,
    programs: Sequence[Program],
    formats: Sequence[str],
    platforms: Sequence[str],
    dtype: str,
) -> dict[str, Any]:
    """The content of `export.json`, but for files and the check."""
    preprocessing = describe_model(loaded.config, loaded.class_names)["preprocessing"]
    if dtype == "uint8":
        preprocessing["normalise"] += ", by the program itself: frames are uint8, 0 to 255"
    packages = ["jax", "jaxlib", "numpy"]
    packages += ["jax2onnx"] if "onnx" in formats else []
    made_by = {"rvit_jax": describe_model(loaded.config, ())["made_by"]["rvit_jax"]}
    made_by |= {name: _version(name) for name in packages}
    if "savedmodel" in formats:
        made_by["tensorflow"] = _version("tensorflow", "tensorflow-cpu")
    options: Any = jax.config  # which gets its attributes at run time
    return {
        "format": FORMAT,
        "programs": {
            program.name: {
                "inputs": [argument.describe() for argument in program.inputs],
                "outputs": [argument.describe() for argument in program.outputs],
                "files": {},
            }
            for program in programs
        },
        "free_sizes": {"b": "clips or streams", "t": "frames of a clip"},
        "initial_hidden": {
            "file": "initial_hidden.npy",
            "use": "the step's first hidden; repeat it along axis 1, once per stream",
        },
        "class_names": list(loaded.class_names),
        "preprocessing": preprocessing,
        "model": loaded.config.model.to_dict(),
        "checkpoint": {"path": str(loaded.path), "step": loaded.step},
        "platforms": list(platforms),
        "calling_convention_version": options.jax_export_calling_convention_version,
        "made_by": made_by,
    }


def _version(*names: str) -> str | None:
    """The version of the first of these packages that is installed."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def check_packages(formats: Sequence[str]) -> None:
    """Raises ValueError where a format's library is not installed."""
    for form in formats:
        packages, remedy = NEEDS[form]
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"--format={form} needs {' and '.join(missing)}, not installed here: {remedy}"
            )


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises OSError unless an export may be written to the folder `output`."""
    check_output_folder(output, "--output")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "export.json").is_file():
        raise OSError(f"--output={output} holds other files: choose a new or empty folder")
    if not overwrite:
        raise OSError(
            f"--output={output} holds an export already: choose another folder, or say --overwrite"
        )


def check_export(
    loaded: LoadedModel,
    folder: Path,
    formats: Sequence[str],
    platforms: Sequence[str],
    dtype: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Runs an export in fresh processes and compares it with the model.

    Returns:
        The `check` of `export.json`: where it ran, the bar, and format -> program -> the largest
        max |difference| / max |value|; None for a format that cannot run here.

    Raises:
        ValueError: a file does not run, or answers above the bar.
    """
    device, name = _check_device(platforms)
    # TensorFlow's requirement is its CPU build, and so is onnxruntime's.
    can_run = {"stablehlo": device is not None, "savedmodel": "cpu" in platforms, "onnx": True}
    errors: dict[str, dict[str, float] | None] = {}
    with tempfile.TemporaryDirectory(prefix="rvit_jax_export_") as scratch:
        cases = Path(scratch) / "cases.npz"
        with written_aside(cases) as aside:
            # Names are ours: none is that of NumPy's other argument.
            np.savez(aside, **_cases(loaded, dtype, device or jax.devices()[0]))  # type: ignore[arg-type]
        for form in formats:
            if not can_run[form]:
                errors[form] = None
                say(f"NOT CHECKED: {form} for {', '.join(platforms)} cannot run here")
                continue
            say(f"running {form} in a fresh process")
            here = _run_fresh(folder, form, cases, name)
            errors[form] = here
            for program, error in here.items():
                if not error <= BAR:
                    raise ValueError(
                        f"the exported {program} ({form}) is not the model: it differs by "
                        f"{error:.1e} of the largest value, at most {BAR:.0e} is allowed; nothing "
                        "was written"
                    )
    return {"platform": name, "bar": BAR, "errors": errors}


def _check_device(platforms: Sequence[str]) -> tuple[jax.Device | None, str]:
    """Where to compare, and JAX's name for it: the CPU if possible, since it rounds least."""
    if "cpu" in platforms:
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS leaves it out
            return jax.local_devices(backend="cpu")[0], "cpu"
    name = jax.export.default_export_platform()
    return (jax.devices()[0], name) if name in platforms else (None, name)


def _cases(loaded: LoadedModel, dtype: str, device: jax.Device) -> dict[str, np.ndarray]:
    """Random clips and the model's answers on `device`; see `run_export.largest_errors`."""
    graphdef, state = nnx.split(loaded.model.module)
    model = CompiledRViT(nnx.merge(graphdef, jax.device_put(state, device)))
    random = np.random.default_rng(0)
    side, num_frames = loaded.config.model.image_size, loaded.config.dataset.num_frames
    cases: dict[str, np.ndarray] = {}
    for index, (batch_size, length) in enumerate([(1, num_frames), (3, max(2, num_frames // 2))]):
        video = random.integers(0, 256, (batch_size, length, side, side, 3), np.uint8)
        if dtype != "uint8":
            video = jax.device_get(normalise(video))
        logits, hidden = model(video)
        step_hidden, step_logits = model.initial_hidden(batch_size), []
        for t in range(length):
            frame_logits, step_hidden = model.step(video[:, t], step_hidden)
            step_logits.append(frame_logits)
        cases |= {
            f"video_{index}": video,
            f"logits_{index}": np.asarray(logits),
            f"hidden_{index}": np.asarray(hidden),
            f"step_logits_{index}": np.stack(step_logits),
            f"step_hidden_{index}": np.asarray(step_hidden),
        }
    return cases


def _run_fresh(folder: Path, form: str, cases: Path, platform: str) -> dict[str, float]:
    command = [sys.executable, "-I", run_export.__file__, str(folder), form, str(cases)]
    done = subprocess.run(
        command,
        env={**os.environ, "JAX_PLATFORMS": platform},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"the exported files ({form}) do not run in a fresh process: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def define_flags() -> flags.FlagValues:
    """The command's flags."""
    values = own_flags()
    flags.DEFINE_string(
        "checkpoint",
        None,
        "What to export: a workdir (its best checkpoint), one checkpoint folder or a converted "
        "model.",
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "Folder to write; new or empty.", flag_values=values)
    flags.DEFINE_enum(
        "what", "all", ["all", *PROGRAMS], "The one-frame step, the whole clip.", flag_values=values
    )
    flags.DEFINE_list("format", ["stablehlo"], f"Of {', '.join(FORMATS)}.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "uint8", DTYPES, "Of the frames: pixels, or float in [-1, 1].", flag_values=values
    )
    flags.DEFINE_list(
        "platforms",
        ["cpu", "cuda", "tpu"],
        f"Where StableHLO and SavedModel files will run: of {', '.join(PLATFORMS)}.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace an earlier export in --output.", flag_values=values
    )
    return values


def _check_flags(values: flags.FlagValues) -> None:
    require(values, checkpoint="DIR", output="DIR")
    for name, choices in (("format", FORMATS), ("platforms", PLATFORMS)):
        unknown = [value for value in values[name].value or () if value not in choices]
        if unknown or not values[name].value:
            what = f"{unknown[0]!r} is unknown" if unknown else "nothing is named"
            raise ArgumentError(f"--{name}: {what}; choose from {', '.join(choices)}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _export(argv: list[str]) -> None:
    values = define_flags()
    parse(values, argv, __doc__)
    _check_flags(values)
    output = Path(values.output).expanduser()
    check_output(output, overwrite=values.overwrite)  # before anything slow
    check_packages(values.format)
    loaded = load(values.checkpoint)
    description = export_model(
        loaded,
        output,
        what=PROGRAMS if values.what == "all" else (values.what,),
        formats=list(dict.fromkeys(values.format)),
        platforms=list(dict.fromkeys(values.platforms)),
        dtype=values.dtype,
        overwrite=values.overwrite,
        say=_say,
    )
    print_summary(output, description)


def print_summary(output: Path, description: dict[str, Any]) -> None:
    """What was written, and how near it is to the model."""
    for name, program in description["programs"].items():
        sides = [
            ", ".join(
                f"{a['name']} {a['dtype']} [{', '.join(map(str, a['shape']))}]"
                for a in program[side]
            )
            for side in ("inputs", "outputs")
        ]
        print(f"{name}: ({sides[0]}) -> ({sides[1]})")
    for form, errors in description["check"]["errors"].items():
        for name, program in description["programs"].items():
            path = output / program["files"][form]
            verdict = "not checked" if errors is None else f"error {errors[name]:.1e}"
            print(f"{path}: {name}, {verdict} (bar {BAR:.0e}, fresh process)")
    print(f"written to {output}; export.json says how to use it")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_export, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
