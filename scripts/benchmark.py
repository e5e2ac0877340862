"""Measures our RViT against the same network in PyTorch, side by side, in one run.

    python scripts/benchmark.py [--config=configs/jester.py] [--what=inference,training,...]
        [--output=results/benchmark] [--quick] [--no_torch_compile] [--num_cpu_devices=2]
        [--dtype=float32,bfloat16] [--matmul_precision=tf32] [--config.KEY=VALUE ...]

Sections (`--what`, or `--sections`; all by default):

    inference   whole clips at B = 1, 4, 8: ours against PyTorch eager, TorchScript, torch.compile
    training    one AdamW step at B = 4, from uint8 frames on the device
    precision   the same step of ours at O0, O1, O2: time, bytes kept, XLA's temporaries
    streaming   one frame at B = 1, from the host and back: p50 and p95; FLOPs of the compiled step
    scaling     ours over T, B and L, and training over T: exponents, XLA's memory, compiling
    memory      peak of a process of its own for each side, and of the GPU
    loader      clips a second from JPEG files, with a worker process per core: ours against a
                DataLoader that does the reference's work; made-up clips in a temporary folder

All contenders hold the same weights. Before anything is timed their logits are compared with ours
in float32, and above 1e-3 of the largest one the run fails. Then they take turns, in an order that
is shuffled anew in each round, so that a machine that slows down slows all of them. A speedup is
their time over ours: of the medians, and the median of the ratios within each round.

Both run on the GPU where JAX has one, on the CPU otherwise (JAX_PLATFORMS=cpu). bfloat16 is all of
it, parameters, state and arithmetic, on both sides. `OUTPUT/benchmark.json` and `benchmark.md` are
written anew whenever a measurement is finished; an interrupted run leaves what it has, with
`finished` false. Plots are drawn where matplotlib is installed.

benchmark.json holds `environment`, `settings`, `config`, `seconds`, `left_out` (section -> missing
package) and `sections`: name -> rows. Times are in seconds, memory in bytes, shares in 0 ... 1.
Rows of the first three sections and of loader hold `contenders` (name -> median_s, quartiles,
first_call_s, ...), `speedups` (ours -> theirs -> of_medians, paired_median, ...) and `failed` (name
-> reason).
"""

import contextlib
import dataclasses
import datetime
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))  # this script's other parts

from input_pipeline.command_line import check_output_folder, leave_at_once, own_flags, suggest

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import jax
import torch
from absl import flags
from benchmark_contenders import DTYPES, Settings, torch_device
from benchmark_loader import measure_loader
from benchmark_report import plot, table
from benchmark_sections import SECTIONS as MODEL_SECTIONS
from benchmark_sections import configure, note
from ml_collections import ConfigDict

from configs import base
from input_pipeline.cpus import num_cpus
from input_pipeline.files import write_json
from rvit_jax.command import ArgumentError, Stopped, parse, run, start
from rvit_jax.config import check_config

SECTIONS = {**MODEL_SECTIONS, "loader": measure_loader}
DEFAULT_CONFIG = "configs/jester.py"
QUICK_FRAMES = 12  # of a clip, with --quick


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    on_gpu = torch_device().type == "cuda"
    packages = ("jax", "jaxlib", "flax", "torch", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": num_cpus(),
        "cores_of_machine": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "jax_devices": [device.device_kind for device in jax.devices()],
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda_of_torch": torch.version.cuda if on_gpu else None,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "platform": platform.platform(),
        "environment_variables": {
            name: os.environ[name]
            for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        },
    }


