"""The command line: python -m rvit_jax.main --config=configs/gestures.py

Flags, checks and dispatch. Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after
signal n, with the state saved.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from configs import base
from rvit_jax.config import check_config, leaf_keys, suggest

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, and a variant after a colon: configs/gestures.py, configs/jester.py:v2. Any key "
    "is set with --config.KEY=VALUE; configs/base.py lists them.",
)
flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
flags.DEFINE_string(
    "workdir", None, "Where the run writes; by default results/<config file's name>[_<variant>]."
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "What --mode=evaluate evaluates: a workdir (its best checkpoint), one checkpoint folder or a "
    "converted model; by default the workdir.",
)
flags.DEFINE_enum(
    "split", "validation", ["train", "validation", "test"], "What --mode=evaluate evaluates it on."
)
flags.DEFINE_bool("debug", False, "Show tracebacks and the libraries' log.")


class _ArgumentError(Exception):
    """Wrong arguments: exit status 2."""


def _parse(argv: list[str]) -> list[str]:
    """absl's parsing, with one line and status 2 for whatever is wrong in the arguments."""
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(__doc__, FLAGS.main_module_help(), sep="\n")
        sys.exit(0)
    try:
        return _parse_or_raise(argv)
    except _ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse_or_raise(argv: list[str]) -> list[str]:
    known = leaf_keys(base.get_config())
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        file = value.split(":")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            key = name.removeprefix("config.")
            raise _ArgumentError(f"the config has no key {key!r}{suggest(key, known)}")
        if name == "config" and file and not Path(file).is_file():
            files = sorted(str(f) for f in Path("configs").glob("[a-z]*.py") if f.stem != "base")
            raise _ArgumentError(
                f"--config={value}: there is no file {file}; this repository's are "
                f"{', '.join(files) or 'in its folder configs/'}"
            )
    try:
        rest = FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise _ArgumentError(f"{error} (--help lists the flags)") from error
    except flags.Error as error:
        # A config file that raises comes as its whole traceback; the last line is the reason.
        raise _ArgumentError(str(error).strip().splitlines()[-1]) from error
    except Exception as error:  # a config file of the user's own may raise anything
        reason = " ".join(str(error).split())
        raise _ArgumentError(
            f"the config cannot be read: {type(error).__name__}: {reason}"
        ) from error
    if len(rest) > 1:
        raise _ArgumentError(f"{rest[1]!r} is no flag: flags begin with -- (--help lists them)")
    if CONFIG.value is None:
        raise _ArgumentError("--config is missing: say --config=configs/gestures.py")
    if FLAGS.checkpoint and FLAGS.mode == "train":
        raise _ArgumentError(
            "--checkpoint is for --mode=evaluate; training goes on from the workdir's checkpoints"
        )
    return rest


def _workdir() -> Path:
    if FLAGS.workdir:
        return Path(FLAGS.workdir).expanduser()
    file, _, variant = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return Path("results") / "_".join(filter(None, (Path(file).stem, variant)))


def _run(_: list[str]) -> None:
    config = CONFIG.value
    try:
        check_config(config, base.get_config(), training=FLAGS.mode == "train")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    import jax

    from rvit_jax import evaluate, train

    devices = jax.devices()
    print(f"jax {jax.__version__}: {len(devices)} x {devices[0].device_kind} ({_workdir()})")
    if FLAGS.mode == "train":
        train.train_and_evaluate(config, _workdir())
    else:
        overrides = list(config_flags.get_override_values(FLAGS["config"]))
        checkpoint = FLAGS.checkpoint or _workdir()
        record = evaluate.evaluate(config, _workdir(), FLAGS.split, checkpoint, overrides)
        evaluate.print_record(record)


def main(argv: list[str]) -> None:
    """Runs, and turns what went wrong into one line and an exit status."""
    if not FLAGS.debug:
        logging.set_verbosity(logging.WARNING)
    from rvit_jax.train import Interrupted

    try:
        _run(argv)
    except Interrupted as stop:
        print(f"{stop}; the state is saved, and the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("stopped by signal 2; give the same command again", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if FLAGS.debug:
            raise
        # What our own checks raise speaks for itself; anything else is named.
        known = isinstance(error, ValueError | OSError | FloatingPointError)
        name = "" if known else f"{type(error).__name__}: "
        message = " ".join(f"{name}{error}".split())
        print(f"error: {message} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
