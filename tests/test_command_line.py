"""A newcomer's mistakes: one line that names the thing and what to do, and nothing left behind."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from input_pipeline import check, command_line, gestures
from input_pipeline.command_line import ArgumentError, Parser, run
from rvit_jax import checkpoint, evaluate, export, main, profile, train
from scripts import (
    attention_on_hand,
    compare_training,
    contact_sheet,
    prepare_jester,
    streaming_accuracy,
)
from tests.jester_folder import CLASSES, make_set
from tests.small import saved_model, small_config
from weights_converter import __main__ as converter

GESTURES = "--config=configs/gestures.py"


def refused(capsys, command, arguments, status=2) -> str:
    """The one line of a command that ends with `status` and says nothing else."""
    named = command not in (gestures.main, converter.main)  # argparse takes no name
    capsys.readouterr()
    try:
        ended = command([*(["command"] if named else []), *arguments])
    except SystemExit as left:
        ended = left.code
    out, err = capsys.readouterr()
    assert (ended, out) == (status, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "invalid literal" not in err
    assert len(err) < 500
    return err


@pytest.fixture
def no_work(monkeypatch):
    """Of main: what is wrong is found before the work."""
    monkeypatch.setattr(main, "_dispatch", lambda *_: pytest.fail("it went to work"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "configs/gesture.py"],
            "no file configs/gesture.py; did you mean 'configs/",
        ),
        (["--config=nothing.py"], "this repository's are configs/charades.py, configs/gestures.py"),
        (["--config=README.md"], "expected a Python file with get_config()"),
        (["--config"], "--config is empty: say --config=FILE"),
        ([], "--config is missing: say --config=configs/gestures.py"),
        (["configs/gestures.py"], "say --config=configs/gestures.py"),
        (["--config=configs/gestures.py:al"], "no variant 'al': leave it out, or say :all"),
        (["--config", "configs/gestures.py:al"], "no variant 'al': leave it out, or say :all"),
        (["--config.batch_size=8", GESTURES], "--config.batch_size comes before --config: say"),
        ([GESTURES, "--config.dataset.dir=x"], "'dataset.dir'; did you mean 'dataset.data_dir'?"),
        ([GESTURES, "--config.dataset.dir", "x"], "did you mean 'dataset.data_dir'?"),
        ([GESTURES, "--config.learning_rate=1"], "did you mean 'optimizer.learning_rate'?"),
        ([GESTURES, "--config.optimizer.lr=1"], "did you mean 'optimizer.learning_rate'?"),
        ([GESTURES, "--config.wd=1"], "did you mean 'optimizer.weight_decay'?"),
        ([GESTURES, "--lr=1"], "did you mean --config.optimizer.learning_rate?"),
        ([GESTURES, "--config.optimizer.rate=1"], "did you mean 'optimizer.learning_rate'?"),
        ([GESTURES, "--config.mesh.xyz=1"], "has no key 'mesh.xyz'; mesh has data, fsdp"),
        ([GESTURES, "--config.xyz=1"], "has no key 'xyz'; configs/base.py lists them"),
        ([GESTURES, "--config.model=1"], "is a group of keys: name one of them, such as --config."),
        ([GESTURES, "--config.batch_size=abc"], "--config.batch_size=abc: expected a whole number"),
        ([GESTURES, "--config.batch_size", "1.5"], "batch_size=1.5: expected a whole number"),
        ([GESTURES, "--config.batch_size=-1"], "config.batch_size=-1 is out of range: at least 1"),
        ([GESTURES, "--config.ema_decay=much"], "--config.ema_decay=much: expected a number"),
        ([GESTURES, "--config.dataset.cache=no"], "cache=no: expected True or False"),
        (
            [GESTURES, "--config.dataset.classes=Swiping Left,Swiping Right"],
            "--config.dataset.classes=\"('Swiping Left', 'Swiping Right')\"",
        ),
        (
            [GESTURES, "--config.dataset.classes=Swiping", "Left"],
            "'Left' is no flag: flags begin with --, and a value that holds blanks stands in quote",
        ),
        (
            [GESTURES, "--batch_size=8"],
            "--batch_size is no flag; did you mean --config.batch_size?",
        ),
        ([GESTURES, "--epochs=8"], "--epochs is no flag; did you mean --config.num_epochs?"),
        ([GESTURES, "--name=x"], "did you mean --config.dataset.name or --config.loss.name or"),
        ([GESTURES, "--mod=train"], "--mod is no flag; did you mean --mode?"),
        ([GESTURES, "--mode=eval"], "--mode=eval is unknown; did you mean 'evaluate'?"),
        ([GESTURES, "--mode=evaluate", "--split=val"], "choose from train, validation, test"),
        ([GESTURES, "--debug=maybe"], "--debug=maybe: expected True or False"),
        ([GESTURES, "--num_processes=two"], "--num_processes=two: expected a whole number"),
    ],
)
def test_main(capsys, no_work, arguments, message):
    assert message in refused(capsys, main.main, arguments)


@pytest.mark.parametrize("given", ["cache=True", "cache=true", "cache=1", "cache=False"])
def test_booleans_that_are_understood(capsys, monkeypatch, given):
    seen = []
    monkeypatch.setattr(main, "_dispatch", lambda values, _: seen.append(values.config))
    assert main.main(["main", GESTURES, f"--config.dataset.{given}"]) == 0
    assert seen[0].dataset.cache is (given[6:].lower() in ("true", "1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "line 1 is no Python"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError in line 2: division by zero"),
        ("import nothing_of_this_name", "ModuleNotFoundError in line 1: No module named"),
        ("def get_config():\n    open('nowhere')", "FileNotFoundError in line 2"),
        ("x = 1", "the file has no function get_config()"),
        ("def get_config():\n    return None", "gives NoneType, expected ConfigDict"),
        (
            "def get_config(v=None):\n    try:\n        {}[v]\n    except KeyError:\n"
            "        raise ValueError('no such thing')",
            "no such thing",
        ),
    ],
)
def test_a_config_of_the_users_own(capsys, no_work, tmp_path, monkeypatch, text, message):
    # ml_collections loads every file into one module, which keeps what an earlier one defined.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    file = tmp_path / "mine.py"
    file.write_text(text)
    line = refused(capsys, main.main, [f"--config={file}"])
    assert line.startswith(f"error: --config={file}: ")
    assert message in line


def test_from_another_folder(capsys, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "has no configs/: go to the repository's root" in refused(capsys, main.main, [GESTURES])


@pytest.mark.parametrize(
    ("command", "arguments", "status", "message"),
    [
        (check.main, ["--config=wrong.py"], 2, "--config=wrong.py: there is no file wrong.py"),
        (check.main, ["--config.dataset.dir=x"], 2, "say --config=FILE first"),
        (check.main, ["--config=configs/jester.py", "--splits=val"], 2, "'val' is unknown"),
        (
            check.main,
            ["--config=configs/jester.py", "--output=tests"],
            1,
            "tests cannot be written",
        ),
        (profile.main, [GESTURES, "--frames=0"], 2, "--frames=0: expected a whole number from 1"),
        (export.main, ["--checkpoint=x"], 2, "--output is missing: say --output=DIR"),
        (export.main, ["--checkpoint=x", "--output=README.md"], 1, "is a file, not a folder"),
        (gestures.main, [], 2, "--output is missing"),
        (gestures.main, ["--output=x", "--clases=time"], 2, "did you mean --classes?"),
        (gestures.main, ["--output=x", "--classes=tim"], 2, "did you mean 'time'?"),
        (gestures.main, ["--output=README.md"], 1, "it is a file; name a folder"),
        (converter.main, [], 2, "COMMAND is missing: one of inspect, to_flax, to_torch, verify"),
        (converter.main, ["inspekt", "a"], 2, "'inspekt' is unknown; did you mean 'inspect'?"),
        (converter.main, ["to_flax", "a"], 2, "OUT_DIR is missing"),
        (converter.main, ["to_flax", "a", "b", "--prov"], 1, "there is no file a"),  # a beginning
        (converter.main, ["to_flax", "a", "b", "--heads=2"], 2, "--heads is no flag"),
        (converter.main, ["inspect", "a", "b"], 2, "'b' is one argument too many"),
        (converter.main, ["to_flax", "a", "README.md"], 1, "README.md is a file: name a new"),
        (
            converter.main,
            ["to_flax", "a", "b", "--class_names=c"],
            1,
            "--class_names=c cannot be re",
        ),
        (contact_sheet.main, [GESTURES], 2, "--output is missing: say --output=sheet.jpg"),
        (contact_sheet.main, [GESTURES, "--output=a.mp4"], 2, "its ending is no picture's"),
        (contact_sheet.main, [GESTURES, "--ouput=a.jpg"], 2, "did you mean --output?"),
        (
            contact_sheet.main,
            [GESTURES, "--output=a.jpg", "--config.dataset.data_dir=no"],
            1,
            "draw",
        ),
        (streaming_accuracy.main, [GESTURES], 2, "--checkpoint is missing"),
        (
            streaming_accuracy.main,
            [GESTURES, "--checkpoint=x", "--split=tset"],
            2,
            "--split=tset is unknown; did you mean 'test'?",
        ),
        (streaming_accuracy.main, [GESTURES, "--checkpoint=x", "--output=tests"], 1, "is a folder"),
        (streaming_accuracy.main, [GESTURES, "--checkpoint=x", "--clips=0"], 2, "number from 1"),
        (attention_on_hand.main, [GESTURES], 2, "--checkpoint is missing"),
        (
            attention_on_hand.main,
            ["--config=configs/jester.py", "--checkpoint=x"],
            2,
            "known of 'gestures' alone",
        ),
        (compare_training.main, ["--config=configs/gestures.py:al"], 2, "no variant 'al'"),
        (compare_training.main, [GESTURES, "--workdir=README.md"], 1, "choose another --workdir"),
        (prepare_jester.main, ["--source=tests", "--data_dir=x"], 1, "say with --labels where"),
    ],
)
def test_other_commands(capsys, command, arguments, status, message):
    before = sorted(os.listdir())
    assert message in refused(capsys, command, arguments, status)
    assert sorted(os.listdir()) == before


def test_a_beginning_of_a_flag_is_argparses_own_affair(capsys):
    parser = Parser()
    parser.add_argument("--frame_size")
    parser.add_argument("--frame_rate")
    with pytest.raises(SystemExit):
        parser.parse_args(["--frame=1"])
    assert "could match --frame_size, --frame_rate" in capsys.readouterr().err
    assert parser.parse_args(["--frame_s=1"]).frame_size == "1"


def test_run_export_says_how_it_is_called():
    command = [sys.executable, "-I", "rvit_jax/run_export.py", "somewhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: say python -I rvit_jax/run_export.py FOLDER FORMAT")
    assert done.stderr.count("\n") == 1


# ---- what is there is not what was meant ----


@pytest.mark.parametrize(
    ("command", "more"),
    [(check.main, "--splits=validation"), (contact_sheet.main, "--output=a.jpg")],
)
def test_how_to_draw_the_gestures_of_the_config_is_said(capsys, tmp_path, command, more):
    where = f"--config.dataset.data_dir={tmp_path / 'a b'}"
    for variant, classes, train_clips in (("", "time", 24_576), (":all", "all", 32_768)):
        argv = [GESTURES + variant, where, more]
        line = refused(capsys, command, argv, 1)
        assert "Jester" not in line
        said = re.search(r"python -m input_pipeline\.gestures (.*) \(--debug", line)
        parsed = gestures._parse_arguments(shlex.split(said[1]))
        assert parsed.output == str(tmp_path / "a b")
        assert parsed.classes == gestures._class_list(classes)
        assert (parsed.train, parsed.seed) == (train_clips, 0)
    assert not list(tmp_path.iterdir())


def test_other_gestures_are_said_in_short(capsys, tmp_path):
    drawn = tmp_path / "drawn"
    gestures.generate(drawn, classes=["Swiping Left"], train=2, validation=0, test=0, num_workers=1)
    argv = [GESTURES + ":all", f"--config.dataset.data_dir={drawn}", f"--workdir={tmp_path / 'w'}"]
    assert main.main(["main", *argv]) == 1
    err = capsys.readouterr().err
    assert "do not include Swiping Right, Swiping Down, Swiping Up, ... (26 in all)" in err
    assert len(err) < 450 + len(str(drawn))
    assert not (tmp_path / "w").exists()
    line = refused(capsys, gestures.main, [f"--output={drawn}", "--train=2"], 1)
    assert (
        "other gestures: without Swiping Right, Swiping Down, Swiping Up, ... (26 in all)" in line
    )


def test_what_evaluation_needs_is_said(capsys, tmp_path):
    argv = ["main", GESTURES, "--mode=evaluate", f"--workdir={tmp_path / 'w'}"]
    assert main.main(argv) == 1
    assert "train first, by the same command without --mode=evaluate" in capsys.readouterr().err
    file = tmp_path / "final.pth"
    file.touch()
    for path, message in (
        (file, rf"to_flax {file} OUT_DIR, and name OUT_DIR"),
        (Path("README.md"), "README.md is a file, no checkpoint"),
        (Path("tests"), r"holds no checkpoint.* --config=FILE"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            checkpoint.resolve_checkpoint(path)


def test_a_file_with_the_name_of_a_step_is_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "7").touch()
    assert not checkpoint.has_steps(tmp_path)
    (tmp_path / "checkpoints" / "12").mkdir()
    assert checkpoint.has_steps(tmp_path)


def test_a_model_without_class_names(tmp_path):
    with pytest.raises(ValueError, match=r"convert it again .* --class_names=FILE.*has a, b$"):
        evaluate.match_labels(["a", "b"], ["class 0", "class 1"])
    with pytest.raises(ValueError, match=r"choose from class 1, class 0\. Choose the classes with"):
        evaluate.match_labels(["xyz", "b"], ["class 1", "class 0"])
    with pytest.raises(ValueError, match=r"did you mean 'Thumb Up'\? Choose the classes with"):
        evaluate.match_labels(["Thumb Upp"], ["Thumb Up", "Thumb Down"])


@pytest.mark.parametrize("source", ["nowhere", "nowhere.safetensors", "folder", "other"])
def test_init_from_is_refused_before_anything_is_made(tmp_path, source):
    lines = [f"{i};{CLASSES[i % 3]}" for i in range(1, 7)]
    data = make_set(tmp_path / "data", {"train": lines, "validation": lines[:2]}, num_frames=4)
    (tmp_path / "folder").mkdir()
    saved_model(tmp_path / "other", num_classes=3, mlp_dim=16)
    config = small_config(num_classes=3)
    config.dataset.update(data_dir=str(data), classes=CLASSES[:3], num_frames=4)
    config.init_from = str(tmp_path / source)
    if source != "other":  # found before the data is opened
        config.dataset.data_dir = str(tmp_path / "no data")
    with pytest.raises((FileNotFoundError, ValueError), match=r"config\.init_from.*") as refused:
        train.train_and_evaluate(config, tmp_path / "new" / "workdir")
    assert str(tmp_path / source) in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_verify_prints_no_head_before_an_error(capsys, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise FileNotFoundError("nowhere does not exist")
        yield

    monkeypatch.setattr("weights_converter.archive.read", lambda file: file)
    monkeypatch.setattr("weights_converter.verify.verify", fails)
    refused(capsys, converter.main, ["verify", "a.pth", "nowhere"], 1)


def test_an_error_of_the_system_names_its_file(capsys):
    def work(_):
        Path("/nowhere/file").read_text()

    line = refused(capsys, lambda argv: run(work, argv), [], 1)
    assert line == "error: /nowhere/file: No such file or directory (--debug shows where)\n"


def test_two_packages_that_are_missing_are_a_sentence(monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs jax2onnx and onnxruntime, not installed here: pip"
    ):
        export.check_packages(["onnx"])


# ---- signals ----

COMMANDS = [
    *("rvit_jax/main.py", "rvit_jax/predict.py", "rvit_jax/export.py", "rvit_jax/profile.py"),
    *("input_pipeline/check.py", "input_pipeline/gestures.py", "weights_converter/__main__.py"),
    *(str(file) for file in sorted(Path("scripts").glob("*.py")) if "benchmark_" not in file.name),
]


@pytest.mark.parametrize("file", COMMANDS)
def test_every_command_leaves_at_once_before_its_imports(file):
    """Of others, only the standard library's may come before, and what finds ours."""
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node) == "if __name__ == '__main__':\n    leave_at_once()"
            return
        if isinstance(node, ast.ImportFrom):
            top = node.module.partition(".")[0]
            assert node.module == "input_pipeline.command_line" or top in sys.stdlib_module_names
        elif isinstance(node, ast.Import):
            assert {name.name for name in node.names} <= sys.stdlib_module_names
    pytest.fail("it does not")


