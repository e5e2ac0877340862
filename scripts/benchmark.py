"""Measures our RViT against the same network in PyTorch, side by side, in one run.

    python scripts/benchmark.py [--config=configs/jester.py] [--what=inference,training,...]
        [--output=results/benchmark] [--quick] [--no_torch_compile] [--num_cpu_devices=2]
        [--dtype=float32,bfloat16] [--matmul_precision=tf32] [--config.KEY=VALUE ...]

Sections (`--what`, or `--sections`; all by default):

    inference   whole clips at B = 1, 4, 8: ours against PyTorch eager, TorchScript, torch.compile
    training    one AdamW step at B = 4, from uint8 frames on the device
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
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))  # this script's other parts

import jax
import torch
from absl import app, flags
from benchmark_contenders import DTYPES, Settings, torch_device
from benchmark_loader import measure_loader
from benchmark_report import plot, table
from benchmark_sections import SECTIONS as MODEL_SECTIONS
from benchmark_sections import configure, note
from ml_collections import ConfigDict, config_flags

from configs import base
from input_pipeline.cpus import num_cpus
from rvit_jax.checkpoint import check_writable, write_json
from rvit_jax.command import check_config_arguments
from rvit_jax.config import check_config, suggest

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


def define_flags() -> None:
    """Not at import: absl's flags are one set for the whole process, tests included."""
    config_flags.DEFINE_config_file(
        "config", None, f"Config file, and a variant after a colon; default: {DEFAULT_CONFIG}."
    )
    flags.DEFINE_list("what", list(SECTIONS), f"Sections, out of {', '.join(SECTIONS)}.")
    flags.DEFINE_alias("sections", "what")
    flags.DEFINE_string("output", "results/benchmark", "Where the results are written.")
    flags.DEFINE_integer("rounds", None, "Turns of each contender; 20, or 4 with --quick.", 1)
    flags.DEFINE_float(
        "seconds", None, "No new round after so many in a measurement; 40, or 4 with --quick.", 0.0
    )
    flags.DEFINE_bool("quick", False, "Fewer, smaller measurements; no torch.compile.")
    flags.DEFINE_bool("no_torch_compile", False, "Leave torch.compile out: it takes minutes.")
    flags.DEFINE_list("dtype", ["float32"], f"Out of {', '.join(DTYPES)}.")
    flags.DEFINE_enum(
        "matmul_precision", "float32", ("float32", "tf32"), "Of float32 products on a GPU."
    )
    flags.DEFINE_integer(
        "num_cpu_devices", 2, "Our variant with the batch split over so many; 1: without.", 1
    )
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


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


def parse(argv: list[str]) -> list[str]:
    """absl's parsing, with errors of one line and status 2."""
    names = [argument.lstrip("-").partition("=")[0] for argument in argv[1:]]
    if "config" not in names:
        argv = [
            argv[0],
            f"--config={Path(__file__).resolve().parents[1] / DEFAULT_CONFIG}",
            *argv[1:],
        ]
    try:
        check_config_arguments(argv)
        rest = flags.FLAGS(argv)
    except Exception as error:  # a config file may raise anything
        sys.exit(_fail(str(error).strip().splitlines()[-1], 2))
    if len(rest) > 1:
        sys.exit(_fail(f"{rest[1]!r} is no flag: flags begin with -- (--help lists them)", 2))
    return rest


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _stop(signum: int, _: Any) -> None:
    raise KeyboardInterrupt(signum)


def main(_: list[str]) -> None:
    """Checks the arguments, measures, prints the table."""
    args = flags.FLAGS
    folder = Path(args.output).expanduser()
    try:
        config = args.config
        sections = parse_choices(args.what, SECTIONS, "what")
        settings = settings_from_flags(args)
        check_config(config, base.get_config())
        if config.optimizer.name != "adamw" or config.optimizer.frozen:
            raise ValueError("config.optimizer: the comparison is of 'adamw' on every parameter")
    except (ValueError, OSError) as error:
        sys.exit(_fail(str(error), 2))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        check_writable(folder)
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
        report = run_sections(config, settings, sections, folder)
        print(table(report))
        try:
            plot(report, folder)
        except ImportError:
            note("no plots: matplotlib is not installed")
    except KeyboardInterrupt as stop:
        signum = stop.args[0] if stop.args else signal.SIGINT
        sys.exit(
            _fail(f"stopped by signal {signum}; what was measured is in {folder}", 128 + signum)
        )
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, ValueError | OSError)
        sys.exit(_fail(f"{'' if known else f'{type(error).__name__}: '}{error}", 1))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse)
