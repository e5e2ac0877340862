"""The command line: python -m weights_converter {inspect,to_flax,to_torch,verify} ...

Exit status: 0 done; 1 the work failed, with one line on stderr; 2 wrong arguments; 128 + n after
signal n. Nothing of JAX or PyTorch is imported before the file was read and found good.
"""

from input_pipeline.command_line import Parser, leave_at_once, run

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import argparse
import contextlib
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rvit_jax.config import ATTENTION_KINDS

TRUST = (
    "This loads and runs the code in FILE, which may do anything that you may: only for a file "
    "whose maker you trust. It runs in a process of its own with a time limit, but unconfined."
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m weights_converter",
        description="Converts RViT weights between PyTorch and Flax, and proves them equal.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    reads_file = Parser(add_help=False)
    reads_file.add_argument("file", metavar="FILE", type=Path)
    runs_file = Parser(add_help=False, parents=[reads_file])
    runs_file.add_argument(
        "--timeout",
        type=_whole(1),
        default=120,
        metavar="SECONDS",
        help="limit of each run of FILE with --prove",
    )

    commands.add_parser(
        "inspect",
        parents=[common, reads_file],
        help="say what a PyTorch file holds, without running it",
        description="Says what a PyTorch file holds. Nothing in it is run.",
    )

    to_flax = commands.add_parser(
        "to_flax",
        parents=[common, runs_file],
        help="convert a PyTorch file to a model of rvit_jax",
        description=(
            "Converts a TorchScript archive, state dict, training checkpoint or .safetensors "
            "file. Unless --prove is given, nothing in it is run."
        ),
    )
    to_flax.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="new folder")
    to_flax.add_argument("--prove", action="store_true", help=f"prove the conversion. {TRUST}")
    to_flax.add_argument(
        "--attention",
        choices=["auto", *ATTENTION_KINDS],
        default="auto",
        help="kind of attention; auto: as the file tells",
    )
    to_flax.add_argument(
        "--num_heads",
        type=_whole(1),
        help="number of heads, if the file does not tell or tells wrong",
    )
    to_flax.add_argument(
        "--epoch",
        type=_whole(0),
        help="epoch (from 0) that a training checkpoint was saved after, if its name does not end "
        "in _EPOCH.pth",
    )
    to_flax.add_argument(
        "--class_names",
        type=Path,
        metavar="TEXT_FILE",
        help="class names in index order, one a line; by default Jester's 27 as the reference "
        "numbers them",
    )
    to_flax.add_argument(
        "--num_frames",
        type=_whole(1),
        help="frames of the clips that it was trained with; by default the reference's 36",
    )
    to_flax.add_argument(
        "--frame_stride",
        type=_whole(1),
        help="every how many frames of a video they take; by default 1",
    )

    to_torch = commands.add_parser(
        "to_torch",
        parents=[common],
        help="write a checkpoint's weights for PyTorch",
        description="Writes a state dict that the reference's module loads with strict=True.",
    )
    to_torch.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path)
    to_torch.add_argument("out_file", metavar="OUT_FILE", type=Path, help=".pth or .safetensors")

    verify = commands.add_parser(
        "verify",
        parents=[common, runs_file],
        help="compare a PyTorch file with a checkpoint, part by part",
        description=(
            "Compares weights, embedding, each layer's state and output, read-out and logits. By "
            "default our own PyTorch RViT carries FILE's weights."
        ),
    )
    verify.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path)
    verify.add_argument("--prove", action="store_true", help=f"run FILE's own code. {TRUST}")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}")
        return int(text)

    return parse


def _inspect(args: argparse.Namespace) -> int:
    from weights_converter import archive, convert
    from weights_converter.recognise import recognise

    found = recognise(archive.read(args.file))
    for line in convert.describe(found):
        print(line)
    return 0


def _to_flax(args: argparse.Namespace) -> int:
    from weights_converter import convert

    if args.prove:
        _share_cpus()
    class_names = None
    if args.class_names is not None:
        class_names = _read_names(args.class_names)
    convert.to_flax(
        args.file,
        args.out_dir,
        prove=args.prove,
        attention=None if args.attention == "auto" else args.attention,
        num_heads=args.num_heads,
        epoch=args.epoch,
        class_names=class_names,
        num_frames=args.num_frames,
        frame_stride=args.frame_stride,
        timeout=args.timeout,
        say=functools.partial(print, flush=True),
    )
    return 0


def _read_names(file: Path) -> list[str]:
    """The lines of --class_names that are not blank."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(
            f"--class_names={file} cannot be read: {reason}; expected a text file with a class "
            "name on each line, in index order"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _to_torch(args: argparse.Namespace) -> int:
    from weights_converter import convert

    print(f"written to {convert.to_torch(args.checkpoint, args.out_file)}")
    return 0


def _share_cpus() -> None:
    """PyTorch runs beside JAX and a child process; that it is missing is said elsewhere."""
    with contextlib.suppress(ModuleNotFoundError):
        from weights_converter import run_archive

        run_archive.share_cpus()


def _verify(args: argparse.Namespace) -> int:
    from weights_converter import archive

    source = archive.read(args.file)
    try:
        from weights_converter import verify

        _share_cpus()
    except ModuleNotFoundError as error:
        raise ValueError(f"verify needs PyTorch, which is not installed: {error}") from error

    different, begun = [], False
    for part in verify.verify(source, args.checkpoint, prove=args.prove, timeout=args.timeout):
        if not begun:  # once nothing can stop it any more
            print(f"{'':10}{'error':>9} {'bar':>9}  part")
            begun = True
        if part.error is None:
            print(f"{'UNKNOWN':10}{'-':>9} {part.bar:9.1e}  {part.name}: {part.where}", flush=True)
        else:
            verdict = "equal" if part.equal else "DIFFERENT"
            where = f", most in {part.where}" if part.where and not part.equal else ""
            line = f"{verdict:10}{part.error:9.1e} {part.bar:9.1e}  {part.name}{where}"
            print(line, flush=True)
            if not part.equal:
                different.append(f"{part.name}{where}")
    if different:
        print(
            f"error: {args.file} and {args.checkpoint} differ, first in {different[0]}",
            file=sys.stderr,
        )
    return 1 if different else 0


_COMMANDS = {"inspect": _inspect, "to_flax": _to_flax, "to_torch": _to_torch, "verify": _verify}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    return run(_work, ["weights_converter", *(sys.argv[1:] if argv is None else argv)])


def _work(argv: list[str]) -> int:
    args = _parser().parse_args(argv[1:])
    return _COMMANDS[args.command](args)


def _terminate(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    # As Ctrl-C, so that what was begun is taken away again.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
