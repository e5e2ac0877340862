"""Which room may import which: the data knows nothing of the model, PyTorch stays in its room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = ("configs", "input_pipeline", "rvit_jax", "weights_converter", "scripts")


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


FILES = [file for room in ROOMS for file in sorted(Path(room).glob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file):
    allowed = {
        "configs": {"configs"},
        "input_pipeline": {"input_pipeline"},
        "rvit_jax": {"rvit_jax", "input_pipeline", "configs"},
        # A converted model carries Jester's class names.
        "weights_converter": {"weights_converter", "rvit_jax", "input_pipeline", "configs"},
        "scripts": set(ROOMS) - {"scripts"},
    }
    assert imported(file) & set(ROOMS) <= allowed[file.parts[0]]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_pytorch_stays_in_its_room(file):
    needs_it = file.parts[0] == "scripts" or file.name in (
        "torch_rvit.py",
        "run_archive.py",
        "prove.py",
        "convert.py",  # one function, to write a .pth
    )
    assert needs_it or "torch" not in imported(file)


def test_using_the_package_imports_neither_pytorch_nor_tensorflow():
    code = (
        "import sys, rvit_jax, rvit_jax.evaluate, rvit_jax.train, input_pipeline.gestures; "
        "print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_arguments_are_refused_before_jax_is_imported():
    code = (
        "import sys, rvit_jax.main, weights_converter.__main__; "
        "status = rvit_jax.main.main(['main', '--config=configs/jester.py', '--config.batch=1']); "
        "print(status, [m for m in ('jax', 'flax', 'optax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []", done.stderr
