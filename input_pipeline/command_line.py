"""What commands share: their arguments, one line for whatever goes wrong, and the exit status.

Exit status: 0 done; 1 the work failed; 2 wrong arguments; 128 + n after signal n. Importing this
costs little, so that a wrong argument is answered before the libraries are imported.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags, logging

if TYPE_CHECKING:
    from ml_collections import ConfigDict

LONGEST = 4000  # characters of a message, which may name all clips of a batch
HELP = "(--help lists the flags)"
HELP_FLAGS = {"--help", "-help", "-h", "-?"}
MOST_CHOICES = 30  # that a message lists whole


class ArgumentError(Exception):
    """Wrong arguments: exit status 2."""


class Stopped(BaseException):
    """A signal ends the work.

    SIGTERM raises it, so that what was begun is taken away as after Ctrl-C; work that saves its
    state raises it with words of its own. Work that leaves something behind says what by a note
    (`add_note`) on this or on KeyboardInterrupt.

    Attributes:
        signum: the signal's number.
        what_is_left: of the work.
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


# ---- Ctrl-C before the work has begun ----


def _leave(signum: int, _frame: object) -> NoReturn:
    os._exit(128 + signum)


def leave_at_once() -> None:
    """Until `run` begins, Ctrl-C ends the process with status 130, without a word.

    For the first lines of a command: its imports take seconds, and a library that is cut off in
    them raises whatever it likes. Nothing has begun by then.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _leave)


# ---- the nearest of several names ----


def suggest(name: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the choice nearest to `name`, or the list of all."""
    choices = list(choices)
    nearest = difflib.get_close_matches(name, choices, n=1)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    more = f", ... ({len(choices)} in all)" if len(choices) > MOST_CHOICES else ""
    return f"; choose from {', '.join(choices[:MOST_CHOICES])}{more}"


def leaf_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All keys of a config, dotted ("model.num_heads")."""
    from ml_collections import ConfigDict

    keys = []
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        keys.extend(leaf_keys(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"])
    return keys


def one_line(text: str, most: int) -> str:
    """A text as one terminal line: what a file's names do to a terminal is kept from it."""
    line = " ".join(text.split())
    line = line if len(line) <= most else f"{line[:most]} ..."
    return "".join(c if c.isprintable() else "?" for c in line)


# ---- flags of absl ----

flags.disclaim_key_flags()  # `--help` lists a flag under the command, not under this module


def own_flags(
    argv: list[str] | None = None,
    config: str = "Config file, and a variant after a colon.",
    debug: str = "Show tracebacks.",
) -> flags.FlagValues:
    """A command's own set of flags: not absl's one for the process, tests run several commands.

    Args:
        argv: of a command with `--config`: tells which of the config's keys are set.
        config: what `--help` says of `--config`.
        debug: what it says of `--debug`.

    Returns:
        The set, with `--debug` and, where `argv` is given, `--config` and `--config.KEY`.
    """
    values = flags.FlagValues()
    if argv is not None:
        from ml_collections import config_flags

        config_flags.DEFINE_config_file("config", None, config, flag_values=values, sys_argv=argv)
    flags.DEFINE_bool("debug", False, debug, flag_values=values)
    return values


def parse(values: flags.FlagValues, argv: list[str], about: str) -> None:
    """Parses `argv`, the command's name first, into `values`; `--help` prints and leaves.

    Args:
        values: the command's flags, defined beforehand in its `own_flags`.
        argv: as `sys.argv`.
        about: what `--help` prints before the flags.

    Raises:
        ArgumentError: an unknown flag, a value that does not fit, or a stray argument; of a flag
            `--config`, what `check_config_arguments` finds.
    """
    if HELP_FLAGS & set(argv[1:]):
        print(about, values.get_help(include_special_flags=False), sep="\n")
        raise SystemExit(0)
    if "config" in values:
        check_config_arguments(argv)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise ArgumentError(_unknown_flag(error.flagname, values)) from error
    except flags.IllegalFlagValueError as error:
        raise ArgumentError(_wrong_value(error, values)) from error
    except flags.Error as error:
        raise ArgumentError(f"{' '.join(str(error).split())} {HELP}") from error
    if len(rest) > 1 and "config" in values and rest[1].partition(":")[0].endswith(".py"):
        raise ArgumentError(f"{rest[1]!r} is no flag: say --config={rest[1]} {HELP}")
    if len(rest) > 1:
        raise ArgumentError(
            f"{rest[1]!r} is no flag: flags begin with --, and a value that holds blanks stands in "
            f"quotes {HELP}"
        )