def test_ctrl_c_during_the_imports_is_quiet():
    process = subprocess.Popen(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "rvit_jax.export",
            "--checkpoint=x",
            "--output=y",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell started in the background ignore it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stderr:
        if "jax._src" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (out, said) == ("", [])


def test_the_work_gets_ctrl_c_as_ever(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command_line.leave_at_once()
        assert signal.getsignal(signal.SIGINT) is command_line._leave
        assert run(lambda _: signal.raise_signal(signal.SIGINT), ["x"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # under nohup
        command_line.leave_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped by signal 2; nothing is left half written\n"


def test_ctrl_c_while_main_draws_says_what_is_left(capsys, tmp_path, monkeypatch):
    draw, drawn = gestures.draw_frames, []

    def stop_at_the_third(motion, rng):
        drawn.append(motion)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(motion, rng)

    data = tmp_path / "data"
    argv = ["main", GESTURES, f"--config.dataset.data_dir={data}", f"--workdir={tmp_path / 'w'}"]
    argv += ["--config.dataset.generate.train=8", "--config.dataset.generate.validation=2"]
    argv += ["--config.dataset.generate.test=2"]
    with monkeypatch.context() as patch:
        patch.setattr(gestures, "num_cpus", lambda: 1)
        patch.setattr(gestures, "draw_frames", stop_at_the_third)
        assert main.main(argv) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped by signal 2; what is drawn stays in {data}, and the same command goes on with it"
    )
    assert (data / "unfinished.json").exists()
    assert not (tmp_path / "w").exists()


def test_flags_of_one_command_are_not_those_of_the_process():
    """Scripts' too: tests run several commands in one process."""
    before = set(flags.FLAGS)
    contact_sheet.define_flags(["x"])
    compare_training.define_flags(["x"])
    streaming_accuracy.define_flags(["x"])
    attention_on_hand.define_flags(["x"])
    assert set(flags.FLAGS) == before


def test_a_wrong_argument_imports_no_library():
    code = (
        "import sys; from rvit_jax import main; status = main.main(['main', '--config=x']); "
        "sys.exit(10 * status + ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 20, done.stderr


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match=r"/link is a link to what is not there; choose another --o$"):
        command_line.check_output_folder(tmp_path / "link", "--o")


def test_suggestions():
    assert command_line.suggest("lineer", ["linear", "softmax"]) == "; did you mean 'linear'?"
    assert command_line.suggest("x", ["linear", "softmax"]) == "; choose from linear, softmax"
    many = [f"class {index}" for index in range(100)]
    assert command_line.suggest("x", many).endswith("class 29, ... (100 in all)")
    values = flags.FlagValues()
    flags.DEFINE_integer("size", None, "", flag_values=values)
    command_line.parse(values, ["x"], "")
    with pytest.raises(ArgumentError, match="--size is missing: say --size=3"):
        command_line.require(values, size="3")
