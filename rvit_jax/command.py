"""What commands share: their flags, one line for whatever goes wrong, and the exit status.

Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after signal n.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags, logging

from configs import base
from rvit_jax import distributed
from rvit_jax.config import leaf_keys, suggest


class ArgumentError(Exception):
    """Wrong arguments: exit status 2."""


class Stopped(BaseException):
    """A signal ends the work.

    SIGTERM raises it, so that what was begun is taken away as after Ctrl-C; work that saves its
    state raises it with words of its own.

    Attributes:
        signum: the signal's number.
        by_all: every process of the run raises it, at the same place.
    """

    def __init__(
        self,
        signum: int,
        what_is_left: str = "nothing is left half written",
        *,
        by_all: bool = False,
    ):
        super().__init__(f"stopped by signal {signum:d}; {what_is_left}")
        self.signum = signum
        self.by_all = by_all


def parse(values: flags.FlagValues, argv: list[str], about: str) -> None:
    """Parses `argv`, the command's name first, into `values`; `--help` prints and leaves.

    Args:
        values: the command's own flags, defined beforehand. Not absl's one set for the process:
            tests run several commands in one.
        argv: as `sys.argv`.
        about: what `--help` prints before the flags.

    Raises:
        ArgumentError: an unknown flag, a value that does not fit, or a stray argument.
    """
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        print(about, values.get_help(include_special_flags=False), sep="\n")
        raise SystemExit(0)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise ArgumentError(f"{error} (--help lists the flags)") from error
    except flags.Error as error:
        # A config file that raises comes as its whole traceback; the last line is the reason.
        raise ArgumentError(str(error).strip().splitlines()[-1]) from error
    except Exception as error:  # a config file of the user's own may raise anything
        reason = " ".join(str(error).split())
        raise ArgumentError(
            f"the config cannot be read: {type(error).__name__}: {reason}"
        ) from error
    if len(rest) > 1:
        raise ArgumentError(f"{rest[1]!r} is no flag: flags begin with -- (--help lists them)")


def check_config_arguments(argv: list[str]) -> None:
    """What absl says at length or not at all about `--config` and `--config.KEY`.

    Raises:
        ArgumentError: the config has no such key, or there is no such file.
    """
    known = leaf_keys(base.get_config())
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.")
        if key != name and key not in known:
            raise ArgumentError(f"the config has no key {key!r}{suggest(key, known)}")
        file = value.partition(":")[0]
        if name == "config" and file and not Path(file).is_file():
            files = sorted(str(f) for f in Path("configs").glob("[a-z]*.py") if f.stem != "base")
            raise ArgumentError(
                f"--config={value}: there is no file {file}; this repository's are "
                f"{', '.join(files) or 'in its folder configs/'}"
            )


def run(work: Callable[[list[str]], None], argv: list[str]) -> int:
    """Does the work and returns the exit status; what goes wrong becomes one line on stderr."""
    debug = "--debug" in argv
    if not debug:
        logging.set_verbosity(logging.WARNING)
    try:
        work(argv)
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped) as stop:
        if not isinstance(stop, Stopped):
            stop = Stopped(signal.SIGINT)
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:  # nobody reads on: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        error = distributed.explain(error)
        # What our own checks raise speaks for itself; anything else is named.
        known = isinstance(error, ValueError | OSError | FloatingPointError)
        name = "" if known else f"{type(error).__name__}: "
        message = " ".join(f"{name}{error}".split())
        hint = "" if debug else " (--debug shows where)"
        print(f"error: {distributed.who()}{message}{hint}", file=sys.stderr)
        return 1
    return 0


def start(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as the whole process, and ends it with the status that `main` returns."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    status = main()
    if status >= 128 or distributed.is_started():
        # Libraries that were cut off amid their work may crash the interpreter on its way out; and
        # of several processes one that failed would wait for the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
