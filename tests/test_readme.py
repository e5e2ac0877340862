"""The documents: each command is one that its program takes, and a user's way through them works.

Every command of README.md, CONTRIBUTING.md and docs/*.md, in blocks and in the text, is parsed by
its own program; flags alone, config keys, links, headings, paths and names of the code are looked
up. Nothing of the documents is written down here a second time but what is run:

`TestWalk` runs the README's commands for the gestures, word for word, in a folder of its own. What
is appended only makes them small: few clips, one narrow layer, one epoch. Its Python blocks are
executed there too. What costs more is marked slow: its other data, the released checkpoint's three
questions, the scripts. By other tests, in part through the functions behind the commands, are run
    two processes that train one model                        test_distributed
    `to_flax` of a training checkpoint, `init_from` it        test_convert
    `to_flax --prove`, `verify --prove`                       test_convert
    savedmodel and onnx                                       test_export
    `profile --config`                                        test_profile
    `predict`: several inputs, `--state`, `--events`          test_predict
    an extracted download, its parts                          test_jester, test_prepare_jester
    `scripts/kill_test.py`                                    test_kill
    `scripts/benchmark.py`, section by section                test_benchmark
A camera and ffmpeg are run by none.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import rvit_jax
from configs import base, gestures, jester
from input_pipeline import check
from input_pipeline import gestures as drawing
from input_pipeline.command_line import leaf_keys
from rvit_jax import annotate, command, export, main, predict, profile
from rvit_jax.config import check_config, lookup
from weights_converter import __main__ as converter

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(map(str, Path("docs").glob("*.md"))))
ROOMS = ("rvit_jax", "input_pipeline", "weights_converter", "configs", "scripts", "tests")
KEYS = leaf_keys(base.get_config())
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
# What the documents leave to the reader, and something that fits.
PLACEHOLDERS = {
    r"--config=\.\.\.": "--config=configs/jester.py",
    "KEY=VALUE": "seed=1",
    r"=N\b": "=2",
    r"=ROW,COLUMN\b": "=3,4",
}
# Programs that are not ours, and why their commands are taken as they are.
FOREIGN = {
    "pip": "installs; the files and versions that it names are checked",
    "python3.11": "makes a virtual environment",
    "source": "enters it",
    "ffmpeg": "gives raw frames, which the walk gives too",
    "ruff": "is run on every change",
    "mypy": "the same",
    ".ci/run": "runs all of this; its arguments are looked up in it",
    ".ci/audit": "is run on every change",
}
FOREIGN_FLAGS = ("--xla_cpu_experimental_ynn_fusion_type",)
# Blocks that are no commands, by the word that they begin with.
TABLES = {
    "data/jester/20bn-jester-v1/<id>/00001.jpg": "where files lie",
    "main": "who imports whom",
    "rvit_jax/": "the rooms and their files",
}


# ---- reading documents ----


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block."""

    where: str
    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, with the variables NAME=VALUE that are set for it."""

    where: str
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def split_document(document: str) -> tuple[list[Block], str]:
    """Its fenced blocks, and its text without them, line by line where it was."""
    blocks, text, fence = [], [], None
    for number, line in enumerate(Path(document).read_text().splitlines(), start=1):
        if fence is None and line.startswith("```"):
            fence, first, inside = line.strip("`"), number, []
        elif fence is not None and line.startswith("```"):
            blocks.append(Block(f"{document}:{first}", fence, "\n".join(inside)))
            fence = None
        elif fence is not None:
            inside.append(line)
        text.append("" if fence is not None or line.startswith("```") else line)
    assert fence is None, f"{document}: a block is not closed"
    return blocks, "\n".join(text)


def split_commands(text: str, where: str) -> Iterator[Command]:
    """The commands of a block, as a shell reads them."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for word in (*lexer, ";"):
            if set(word) <= set("&|;"):
                first = next((i for i, w in enumerate(words) if not re.match(r"[A-Z_]+=", w)), 0)
                if words:
                    yield Command(where, tuple(words[first:]), tuple(words[:first]))
                words = []
            else:
                words.append(word)


