"""What commands share: their flags, one line for whatever goes wrong, and the exit status.

Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after signal n.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import flags, logging


class ArgumentError(Exception):
    """Wrong arguments: exit status 2."""


class Stopped(BaseException):
    """SIGTERM, which ends the work as Ctrl-C does, so that what was begun is taken away."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


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
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        print(f"stopped by signal {signum:d}; nothing is left half written", file=sys.stderr)
        return 128 + signum
    except Exception as error:
        if debug:
            traceback.print_exc()
        # What our own checks raise speaks for itself; anything else is named.
        name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        message = " ".join(f"{name}{error}".split())
        hint = "" if debug else " (--debug shows where)"
        print(f"error: {message}{hint}", file=sys.stderr)
        return 1
    return 0


def start(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as the whole process, and ends it with the status that `main` returns."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    status = main()
    if status >= 128:
        # Libraries that were cut off amid their work may crash the interpreter on its way out.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