def run_sections(
    config: ConfigDict, settings: Settings, sections: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Measures and writes; returns what `benchmark.json` holds."""
    report: dict[str, Any] = {
        "format": 1,
        "finished": False,
        "environment": environment(),
        "settings": dataclasses.asdict(settings),
        "config": {
            "model": config.model.to_dict(),
            "num_frames": config.dataset.num_frames,
            "seed": config.seed,
        },
        "sections": {},
        "left_out": {},
    }

    def save() -> None:
        report["seconds"] = round(time.monotonic() - start, 1)
        write_json(folder / "benchmark.json", report)
        (folder / "benchmark.md").write_text(table(report))

    start = time.monotonic()
    save()
    for name in sections:
        rows = report["sections"][name] = []
        try:
            for row in SECTIONS[name](config, settings):
                rows.append(row)
                save()
        except ImportError as error:
            report["left_out"][name] = str(error)
            note(f"{name} is left out: {error}")
    report["finished"] = True
    save()
    return report


def parse_choices(text: Sequence[str], choices: Iterable[str], flag: str) -> tuple[str, ...]:
    """The names in a flag's list, without repetition.

    Raises:
        ValueError: one of them is unknown, or there is none.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text if name.strip()))
    for name in names:
        if name not in choices:
            raise ValueError(f"--{flag}: {name!r} is unknown{suggest(name, choices)}")
    if not names:
        raise ValueError(f"--{flag} is empty; choose from {', '.join(choices)}")
    return names


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(
        argv, f"Config file, and a variant after a colon; default: {DEFAULT_CONFIG}."
    )
    flags.DEFINE_list(
        "what", list(SECTIONS), f"Sections, out of {', '.join(SECTIONS)}.", flag_values=values
    )
    flags.DEFINE_alias("sections", "what", flag_values=values)
    flags.DEFINE_string(
        "output", "results/benchmark", "Where the results are written.", flag_values=values
    )
    flags.DEFINE_integer(
        "rounds", None, "Turns of each contender; 20, or 4 with --quick.", 1, flag_values=values
    )
    flags.DEFINE_float(
        "seconds",
        None,
        "No new round after so many in a measurement; 40, or 4 with --quick.",
        0.0,
        flag_values=values,
    )
    for name, what in (
        ("quick", "Fewer, smaller measurements; no torch.compile."),
        ("no_torch_compile", "Leave torch.compile out: it takes minutes."),
    ):
        flags.DEFINE_bool(name, False, what, flag_values=values)
    flags.DEFINE_list("dtype", ["float32"], f"Out of {', '.join(DTYPES)}.", flag_values=values)
    flags.DEFINE_enum(
        "matmul_precision",
        "float32",
        ("float32", "tf32"),
        "Of float32 products on a GPU.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_cpu_devices",
        2,
        "Our variant with the batch split over so many; 1: without.",
        1,
        flag_values=values,
    )
    return values


def settings_from_flags(args: flags.FlagValues) -> Settings:
    """The settings that the command line asks for.

    Raises:
        ValueError: an unknown dtype.
    """
    rounds, seconds = (4, 4.0) if args.quick else (20, 40.0)
    return Settings(
        rounds=args.rounds if args.rounds is not None else rounds,
        seconds=args.seconds if args.seconds is not None else seconds,
        num_devices=args.num_cpu_devices,
        torch_compile=not (args.quick or args.no_torch_compile),
        quick=args.quick,
        dtypes=parse_choices(args.dtype, DTYPES, "dtype"),
        matmul_precision=args.matmul_precision,
    )


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """The flags' values; without --config the default one.

    Raises:
        ArgumentError: a flag is unknown, or its value does not fit.
    """
    if not any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv[1:]):
        config = Path(__file__).resolve().parents[1] / DEFAULT_CONFIG
        argv = [argv[0], f"--config={config}", *argv[1:]]
    values = define_flags(argv)
    parse(values, argv, __doc__)
    return values


def _measure(argv: list[str]) -> None:
    values = parse_flags(argv)
    config, folder = values.config, Path(values.output).expanduser()
    try:
        sections = parse_choices(values.what, SECTIONS, "what")
        settings = settings_from_flags(values)
        check_config(config, base.get_config())
        if config.optimizer.name != "adamw" or config.optimizer.frozen:
            raise ValueError("config.optimizer: the comparison is of 'adamw' on every parameter")
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    check_output_folder(folder, "--output")
    configure(settings)
    if settings.quick:
        config.dataset.num_frames = min(config.dataset.num_frames, QUICK_FRAMES)
    if jax.default_backend() != "cpu":
        settings = dataclasses.replace(settings, num_devices=1)
    if jax.default_backend() == "cpu" and torch.get_num_threads() != num_cpus():
        note(
            f"PyTorch uses {torch.get_num_threads()} threads, JAX all {num_cpus()} cores: "
            f"unset OMP_NUM_THREADS for a fair comparison"
        )
    try:
        report = run_sections(config, settings, sections, folder)
    except (KeyboardInterrupt, Stopped) as stop:
        stop.add_note(f"what was measured is in {folder}")
        raise
    print(table(report))
    try:
        plot(report, folder)
    except ImportError:
        note("no plots: matplotlib is not installed")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_measure, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
