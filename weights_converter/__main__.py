"""The command line: python -m weights_converter {inspect,to_flax,to_torch,verify} ...

Exit status: 0 done; 1 the work failed, with one line on stderr; 2 wrong arguments; 130 after
Ctrl-C. Nothing of JAX or PyTorch is imported before the file was read and found good.
"""

import argparse
import sys
import traceback
from pathlib import Path

TRUST = (
    "This loads and runs the code in FILE, which may do anything that you may: only for a file "
    "whose maker you trust. It runs in a process of its own with a time limit, but unconfined."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weights_converter",
        description="Converts RViT weights between PyTorch and Flax, and proves them equal.",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="say what a PyTorch file holds, without running it",
        description="Says what a PyTorch file holds. Nothing in it is run.",
    )
    inspect.add_argument("file", metavar="FILE", type=Path)

    to_flax = commands.add_parser(
        "to_flax",
        help="convert a PyTorch file to a model of rvit_jax",
        description=(
            "Converts a TorchScript archive, state dict, training checkpoint or .safetensors "
            "file. Unless --prove is given, nothing in it is run."
        ),
    )
    to_flax.add_argument("file", metavar="FILE", type=Path)
    to_flax.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="new folder")
    to_flax.add_argument("--prove", action="store_true", help=f"prove the conversion. {TRUST}")
    to_flax.add_argument(
        "--attention",
        choices=["auto", "linear", "softmax", "reattention"],
        default="auto",
        help="kind of attention; auto: as the file tells",
    )
    to_flax.add_argument("--num_heads", type=int, help="number of heads, if the file does not tell")
    to_flax.add_argument(
        "--epoch",
        type=int,
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
    _add_timeout(to_flax)

    to_torch = commands.add_parser(
        "to_torch",
        help="write a checkpoint's weights for PyTorch",
        description="Writes a state dict that the reference's module loads with strict=True.",
    )
    to_torch.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path)
    to_torch.add_argument("out_file", metavar="OUT_FILE", type=Path, help=".pth or .safetensors")

    verify = commands.add_parser(
        "verify",
        help="compare a PyTorch file with a checkpoint, part by part",
        description=(
            "Compares weights, embedding, each layer's state and output, read-out and logits. By "
            "default our own PyTorch RViT carries FILE's weights."
        ),
    )
    verify.add_argument("file", metavar="FILE", type=Path)
    verify.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path)
    verify.add_argument("--prove", action="store_true", help=f"run FILE's own code. {TRUST}")
    _add_timeout(verify)
    return parser


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for each run of FILE with --prove"
    )


def _inspect(args: argparse.Namespace) -> int:
    from weights_converter import archive, convert
    from weights_converter.recognise import recognise

    found = recognise(archive.read(args.file))
    for line in convert.describe(found):
        print(line)
    return 0


def _to_flax(args: argparse.Namespace) -> int:
    from weights_converter import convert

    class_names = None
    if args.class_names is not None:
        lines = args.class_names.read_text(encoding="utf-8").splitlines()
        class_names = [line.strip() for line in lines if line.strip()]
    convert.to_flax(
        args.file,
        args.out_dir,
        prove=args.prove,
        attention=None if args.attention == "auto" else args.attention,
        num_heads=args.num_heads,
        epoch=args.epoch,
        class_names=class_names,
        timeout=args.timeout,
    )
    return 0


def _to_torch(args: argparse.Namespace) -> int:
    from weights_converter import convert

    print(f"written to {convert.to_torch(args.checkpoint, args.out_file)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from weights_converter import archive, recognise

    recognise.recognise(archive.read(args.file))  # a bad file is refused at once
    try:
        from weights_converter import verify
        from weights_converter.torch_rvit import TorchRViT  # noqa: F401 - is PyTorch there?
    except ModuleNotFoundError as error:
        raise ValueError(f"verify needs PyTorch, which is not installed: {error}") from error

    different = []
    print(f"{'':10}{'error':>9} {'bar':>9}  part")
    for part in verify.verify(args.file, args.checkpoint, prove=args.prove, timeout=args.timeout):
        verdict = "equal" if part.equal else "DIFFERENT"
        where = f" ({part.where})" if part.where and not part.equal else ""
        print(f"{verdict:10}{part.error:9.1e} {part.bar:9.1e}  {part.name}{where}", flush=True)
        if not part.equal:
            different.append(part.name)
    if different:
        print(
            f"error: {args.file} and {args.checkpoint} differ, first in {different[0]}",
            file=sys.stderr,
        )
    return 1 if different else 0


_COMMANDS = {"inspect": _inspect, "to_flax": _to_flax, "to_torch": _to_torch, "verify": _verify}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return _COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