def require(values: flags.FlagValues, **examples: str) -> None:
    """Raises ArgumentError for the first of these flags that has no value.

    Args:
        values: parsed.
        examples: flag -> a value, to show how it is said.
    """
    for name, example in examples.items():
        if not values[name].value:
            raise ArgumentError(f"--{name} is missing: say --{name}={example} {HELP}")


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
    """What to say of a flag that there is not; config keys are named among the flags."""
    names = {flag: f"--{flag}" for flag in values if not flag.startswith("config.")}
    if "config" in values and values["config"].value is not None:
        keys = leaf_keys(values["config"].value)
        for key in keys:
            names.setdefault(key, f"--config.{key}")
        same = [f"--config.{key}" for key in _called(name, keys)]
        if same:
            return f"--{name} is no flag; did you mean {' or '.join(same)}?"
        for key in keys:
            names.setdefault(_last(key), f"--config.{key}")
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {names[nearest[0]]}?" if nearest else ""
    return f"--{name} is no flag{hint} {HELP}"


def _wrong_value(error: flags.IllegalFlagValueError, values: flags.FlagValues) -> str:
    """What to say of a flag's value that does not fit; absl passes on what the parser raised."""
    text, reason = str(error), str(error.__context__)
    name, _, value = text.removeprefix("flag --").removesuffix(f": {reason}").partition("=")
    if name not in values:
        return " ".join(text.split())
    flag, given = values[name], f"--{name}={value}"
    if isinstance(flag.parser, flags.BooleanParser):
        return f"{given}: expected True or False"
    if isinstance(flag.parser, flags.EnumParser):
        return f"{given} is unknown{suggest(value, flag.parser.enum_values)}"
    if isinstance(flag.parser, flags.IntegerParser | flags.FloatParser):
        whole = isinstance(flag.parser, flags.IntegerParser)
        least = flag.parser.lower_bound
        limit = "" if least is None else f" from {least:g}"
        return f"{given}: expected a {'whole number' if whole else 'number'}{limit}"
    if "tuple" in type(flag.parser).__name__.lower():
        example: Any = values["config"].value
        for part in name.split(".")[1:]:
            example = example[part]
        return (
            f"{given}: expected values with commas between them, in brackets, texts in quotes, and "
            f'all of it in quotes for the shell, such as --{name}="{example[:2] or ("a", "b")}"'
        )
    return f"{given}: {' '.join(reason.split())}"


# ---- --config=FILE and --config.KEY=VALUE ----


def check_config_arguments(argv: Sequence[str]) -> None:
    """Checks `--config` and the keys of `--config.KEY`, of which absl says much or nothing.

    Raises:
        ArgumentError: there is no such file, it gives no config, or that has no such key.
    """
    config = None
    for name, value in _config_arguments(argv):
        if name == "config":
            config = _load_config(value)
            continue
        key = name.partition(".")[2]
        if config is None:
            raise ArgumentError(
                f"--{name} comes before --config: say --config=FILE first, such as "
                f"--config=configs/gestures.py --{name}=..."
            )
        known = leaf_keys(config)
        of_group = [other for other in known if other.startswith(f"{key}.")]
        if of_group:
            raise ArgumentError(
                f"config.{key} is a group of keys: name one of them, such as --config.{of_group[0]}"
            )
        if key not in known:
            raise ArgumentError(f"the config has no key {key!r}{_nearest_key(key, known)}")