def spans(text: str) -> list[str]:
    """What stands in backticks; a line's end within is a space."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def tables(text: str) -> Iterator[list[list[str]]]:
    """The rows of each table, the heading first, cut in cells."""
    for table in re.findall(r"(?m)(?:^\|.*\|$\n?)+", text):
        lines = table.strip().splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        yield [rows[0], *rows[2:]]


def slugs(document: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.*?) *$", split_document(document)[1]):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        numbers = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(s for s in numbers if s not in found))
    return found


BLOCKS = [block for document in DOCUMENTS for block in split_document(document)[0]]
TEXTS = {document: split_document(document)[1] for document in DOCUMENTS}
SPANS = [(document, span) for document in DOCUMENTS for span in spans(TEXTS[document])]
IN_BLOCKS = [
    found
    for block in BLOCKS
    if block.language == "" and block.text.split()[0] not in TABLES
    for found in split_commands(block.text, block.where)
]
IN_TEXT = [
    found
    for document, span in SPANS
    if re.match(r"([A-Z_]+=\S+ )?(python|python3\.11|pip) ", span)
    for found in split_commands(span, document)
]
COMMANDS = [*IN_BLOCKS, *IN_TEXT]
FLAGS = [(document, span) for document, span in SPANS if span.startswith("--")]


def fill_in(text: str) -> str:
    """Something in place of what is left to the reader."""
    for pattern, instead in PLACEHOLDERS.items():
        text = re.sub(pattern, instead, text)
    return text


def test_there_is_something_to_check():
    """The patterns find what they are for."""
    assert {"README.md", "CONTRIBUTING.md", "docs/data.md"} <= set(DOCUMENTS)
    assert len(IN_BLOCKS) > 40
    assert len(IN_TEXT) > 10
    assert len(FLAGS) > 20
    text = "a \\\n  b 'c d'  # e\nX=1 python -m f | g && h"
    words = [(found.words, found.variables) for found in split_commands(text, "")]
    assert words == [
        (("a", "b", "c d"), ()),
        (("python", "-m", "f"), ("X=1",)),
        (("g",), ()),
        (("h",), ()),
    ]


# ---- commands, held against their programs ----


def parse_main(arguments: Sequence[str]) -> set[str]:
    argv = ["main", *arguments]
    values = main.define_flags(argv)
    command.parse(values, argv, "")
    main._check(values)
    main._query(values.query)
    return set(values)


def parse_check(arguments: Sequence[str]) -> set[str]:
    argv = ["check", *arguments]
    values = check._parse(argv)
    check_config(values.config, base.get_config())
    return set(values)


def parse_export(arguments: Sequence[str]) -> set[str]:
    values = export.define_flags()
    command.parse(values, ["export", *arguments], "")
    export._check_flags(values)
    return set(values)


def parse_profile(arguments: Sequence[str]) -> set[str]:
    argv = ["profile", *arguments]
    profile._check_arguments(argv)
    values = profile.define_flags(argv)
    command.parse(values, argv, "")
    if values.config is not None:
        check_config(values.config, base.get_config())
    return set(values)


def parse_prepare(arguments: Sequence[str]) -> set[str]:
    from scripts import prepare_jester

    values = prepare_jester.define_flags()
    command.parse(values, ["prepare_jester", *arguments], "")
    assert values.source
    assert values.data_dir
    return set(values)


def parse_script(name: str) -> Callable[[Sequence[str]], set[str]]:
    """Of a script with a config."""

    def parse(arguments: Sequence[str]) -> set[str]:
        script = importlib.import_module(f"scripts.{name}")
        argv = [name, *arguments]
        values = script.parse_flags(argv)
        if name == "benchmark":
            script.parse_choices(values.what, script.SECTIONS, "what")
            script.settings_from_flags(values)
        check_config(values.config, base.get_config())
        return set(values)

    return parse


class _Parsed(Exception):  # noqa: N818  no error
    """Stands in for the work of a command."""


def parse_argparse(run: Callable[[list[str]], object]) -> Callable[[Sequence[str]], set[str]]:
    """Of a program that makes its parser and goes on to work."""

    def parse(arguments: Sequence[str]) -> set[str]:
        whole, found = argparse.ArgumentParser.parse_args, []

        def stop(parser, args=None, namespace=None):
            found.append(parser)
            for one in found:
                one.allow_abbrev = False  # documents write flags out
                for action in one._actions:
                    if isinstance(action.choices, dict):  # subcommands
                        found.extend(action.choices.values())
            whole(parser, args, namespace)
            raise _Parsed

        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
            contextlib.suppress(_Parsed),
        ):
            run(list(arguments))
        options = (o for parser in found for a in parser._actions for o in a.option_strings)
        return {option.lstrip("-") for option in options}

    return parse


def parse_kill_test(arguments: Sequence[str]) -> set[str]:
    from scripts import kill_test

    return parse_argparse(kill_test.main)(arguments)


PARSERS: dict[str, Callable[[Sequence[str]], set[str]]] = {
    "rvit_jax.main": parse_main,
    "rvit_jax.predict": parse_argparse(predict.main),
    "rvit_jax.export": parse_export,
    "rvit_jax.profile": parse_profile,
    "input_pipeline.check": parse_check,
    "input_pipeline.gestures": parse_argparse(drawing.main),
    "weights_converter": parse_argparse(converter.main),
    "scripts/benchmark.py": parse_script("benchmark"),
    "scripts/compare_training.py": parse_script("compare_training"),
    "scripts/contact_sheet.py": parse_script("contact_sheet"),
    "scripts/kill_test.py": parse_kill_test,
    "scripts/prepare_jester.py": parse_prepare,
    "scripts/attention_on_hand.py": parse_script("attention_on_hand"),
    "scripts/streaming_accuracy.py": parse_script("streaming_accuracy"),
}
# The least that a flag, named alone in a document, needs beside it.
LEAST = [
    ("rvit_jax.main", ["--config=configs/gestures.py"]),
    ("rvit_jax.main", ["--config=configs/jester.py"]),
    ("rvit_jax.main", ["--config=configs/gestures.py", "--mode=evaluate"]),
    ("rvit_jax.main", ["--config=configs/jester.py", "--mode=evaluate"]),
    ("rvit_jax.main", ["--config=configs/gestures.py", "--mode=visualize"]),
    ("rvit_jax.predict", ["--checkpoint=DIR", "--input=FILE"]),
    ("rvit_jax.export", ["--checkpoint=DIR", "--output=DIR"]),
    ("rvit_jax.profile", ["--checkpoint=DIR"]),
    ("weights_converter", ["to_flax", "FILE", "DIR"]),
    ("scripts/benchmark.py", []),
]


def parse_command(name: str, arguments: Sequence[str]) -> set[str]:
    """Parses as the program does; its flags. A wrong one raises, whichever way it is said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return PARSERS[name](arguments)
        except SystemExit as leave:
            if leave.code:
                raise ValueError(said.getvalue()) from leave
    return set()  # after --help


