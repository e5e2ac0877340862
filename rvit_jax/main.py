"""The command line: python -m rvit_jax.main --config=configs/gestures.py

Flags, checks and dispatch. Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after
signal n, with the state saved.

Several processes train or evaluate one model: the same command for each, with
--coordinator_address, --num_processes and --process_id. Under srun and mpirun they find each other
by themselves. The workdir is one folder that all of them see. A signal to one stops them all.
"""

from input_pipeline.command_line import leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs import base
from rvit_jax import distributed
from rvit_jax.command import ArgumentError, Stopped, parse, run, start

MODES = ("train", "evaluate", "visualize")


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(
        argv,
        "Config file, and a variant after a colon: configs/gestures.py, configs/jester.py:v2. Any "
        "key is set with --config.KEY=VALUE; configs/base.py lists them.",
        debug="Show tracebacks and the libraries' log.",
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
        "Which clips --mode=evaluate and --mode=visualize read.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "ids",
        [],
        "Clips that --mode=visualize draws, such as 1,2; by default the first four.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "query",
        None,
        "Whose attention --mode=visualize draws: ROW,COLUMN of a patch, from 0; by default the "
        "class token's.",
        flag_values=values,
    )
    _define_process_flags(values)
    return values


def _define_process_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0 of a run of several processes; all of them reach it there. It "
        "listens at JAX_COORDINATOR_BIND_ADDRESS, where that is set.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes the run has.", flag_values=values
    )
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=values)
    flags.DEFINE_bool(
        "distributed",
        None,
        "Ask the cluster (SLURM, Open MPI, Kubernetes, TPU pods) for the coordinator, and for the "
        "number and place of the processes. By default it is asked under srun and mpirun with "
        "several tasks; --nodistributed: each task is a run.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "start_timeout",
        300.0,
        "Seconds to wait for the other processes.",
        lower_bound=1.0,
        flag_values=values,
    )


def _check(values: flags.FlagValues) -> None:
    """Raises ArgumentError where flags contradict each other or the config cannot be."""
    require(values, config="configs/gestures.py")
    if values.checkpoint and values.mode == "train":
        raise ArgumentError(
            "--checkpoint is for --mode=evaluate and --mode=visualize; training goes on from the "
            "workdir's checkpoints, or starts from --config.init_from"
        )
    for name in ("ids", "query"):
        if getattr(values, name) and values.mode != "visualize":
            raise ArgumentError(f"--{name} is for --mode=visualize")
    from rvit_jax.config import check_config

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


def _rendezvous(values: flags.FlagValues) -> distributed.Rendezvous | None:
    try:
        rendezvous = distributed.find_rendezvous(
            coordinator_address=values.coordinator_address,
            num_processes=values.num_processes,
            process_id=values.process_id,
            detect=values.distributed,
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    if rendezvous is not None and values.mode == "visualize":
        raise ArgumentError("--mode=visualize draws in one process: start it once, without srun")
    return rendezvous


def _work(argv: list[str]) -> None:
    values = define_flags(argv)
    parse(values, argv, __doc__)
    _check(values)
    query, rendezvous = _query(values.query), _rendezvous(values)
    if rendezvous is None:
        _dispatch(values, query)
        return
    distributed.start(rendezvous, values.start_timeout)
    try:
        with distributed.only_first_speaks():
            _dispatch(values, query)
    except Stopped as stop:
        if stop.by_all:
            distributed.finish()
        raise
    distributed.finish()


def _dispatch(values: flags.FlagValues, query: tuple[int, int] | None) -> None:
    import jax  # takes a second, which wrong arguments need not wait for

    from rvit_jax import evaluate, train
    from rvit_jax.checkpoint import resolve_checkpoint

    config, workdir = values.config, _workdir(values)
    devices, processes = jax.devices(), jax.process_count()
    together = f" in {processes} processes" if processes > 1 else ""
    print(f"jax {jax.__version__}: {len(devices)} x {devices[0].device_kind}{together} ({workdir})")
    if values.mode == "train":
        train.train_and_evaluate(config, workdir)
        return
    if not values.checkpoint:
        try:
            resolve_checkpoint(workdir)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the workdir {workdir} holds no checkpoint: train first, by the same command "
                f"without --mode={values.mode}, or name a model with --checkpoint=DIR"
            ) from error
    overrides = list(config_flags.get_override_values(values["config"]))
    checkpoint = values.checkpoint or workdir
    if values.mode == "evaluate":
        record = evaluate.evaluate(config, workdir, values.split, checkpoint, overrides)
        print(f"written to {workdir / 'evaluation'}; the page is report.html")
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