def _config_arguments(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """("config", FILE) and ("config.KEY", ...), also where a blank stands in place of the "="."""
    for index, argument in enumerate(argv[1:], start=1):
        match = re.fullmatch(r"--?(?:no)?(config(?:\.[^=]*)?)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            continue
        name, value = match.groups()
        if value is None and name == "config":
            following = argv[index + 1] if index + 1 < len(argv) else ""
            value = "" if following.startswith("-") else following
        yield name, value or ""


def _nearest_key(key: str, known: Sequence[str]) -> str:
    group, _, name = key.rpartition(".")
    same = _called(name, known)
    if same:
        return f"; did you mean {' or '.join(map(repr, same))}?"
    of_group = [_last(other) for other in known if group and other == f"{group}.{_last(other)}"]
    nearest = [other for other in of_group if name in other.split("_")]
    nearest = nearest or difflib.get_close_matches(name, of_group, n=1)
    if nearest:
        return f"; did you mean {' or '.join(repr(f'{group}.{other}') for other in nearest)}?"
    if of_group:
        return f"; {group} has {', '.join(of_group)}"
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "; configs/base.py lists them"


def _called(name: str, keys: Sequence[str]) -> list[str]:
    """The keys whose last part is `name`, or has it as its initials (lr, wd)."""
    same = [key for key in keys if _last(key) == name]
    return same or [
        key for key in keys if "_" in key and "".join(w[0] for w in _last(key).split("_")) == name
    ]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _load_config(spec: str) -> ConfigDict:
    """The config of FILE or FILE:VARIANT, without what the command line changes in it."""
    from ml_collections import ConfigDict, config_flags

    file = spec.partition(":")[0]
    if not file:
        raise ArgumentError("--config is empty: say --config=FILE, such as configs/gestures.py")
    if not Path(file).is_file():
        files = {f.stem: str(f) for f in sorted(Path("configs").glob("[a-z]*.py"))}
        files.pop("base", None)
        nearest = difflib.get_close_matches(Path(file).stem, files, n=1)
        if not files:
            hint = f"; the folder here, {Path.cwd()}, has no configs/: go to the repository's root"
        elif nearest:
            hint = f"; did you mean {files[nearest[0]]!r}?"
        else:
            hint = f"; this repository's are {', '.join(files.values())}"
        raise ArgumentError(f"--config={spec}: there is no file {file}{hint}")
    if not file.endswith(".py") or not os.access(file, os.R_OK):
        wrong = "is no config" if os.access(file, os.R_OK) else "may not be read"
        raise ArgumentError(
            f"--config={spec}: {file} {wrong}; expected a Python file with get_config(), such as "
            "configs/gestures.py"
        )
    values = flags.FlagValues()
    argv = ["", f"--config={spec}"]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
        getattr(config, "lock", None)  # where the file raised an OSError, it comes now
    except Exception as error:  # a config file of the user's own may raise anything
        raised: BaseException = error
        if isinstance(error, flags.IllegalFlagValueError):  # absl's, of ml_collections', of it
            raised = error.__context__ or error
            raised = raised.__context__ or raised
        elif isinstance(error, OSError):
            raised = error.__cause__ or error
        raise ArgumentError(f"--config={spec}: {_reason(raised, file)}") from error
    if not isinstance(config, ConfigDict):
        raise ArgumentError(
            f"--config={spec}: its get_config() gives {type(config).__name__}, expected ConfigDict"
        )
    return config


def _reason(error: BaseException, file: str) -> str:
    """What a config file raised, and where in it unless it speaks for itself."""
    message = " ".join(_words(error).split())
    if isinstance(error, ValueError):
        return message
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} is no Python: {error.msg}"
    if isinstance(error, AttributeError) and "get_config" in message:
        return "the file has no function get_config()"
    if isinstance(error, TypeError) and "get_config()" in message:
        return "its get_config() takes no variant: leave out the colon and what follows"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = f" in line {lines[-1]}" if lines else ""
    return f"the file cannot be used: {type(error).__name__}{where}: {message}"


# ---- arguments of argparse ----


class Parser(argparse.ArgumentParser):
    """argparse's, with one line for wrong arguments."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's; remembers what was given, for `error`."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints the line and leaves with status 2."""
        known = self._flags()
        given = [argument.partition("=")[0] for argument in self._given]
        odd = [flag for flag in given if flag[:2] == "--" and not _begins_one(flag, known)]
        if odd:  # before what may be missing for its sake
            message = f"unrecognized arguments: {odd[0]}"
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        choice = re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        missing = re.match(r"the following arguments are required: (.*)", message)
        if unknown is not None and unknown[1].startswith("--"):
            name = unknown[1].partition("=")[0]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            message = f"{name} is no flag{hint}"
        elif unknown is not None:
            message = f"{unknown[1]!r} is one argument too many"
        elif choice is not None:
            choices = [name.strip("'") for name in choice[3].split(", ")]
            message = f"{choice[1]}: {choice[2]!r} is unknown{suggest(choice[2], choices)}"
        elif missing is not None:
            message = f"{missing[1]} {'are' if ',' in missing[1] else 'is'} missing"
            for action in self._actions:
                if missing[1] == action.metavar and action.choices:
                    message += f": one of {', '.join(action.choices)}"
        else:
            message = message.removeprefix("argument ")
        self.exit(2, f"error: {one_line(message, LONGEST)} {HELP}\n")

    def _flags(self) -> list[str]:
        """Its flags and those of its subcommands, whose unknown ones are this parser's to name."""
        names = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names += [name for sub in action.choices.values() for name in sub._flags()]
        return names


def _begins_one(flag: str, known: Sequence[str]) -> bool:
    return any(name.startswith(flag) for name in known)


# ---- where a file is to be written ----


def check_output_file(path: Path) -> None:
    """Raises OSError unless a file can be put there: better now than after an hour."""
    path = path.expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder; name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {folder} may not be written")


def check_output_folder(folder: Path, what: str, inside: str = "") -> None:
    """Raises OSError unless a folder can be made or written; makes nothing itself.

    Args:
        folder: that shall be written to.
        what: the flag that names another.
        inside: the folder in it that is meant.
    """
    written = folder.expanduser() / inside
    existing = next(p for p in (written, *written.absolute().parents) if os.path.lexists(p))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    kind = "a file, not a folder" if existing.exists() else "a link to what is not there"
    reason = "may not be written" if existing.is_dir() else f"is {kind}"
    raise OSError(f"{what}={folder} cannot be used: {existing} {reason}; choose another {what}")


# ---- the work ----


def _same(error: Exception) -> Exception:
    return error


def run(
    work: Callable[[list[str]], int | None],
    argv: list[str],
    *,
    explain: Callable[[Exception], Exception] = _same,
    who: Callable[[], str] = str,
) -> int:
    """Does the work and returns the exit status; what goes wrong becomes one line on stderr.

    Args:
        work: takes `argv`; what it returns is the status, None is 0.
        argv: as `sys.argv`; `--debug` in it shows tracebacks and the libraries' log.
        explain: what an error means, where its own words do not tell.
        who: of several processes, the one that speaks.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    debug = "--debug" in argv
    if not debug:
        logging.set_verbosity(logging.WARNING)
    try:
        return work(argv) or 0
    except ArgumentError as error:
        print(f"error: {one_line(str(error), LONGEST)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped) as stop:
        return _say_stopped(stop)
    except BrokenPipeError:  # nobody reads on: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        error = explain(error)
        # What our own checks raise speaks for itself; anything else is named.
        known = isinstance(error, ValueError | OSError | FloatingPointError)
        name = "" if known else f"{type(error).__name__}: "
        message = one_line(f"{name}{_words(error)}", LONGEST)
        hint = "" if debug else " (--debug shows where)"
        print(f"error: {who()}{message}{hint}", file=sys.stderr)
        return 1


def _words(error: BaseException) -> str:
    """An error's message; the system's own without its number, the file in front."""
    if isinstance(error, OSError) and error.errno and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _say_stopped(stop: Any) -> int:
    """Says what a signal ended and what is left; returns the status."""
    notes = "; ".join(getattr(stop, "__notes__", ()))
    signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
    if notes:
        stop = Stopped(signum, notes)
    elif not isinstance(stop, Stopped):
        stop = Stopped(signum)
    print(stop, file=sys.stderr)
    return 128 + signum
