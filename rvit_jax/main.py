"""The command line: python -m rvit_jax.main --config=configs/gestures.py

Flags, checks and dispatch. Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after
signal n, with the state saved.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs import base
from rvit_jax.command import ArgumentError, check_config_arguments, parse, run, start
from rvit_jax.config import check_config

MODES = ("train", "evaluate", "visualize")


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, and a variant after a colon: configs/gestures.py, configs/jester.py:v2. Any "
        "key is set with --config.KEY=VALUE; configs/base.py lists them.",
        flag_values=values,
        sys_argv=argv,
    )
    flags.DEFINE_enum(
        "mode",
        "train",
        MODES,
        "train; evaluate a checkpoint on a split; visualize: draw what it attends to.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run writes; by default results/<config file's name>[_<variant>].",
        flag_values=values,
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "What --mode=evaluate and --mode=visualize load: a workdir (its best checkpoint), one "
        "checkpoint folder or a converted model; by default the workdir.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "split",
        "validation",
        ["train", "validation", "test"],
        "Which clips they load.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "ids", [], "Clips that --mode=visualize draws: 1,2; the first four.", flag_values=values
    )
    flags.DEFINE_string(
        "query",
        None,
        "Whose attention --mode=visualize draws: ROW,COLUMN of a patch, from 0; by default the "
        "class token's.",
        flag_values=values,
    )
    flags.DEFINE_bool("debug", False, "Show tracebacks and the libraries' log.", flag_values=values)
    return values


def _check(values: flags.FlagValues) -> None:
    """Raises ArgumentError where flags contradict each other or the config cannot be."""
    if values.config is None:
        raise ArgumentError("--config is missing: say --config=configs/gestures.py")
    if values.checkpoint and values.mode == "train":
        raise ArgumentError(
            "--checkpoint is for --mode=evaluate and --mode=visualize; training goes on from the "
            "workdir's checkpoints, or starts from --config.init_from"
        )
    for name in ("ids", "query"):
        if getattr(values, name) and values.mode != "visualize":
            raise ArgumentError(f"--{name} is for --mode=visualize")
    try:
        check_config(values.config, base.get_config(), training=values.mode == "train")
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def _query(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    row, comma, column = text.partition(",")
    if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
        raise ArgumentError(f"--query={text}: expected ROW,COLUMN of a patch, such as 3,4")
    return int(row), int(column)


def _workdir(values: flags.FlagValues) -> Path:
    if values.workdir:
        return Path(values.workdir).expanduser()
    file, _, variant = config_flags.get_config_filename(values["config"]).partition(":")
    return Path("results") / "_".join(filter(None, (Path(file).stem, variant)))


def _work(argv: list[str]) -> None:
    check_config_arguments(argv)
    values = define_flags(argv)
    parse(values, argv, __doc__)
    _check(values)
    query = _query(values.query)
    import jax  # takes a second, which wrong arguments need not wait for

    from rvit_jax import evaluate, train

    config, workdir = values.config, _workdir(values)
    devices = jax.devices()
    print(f"jax {jax.__version__}: {len(devices)} x {devices[0].device_kind} ({workdir})")
    if values.mode == "train":
        train.train_and_evaluate(config, workdir)
        return
    overrides = list(config_flags.get_override_values(values["config"]))
    checkpoint = values.checkpoint or workdir
    if values.mode == "evaluate":
        record = evaluate.evaluate(config, workdir, values.split, checkpoint, overrides)
        evaluate.print_record(record)
        return
    from rvit_jax import visualize

    pictures = visualize.visualize(
        config,
        workdir,
        values.split,
        checkpoint,
        ids=tuple(values.ids),
        overrides=overrides,
        query=query,
    )
    print("\n".join(map(str, pictures)))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_work, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