def target(found: Command) -> tuple[str, tuple[str, ...]]:
    """The module or script that `python` runs, and its arguments."""
    words = found.words[1:]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


OURS = [found for found in COMMANDS if found.words[0] == "python"]


def test_every_command_is_known():
    """A new program or module in the documents needs a parser above."""
    for found in COMMANDS:
        assert found.words[0] in ("python", *FOREIGN), found
        if found.words[0] == "python":
            assert target(found)[0] in ("pytest", *PARSERS), found
        elif found.words[0].startswith("."):
            script = Path(found.words[0])
            assert os.access(script, os.X_OK), found
            assert all(argument in script.read_text() for argument in found.words[1:]), found


@pytest.mark.parametrize(
    "found", [found for found in OURS if target(found)[0] != "pytest"], ids=str
)
def test_a_command_is_one_that_its_program_takes(found):
    name, arguments = target(found)
    parse_command(name, [fill_in(argument) for argument in arguments])
    file = Path(name if name.endswith(".py") else f"{name.replace('.', '/')}.py")
    for variable in found.variables:
        assert variable.partition("=")[0] in file.read_text(), found


@pytest.mark.parametrize(
    "found", [found for found in OURS if target(found)[0] == "pytest"], ids=str
)
def test_a_call_of_the_tests_names_tests(found, pytestconfig):
    known, unknown = pytestconfig._parser.parse_known_and_unknown_args(list(target(found)[1]))
    assert not unknown
    files = [Path(file) for file in known.file_or_dir] or list(Path("tests").glob("test_*.py"))
    texts = [file.read_text() for file in files]
    for variable in found.variables:
        assert any(variable.partition("=")[0] in text for text in texts), found
    if known.markexpr and "-m" in found.words[3:]:
        assert any(f"pytest.mark.{known.markexpr}" in text for text in texts)
    if known.keyword:
        assert any(re.search(rf"def test_\w*{known.keyword}", text) for text in texts)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m rvit_jax.main --config=configs/gesture.py",
        "python -m rvit_jax.main --config=configs/gestures.py:al",
        "python -m rvit_jax.main --config=configs/jester.py --config.model.heads=2",
        "python -m rvit_jax.main --config=configs/jester.py --config.model.num_classes=12",
        "python -m rvit_jax.main --config=configs/jester.py --config.opt_level=O3",
        "python -m rvit_jax.main --config=configs/jester.py --mode=test",
        "python -m rvit_jax.predict --checkpoint=a --input=b --evens",
        "python -m rvit_jax.predict --checkpoint=a --input=- --frame_size=176",
        "python -m rvit_jax.export --checkpoint=a --output=b --format=stable",
        "python -m rvit_jax.profile --checkpoint=a --batch=1",
        "python -m input_pipeline.check --config=configs/jester.py --split=train",
        "python -m input_pipeline.gestures --output=a --classes=tim",
        "python -m weights_converter to_jax a b",
        "python scripts/benchmark.py --what=inferense",
        "python scripts/compare_training.py --config=configs/gestures.py --seed=1",
        "python scripts/kill_test.py --kill=1",
        "python scripts/prepare_jester.py --source=a",
        "python scripts/streaming_accuracy.py --config=configs/gestures.py:all",
    ],
)
def test_a_wrong_command_would_be_found(wrong):
    (found,) = split_commands(wrong, "")
    with pytest.raises((AssertionError, ValueError, command.ArgumentError, flags.Error)):
        parse_command(*target(found))


def accepted(words: Sequence[str]) -> bool:
    """Whether some command takes these flags, or, of one without a value, knows it."""
    for name, least in LEAST:
        with contextlib.suppress(AssertionError, ValueError, command.ArgumentError, flags.Error):
            parse_command(name, [*least, *words])
            return True
    (word, *more) = words
    alone = word.removeprefix("--")
    return not more and any(alone in parse_command(name, least) for name, least in LEAST)


@pytest.mark.parametrize(("document", "span"), FLAGS)
def test_a_flag_in_the_text_is_some_commands(document, span):
    del document
    if span not in FOREIGN_FLAGS:
        assert accepted(shlex.split(fill_in(span)))


def test_flags_that_no_command_has_would_be_found():
    for words in (["--windows"], ["--window=x"], ["--config.model.attention=line"], ["--prov"]):
        assert not accepted(words), words


def test_files_and_versions_to_install():
    for found in COMMANDS:
        if found.words[0] == "pip":
            for flag, file in zip(found.words, found.words[1:], strict=False):
                assert flag != "-r" or Path(file).is_file(), found
    wanted = "".join(Path(f).read_text() for f in ("requirements.txt", "requirements-dev.txt"))
    for document in DOCUMENTS:
        text = Path(document).read_text()
        for name, rest in re.findall(r"\b(jax|torch)(?:\[\w+\])?((?:~=|==)[\d.]*\d)", text):
            assert re.search(rf"(?m)^{name}{re.escape(rest)}(\s|$)", wanted), (document, name, rest)


def test_what_every_change_must_pass_is_the_test_command():
    (found,) = re.findall(
        r"(?m)^pip install .* && python -m pytest$", Path("README.md").read_text()
    )
    assert found in Path(".ci/run").read_text()


# ---- blocks that are no commands ----


def test_every_block_is_of_a_known_kind():
    """Commands are parsed, Python is executed below, formulas are read by people."""
    for block in BLOCKS:
        assert block.language in ("", "python", "math"), block.where
        assert block.language != "python" or block.where.startswith("README.md"), block.where
    first_words = [block.text.split()[0] for block in BLOCKS]
    for word in TABLES:
        assert first_words.count(word) == 1, word


def block_that_begins(word: str) -> str:
    (text,) = (block.text for block in BLOCKS if block.text.split()[0] == word)
    return text


def test_files_of_jester_lie_where_the_config_looks():
    text = block_that_begins("data/jester/20bn-jester-v1/<id>/00001.jpg")
    paths = [line.split()[0] for line in text.splitlines()]
    assert all(path.startswith(f"{jester.get_config().dataset.data_dir}/") for path in paths)
    splits = re.search(r"\{(.*)\}", paths[1])[1].split(",")
    assert splits == list(drawing.SPLITS)  # TestWalk has such a folder read


def test_the_rooms_are_listed_file_by_file():
    listed: dict[str, str] = {}
    for line in block_that_begins("rvit_jax/").splitlines():
        if not line.startswith(" "):
            room, _, line = line.partition("/")
            listed[room] = ""
        listed[room] += line + "\n"
    for room in ("rvit_jax", "input_pipeline", "weights_converter"):
        names = re.findall(r"(?m)^  (\w+)  ", listed[room])
        files = {file.stem for file in Path(room).glob("*.py")}
        assert len(set(names)) == len(names)
        assert set(names) | {"__init__"} == files | {"__init__"}, room
    for file in Path("scripts").glob("*.py"):
        part_of_benchmark = file.stem.startswith("benchmark_")
        assert part_of_benchmark or file.stem in listed["scripts"], file


def test_imports_run_as_the_arrows_say():
    """Whoever stands left imports who stands right, directly or not, and never the reverse."""
    imported = {}
    for file in Path("rvit_jax").glob("*.py"):
        tree, names = ast.parse(file.read_text()), set()
        tree.body = [node for node in tree.body if "TYPE_CHECKING" not in ast.unparse(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rvit_jax"):
                names |= {*node.module.split(".")[1:], *(alias.name for alias in node.names)}
        imported[file.stem] = names

    def reach(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        new = (imported[name] & set(imported)) - seen
        return new.union(*(reach(other, seen | new | {name}) for other in new))

    chains = re.split(r"\n|   +", block_that_begins("main"))
    assert len(chains) > 2
    for chain in chains:
        groups = [group.strip().split(", ") for group in chain.split("->")]
        for left, right in itertools.pairwise(groups):
            reached = set().union(*map(reach, left))
            assert set(right) <= reached, (left, right)
            assert not set(left) & set().union(*map(reach, right)), (left, right)


# ---- what the text names ----


def links() -> list[tuple[str, str]]:
    pattern = r"\]\(([^)\s]+)\)"
    return [(document, to) for document in DOCUMENTS for to in re.findall(pattern, TEXTS[document])]


@pytest.mark.parametrize(("document", "to"), links())
def test_a_link_leads_somewhere(document, to):
    if to.startswith("https://"):
        return  # is not fetched
    path, _, anchor = to.partition("#")
    file = (Path(document).parent / path) if path else Path(document)
    assert file.exists()
    if anchor:
        assert anchor in slugs(str(file))


def test_slugs_are_githubs(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(
        "# A `b_c`, d\n## Two-fold: 20 %\n```\n# no heading\n```\n## A b_c d\n# x\n# x\n"
    )
    assert slugs(str(file)) == {"a-b_c-d", "two-fold-20-", "a-b_c-d-1", "x", "x-1"}


def holds(key: str, text: str) -> bool:
    """Whether some config takes this value, written as on the command line or in Python."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    section, _, name = key.rpartition(".")
    for config in (base.get_config(), gestures.get_config(), jester.get_config()):
        (lookup(config, section) if section else config)[name] = value
        with contextlib.suppress(ValueError, TypeError):
            check_config(config, base.get_config(), training=False)
            return True
    return False


def key_problem(span: str) -> str | None:
    """What is wrong with a span that names a config key; None too where it names none."""
    section = "|".join(sorted(SECTIONS))
    match = re.fullmatch(rf"((?:{section})(?:\.[a-z_0-9]+)+)(\.\*)?(?:=(\S.*))?", span)
    if match and not re.search(r"\.(py|json)$", match[1]):
        key, rest, value = match.groups()
        if rest or isinstance(lookup(base.get_config(), key), type(base.get_config())):
            return None if any(k.startswith(f"{key}.") for k in KEYS) else f"no section {key}"
        if key not in KEYS:
            return f"no key {key}"
        return None if value is None or holds(key, value) else f"no value of {key}: {value}"
    match = re.fullmatch(r"([a-z_0-9]+)=(\S.*)", span)
    keys = [key for key in KEYS if match and key.rpartition(".")[2] == match[1]]
    if keys and not any(holds(key, match[2]) for key in keys):
        return f"no value of {' or '.join(keys)}: {match[2]}"
    return None


# A module or a variable that is called as a section of the config.
NO_KEYS = re.compile(r"optimizer\.(py|make_\w+)|model\.json|loss\.\w+\(")


def test_config_keys_in_the_text():
    found = [(d, s, key_problem(s)) for d, s in SPANS if not NO_KEYS.match(s)]
    assert [problem for problem in found if problem[-1]] == []


def test_wrong_config_keys_would_be_found():
    assert key_problem("dataset.length_bucket") == "no key dataset.length_bucket"
    assert key_problem("dataset.argument.*") == "no section dataset.argument"
    assert key_problem('model.remat="all"') == 'no value of model.remat: "all"'
    assert key_problem("short_clips=rugged") == "no value of dataset.short_clips: rugged"
    for span in ("dataset.augment.*", "dataset.length_buckets=(16, 24)", 'remat="none"', "a=b"):
        assert key_problem(span) is None, span


def test_tables_of_keys_and_of_values():
    """A column headed `key` holds keys, their section said once; one headed by a key its values."""
    seen = 0
    for document in DOCUMENTS:
        for heading, *rows in tables(TEXTS[document]):
            keys = [span for span in spans(heading[0]) if span in KEYS]
            if heading[0] != "key" and not keys:
                continue
            seen += 1
            for row in rows:
                section = ""
                for span in spans(row[0]):
                    if keys:
                        assert holds(keys[0], span), (document, span)
                        continue
                    section = span.rpartition(".")[0] or section
                    full = f"{section}.{span.rpartition('.')[2]}".lstrip(".")
                    assert full in KEYS, (document, span)
    assert seen >= 4


PATH = re.compile(rf"(?:{'|'.join(ROOMS)}|docs|\.ci)/[\w./]*(:\w+)?")


def test_paths_in_the_text_exist():
    for document, span in SPANS:
        if PATH.fullmatch(span) and "NAME" not in span:
            file, _, variant = span.partition(":")
            assert Path(file).exists(), (document, span)
            if variant:
                parse_command("rvit_jax.main", [f"--config={span}"])


def sources() -> str:
    """All code but this file."""
    files = [file for room in ROOMS for file in Path(room).glob("*.py")]
    return "\n".join(file.read_text() for file in files if file.name != "test_readme.py")


def named_in_code() -> list[tuple[str, str]]:
    """Spans such as `RViT.step`, `config.check_config(config)`, `_CHOICES`, `test_order`."""
    found = []
    for document, span in SPANS:
        name = re.sub(r"[\[(].*", "", span)
        if re.fullmatch(r"[A-Za-z_][\w.]*\w", name) and name == name.strip("."):
            found.append((document, name))
    return sorted(set(found))


def owners() -> dict[str, list[object]]:
    """Modules by their name, with and without the room, and their classes by theirs."""
    found: dict[str, list[object]] = {}
    for room in ROOMS[:3]:
        for file in sorted(Path(room).glob("*.py")):
            name = room if file.stem == "__init__" else f"{room}.{file.stem}"
            module = importlib.import_module(name)
            found.setdefault(name, []).append(module)
            found.setdefault(file.stem, []).append(module)
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__.startswith(ROOMS[:3]):
                    found.setdefault(value.__name__, []).append(value)
    for file in sorted(Path("tests").glob("test_*.py")):
        found[file.stem] = [file]
    return found


def resolves(owner: object, path: Sequence[str]) -> bool:
    if isinstance(owner, Path):
        return all(re.search(rf"(class|def) {name}\b", owner.read_text()) for name in path)
    for name in path:
        if not hasattr(owner, name):
            fields = getattr(owner, "__dataclass_fields__", {})
            return name in fields and name == path[-1]
        owner = getattr(owner, name)
    return True


def test_names_of_the_code_are_in_the_code():
    owned, text, wrong = owners(), sources(), []
    for document, name in named_in_code():
        first, *rest = name.split(".")
        if first in SECTIONS and (name in KEYS or first == "model"):  # a key; a model in hand
            continue
        if name.endswith((".py", ".md", ".csv", ".json", ".jsonl", ".html", ".pth")):
            continue
        if first in owned:
            if not any(resolves(owner, rest) for owner in owned[first]):
                wrong.append((document, name))
        elif not rest and not re.search(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])", text):
            wrong.append((document, name))
    assert wrong == []


# ---- the walk ----

CLASSES = f"--config.dataset.classes={gestures.TIME_CLASSES}"
# What is appended to a command of configs/gestures.py: few clips, narrow layers, one epoch.
FEW_CLIPS = (
    "--config.dataset.generate.train=24",
    "--config.dataset.generate.validation=16",
    "--config.dataset.generate.test=16",
)
NARROW = (
    "--config.model.hidden_size=16",
    "--config.model.mlp_dim=24",
    "--config.model.num_layers=1",
    "--config.batch_size=8",
)
SMALL = (*FEW_CLIPS, *NARROW, "--config.num_epochs=1")
# And to one of configs/jester.py: the drawn classes, small frames, a few of them.
FEW_FRAMES = (CLASSES, "--config.dataset.num_frames=4")
SMALL_JESTER = (
    *FEW_FRAMES,
    *NARROW,
    "--config.model.num_classes=8",
    "--config.model.image_size=16",
    "--config.num_epochs=1",
)


class Workshop:
    """A folder with the repository's code in it, that takes what the commands write."""

    def __init__(self, folder: Path):
        self.folder = folder
        for room in ROOMS:
            (folder / room).symlink_to(Path(room).absolute())

    def run(
        self, line: str, *more: str, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a command of the documents as it stands there, with `more` appended."""
        words = tuple(shlex.split(line))
        assert words in [found.words for found in COMMANDS], f"in no document: {line}"
        done = subprocess.run(
            [sys.executable, *words[1:], *more],
            cwd=self.folder,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            input=stdin,
            capture_output=True,
            timeout=1200,  # where it hangs; a busy machine is no failure
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
        return done

    def records(self, workdir: str) -> list[dict]:
        text = (self.folder / workdir / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def clips(self, split: str) -> list[str]:
        """Ids of the drawn clips."""
        file = self.folder / "data/gestures/annotations" / f"jester-v1-{split}.csv"
        return [line.split(";")[0] for line in file.read_text().splitlines()]

    def frames(self, clip_id: str) -> Path:
        return self.folder / "data/gestures/20bn-jester-v1" / clip_id


def lines_of(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    return done.stdout.decode().splitlines()


def last_record(done: subprocess.CompletedProcess[bytes]) -> dict:
    return json.loads(lines_of(done)[-1])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    """With a small model of the gestures in results/gestures."""
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    shop.first = shop.run("python -m rvit_jax.main --config=configs/gestures.py", *SMALL)
    # The drawn set lies as Jester's download does.
    (shop.folder / "data/jester").symlink_to("gestures")
    (shop.folder / "DOWNLOAD").symlink_to("data/gestures")
    return shop


@pytest.fixture(scope="module")
def evaluated(workshop) -> dict:
    """The record of the test split."""
    line = "python -m rvit_jax.main --config=configs/gestures.py --mode=evaluate --split=test"
    return last_record(workshop.run(line, *FEW_CLIPS))


@pytest.fixture(scope="module")
def torch_file(workshop) -> Path:
    """final.pth: the model as a PyTorch file."""
    workshop.run("python -m weights_converter to_torch results/gestures gestures.pth")
    return (workshop.folder / "gestures.pth").rename(workshop.folder / "final.pth")


@pytest.fixture(scope="module")
def converted(workshop, torch_file) -> Path:
    """results/final: that file as a model again."""
    line = "python -m weights_converter to_flax final.pth results/final"
    names = "data/gestures/annotations/jester-v1-labels.csv"
    told = ("--attention=softmax", "--num_heads=4", f"--class_names={names}")
    assert torch_file.is_file()
    assert "NOT PROVEN" in workshop.run(line, *told).stdout.decode()
    return workshop.folder / "results/final"


class TestWalk:
    def test_train(self, workshop):
        (record,) = workshop.records("results/gestures")
        assert (record["step"], record["num_clips"]) == (3, 16)
        assert lines_of(workshop.first)[-1].startswith("test: loss ")

    def test_a_second_start_goes_on_where_it_was(self, workshop):
        before = workshop.records("results/gestures")
        again = workshop.run("python -m rvit_jax.main --config=configs/gestures.py", *SMALL)
        assert "resuming results/gestures at step 3 of 3" in lines_of(again)
        assert lines_of(again)[-1] == lines_of(workshop.first)[-1]
        assert workshop.records("results/gestures") == before

    def test_evaluate(self, workshop, evaluated):
        assert (evaluated["split"], evaluated["num_clips"]) == ("test", 16)
        folder = workshop.folder / "results/gestures/evaluation"
        assert json.loads((folder / "test.json").read_text()) == evaluated
        loss, top1 = re.match(
            r"test: loss (\S+), top1 (\S+)%,", lines_of(workshop.first)[-1]
        ).groups()
        assert (float(loss), float(top1)) == pytest.approx(
            (evaluated["loss"], 100 * evaluated["top1"]), abs=0.006
        )

    def test_visualize_and_the_files_of_a_workdir(self, workshop, evaluated):
        """The files that the README's table lists are all that a workdir has."""
        assert evaluated
        line = "python -m rvit_jax.main --config=configs/gestures.py --mode=visualize --split=test"
        ids = workshop.clips("test")[:1]
        done = workshop.run(f"{line} --ids=7,24", *FEW_CLIPS, f"--ids={','.join(ids)}")
        workdir = workshop.folder / "results/gestures"
        for file in lines_of(done)[1:]:
            assert (workshop.folder / file).is_file()
        (kinds,) = re.findall(r"`attention_visual/\{(.*)\}/`", TEXTS["README.md"])
        there = {file.name for file in (workdir / "attention_visual").iterdir()}
        assert there == set(kinds.split(","))
        (rows,) = (rows for h, *rows in tables(TEXTS["README.md"]) if h[0] == "file")
        covered = set()
        for row in rows:
            folder = ""
            for span in spans(row[0]):
                pattern = span.replace("STEP", "*").replace("SPLIT", "*").rstrip("/")
                folder = pattern.rpartition("/")[0] or folder
                found = list(workdir.glob(f"{folder}/{Path(pattern).name}".lstrip("/")))
                assert found, span
                covered |= {file.relative_to(workdir).parts[0] for file in found}
        assert {file.name for file in workdir.iterdir()} - {".lock"} == covered

    @pytest.mark.slow
    def test_controls_of_the_order_of_frames(self, workshop):
        (control,) = (span for _, span in FLAGS if "frame_order=shuffled" in span)
        mode, split, order = control.split()
        line = f"python -m rvit_jax.main --config=configs/gestures.py {mode} {split}"
        record = last_record(workshop.run(line, *FEW_CLIPS, order))
        assert record["frame_order"] == "shuffled"
        folder = workshop.folder / "results/gestures/evaluation"
        assert json.loads((folder / "test_shuffled.json").read_text()) == record

    def test_predict(self, workshop, evaluated):
        """A film, a folder of frames beside it, and a pipe."""
        file = workshop.folder / "results/gestures/evaluation/test_predictions.csv"
        row = next(csv.DictReader(file.open(), delimiter=";"))
        assert evaluated["num_clips"] == 16
        folder = workshop.frames(row["id"])
        images = [Image.open(file).convert("RGB") for file in sorted(folder.iterdir())]
        pixels = np.stack([np.asarray(image.resize((176, 100))) for image in images])
        film = annotate.Film(workshop.folder / "clip.mp4", 12.0)
        for image in pixels:
            film.add(image)
        film.close()
        frames = list(range(0, len(pixels), 3))

        line = "python -m rvit_jax.predict --checkpoint=results/gestures --input=clip.mp4"
        done = workshop.run(line, "--json", f"--input={folder}")
        said = [json.loads(text) for text in lines_of(done)]
        for name in ("clip.mp4", str(folder)):
            answers = [a["frame"] for a in said if a["input"] == name and "top" in a]
            assert answers == frames
        (result,) = (a for a in said if a["input"] == str(folder) and "result" in a)
        assert (result["num_frames"], result["num_steps"]) == (len(pixels), len(frames))
        assert result["result"] == row["predicted"]  # as it was evaluated
        assert result["probability"] == pytest.approx(float(row["probability"]), abs=1e-5)

        done = workshop.run(f"{line} --save=answers.mp4", "--events")
        assert re.match(rf"result: .* after {len(pixels)} frames", lines_of(done)[-1])
        for name in ("answers.mp4", "answers.png"):
            assert (workshop.folder / name).stat().st_size > 1000

        line = "python -m rvit_jax.predict --checkpoint=results/gestures --input=-"
        line += " --frame_size=176x100 --json"
        piped = [json.loads(text) for text in lines_of(workshop.run(line, stdin=pixels.tobytes()))]
        assert [answer["frame"] for answer in piped[:-1]] == frames
        assert piped[-1]["num_steps"] == len(frames)

    def test_export(self, workshop):
        line = "python -m rvit_jax.export --checkpoint=results/gestures --output=exported"
        line += " --format=stablehlo,savedmodel"
        done = workshop.run(line, "--format=stablehlo", "--platforms=cpu", "--what=step")
        assert lines_of(done)[-1].startswith("written to exported")
        names = {file.name for file in (workshop.folder / "exported").iterdir()}
        assert names == {"export.json", "initial_hidden.npy", "step.jaxexport"}

    def test_profile(self, workshop):
        line = "python -m rvit_jax.profile --checkpoint=results/gestures"
        done = workshop.run(line, "--json", "--seconds=0")
        parameters = sum(leaf.size for leaf in leaves(workshop.folder / "results/gestures"))
        measured = json.loads(done.stdout)
        assert sum(part["parameters"] for part in measured["parts"]) == parameters

    def test_to_torch_and_back(self, workshop, torch_file, converted):
        said = workshop.run("python -m weights_converter inspect final.pth").stdout.decode()
        assert "state dict" in said
        done = workshop.run("python -m weights_converter verify final.pth results/final")
        parts = [line.split() for line in lines_of(done)[1:]]
        assert {part[0] for part in parts} == {"equal"}
        assert torch_file.is_file()
        ours, theirs = leaves(workshop.folder / "results/gestures"), leaves(converted)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
        names = rvit_jax.load(converted).class_names
        assert names == rvit_jax.load(workshop.folder / "results/gestures").class_names

    def test_start_from_it(self, workshop, converted):
        assert converted.is_dir()
        (start,) = (s for _, s in FLAGS if s.startswith("--config.init_from=results/"))
        line = "python -m rvit_jax.main --config=configs/gestures.py"
        done = workshop.run(line, *SMALL, start, "--workdir=results/on")
        said = lines_of(done)
        said = said[said.index("starting from results/final:") + 1 :]
        assert said[0].strip() == "weights from results/final"
        assert "the head begins anew" not in done.stdout.decode()
        assert [record["step"] for record in workshop.records("results/on")] == [3]

    @pytest.mark.slow
    def test_is_the_released_checkpoint_wrong(self, workshop, converted):
        """Its three commands, with the drawn clips in place of Jester's."""
        assert converted.is_dir()
        line = "python -m rvit_jax.main --config=configs/jester.py --mode=evaluate"
        line += " --checkpoint=results/final"
        rgb = last_record(workshop.run(f"{line} --workdir=results/final_rgb", *FEW_FRAMES))
        packing = "--config.dataset.frame_packing=channel_planes"
        planes = f"{line} --workdir=results/final_planes {packing}"
        planes = last_record(workshop.run(planes, *FEW_FRAMES))
        assert rgb["num_clips"] == planes["num_clips"] == 16
        assert rgb["loss"] != planes["loss"]
        labels = "python -m weights_converter to_flax final.pth results/final_labels"
        labels += " --class_names=data/jester/annotations/jester-v1-labels.csv"
        workshop.run(labels, "--attention=softmax", "--num_heads=4")
        line = line.replace("results/final", "results/final_labels")
        same = last_record(workshop.run(f"{line} --workdir=results/final_labels", *FEW_FRAMES))
        assert same["loss"] == rgb["loss"]  # these names are in that order
        confusion = workshop.folder / "results/final_planes/evaluation/validation_confusion.csv"
        assert len(confusion.read_text().splitlines()) == 9

    def test_check_prepare_and_train_from_folders_and_shards(self, workshop):
        done = workshop.run("python -m input_pipeline.check --config=configs/jester.py")
        assert lines_of(done)[-1] == "nothing is wrong"
        done = workshop.run(
            "python scripts/prepare_jester.py --source=DOWNLOAD --data_dir=data/tfds"
        )
        assert "train: 24 clips of" in done.stdout.decode()
        line = "python -m rvit_jax.main --config=configs/jester.py"
        shards = "--config.dataset.name=jester_tfds --config.dataset.data_dir=data/tfds"
        aside = "--workdir=results/jester_tfds"
        with futures.ThreadPoolExecutor() as both:
            runs = [
                both.submit(workshop.run, line, *SMALL_JESTER),
                both.submit(workshop.run, f"{line} {shards}", *SMALL_JESTER, aside),
            ]
        for run in runs:
            run.result()
        folders, shards = (workshop.records(f"results/{n}") for n in ("jester", "jester_tfds"))
        for record in (*folders, *shards):
            del record["checkpoint"]
        assert folders == shards
        done = workshop.run(f"{line} --mode=evaluate --split=validation", *FEW_FRAMES)
        assert last_record(done)["loss"] == pytest.approx(folders[-1]["loss"], rel=1e-6)
        assert (workshop.folder / "results/jester/evaluation/report.html").is_file()

    @pytest.mark.slow
    def test_videos_of_ones_own(self, workshop):
        random = np.random.default_rng(0)
        for split in ("train", "validation"):
            for number in range(12):
                folder = workshop.folder / "my_videos" / split / f"class {number}"
                folder.mkdir(parents=True)
                film = annotate.Film(folder / "a.mp4", 12.0)
                for image in random.integers(0, 256, (5, 24, 32, 3), dtype=np.uint8):
                    film.add(image)
                film.close()
        line = "python -m rvit_jax.main --config=configs/jester.py"
        line += " --config.dataset.name=video_folder --config.dataset.data_dir=my_videos"
        line += " --config.model.num_classes=12 --workdir=results/mine"
        small = ("--config.dataset.num_frames=4", "--config.model.image_size=16")
        workshop.run(line, *NARROW, *small, "--config.num_epochs=1")
        loaded = rvit_jax.load(workshop.folder / "results/mine")
        assert set(loaded.class_names) == {f"class {number}" for number in range(12)}

    def test_the_named_clips_are_in_the_test_split(self):
        """`--mode=visualize --split=test --ids=7,24`, of the set that the first command draws."""
        dataset = gestures.get_config().dataset
        counts = {split: dataset.generate[split] for split in drawing.SPLITS}
        manifest = drawing._manifest(dataset.classes, counts, dataset.generate.seed)
        clips = [clip for drawn in drawing._plan(manifest) for clip in drawn.clips]
        (visualize,) = (c for c in IN_BLOCKS if "--mode=visualize" in c.words)
        (ids,) = (word.partition("=")[2] for word in visualize.words if word.startswith("--ids="))
        splits = {clip.split for clip in clips if str(clip.number) in ids.split(",")}
        assert splits == {"test"}

    @pytest.mark.parametrize(
        "block", [block for block in BLOCKS if block.language == "python"], ids=lambda b: b.where
    )
    def test_python(self, workshop, block, monkeypatch, capsys):
        monkeypatch.chdir(workshop.folder)
        names: dict = {}
        exec(compile(block.text, block.where, "exec"), names)
        loaded = names["loaded"]
        if "probabilities" in names:
            one, other = names["probabilities"]
            assert one.sum() == pytest.approx(1.0, abs=1e-5)
            assert np.isnan(other).all()
        else:
            assert capsys.readouterr().out.strip() in loaded.class_names
            assert names["video"].shape == (math.ceil(40 / 3), 48, 48, 3)
            whole, _ = loaded.model(names["video"][None])
            error = np.abs(np.asarray(whole) - np.asarray(names["logits"])).max()
            assert error <= 1e-5 * np.abs(whole).max()


def leaves(path: Path) -> list[np.ndarray]:
    return jax.tree.leaves(jax.device_get(rvit_jax.load(path).model._leaves))


@pytest.mark.slow
def test_scripts_on_a_model_of_all_classes(tmp_path):
    """The 27 classes, an endless stream of them, and PyTorch beside JAX, all small."""
    shop = Workshop(tmp_path)
    few = (
        "--config.dataset.generate.train=54",
        "--config.dataset.generate.validation=27",
        "--config.dataset.generate.test=54",
    )
    shop.run(
        "python -m rvit_jax.main --config=configs/gestures.py:all",
        *few,
        *NARROW,
        "--config.num_epochs=1",
    )
    line = "python scripts/streaming_accuracy.py --config=configs/gestures.py:all"
    line += " --checkpoint=results/gestures_all --clips=2048"
    done = shop.run(line, *few, "--clips=8", "--idle_frames=24", "--output=table.json")
    ways = json.loads((tmp_path / "table.json").read_text())["ways"]
    assert len(ways) > 3
    assert len(lines_of(done)) > len(ways)
    line = "python scripts/compare_training.py --config=configs/gestures.py"
    done = shop.run(line, *SMALL, "--seeds=1")
    summary = json.loads((tmp_path / "results/compare_training/summary.json").read_text())
    assert set(summary["differences"]) == {"jax"}
