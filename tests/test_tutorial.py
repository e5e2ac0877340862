"""The notebook docs/tutorial.ipynb: it runs, the model learns, and what the file keeps is true.

python -m tests.test_tutorial    # runs it and keeps its outputs in the file
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
TOP1 = re.compile(r"test clips: ([\d.]+)% right")
SHUFFLED = re.compile(r"in random order: ([\d.]+)% right")
LAST_FRAME = re.compile(r"the last frame alone: ([\d.]+)% right")
STOPPED_EARLY = re.compile(r"stopped after 2 equal answers: ([\d.]+)% right")
# A path from the root of a file system, or from a Windows drive.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])(?:/[\w.~-]+/|/(?:tmp|home|root)\b|[A-Z]:\\)|file://")
MOST_BYTES = 300_000


def run(environment: dict[str, str]) -> nbformat.NotebookNode:
    """The notebook after all its cells have run, in a kernel of its own whose folder is docs/."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1200,  # seconds for a cell; a busy machine is no failure
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # lines that were printed one after the other are one output
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    return client.execute(env={**os.environ, **environment})


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode, stream: str = "stdout") -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == stream)


def percent(pattern: re.Pattern, notebook: nbformat.NotebookNode) -> float:
    """The one number that `pattern` finds in what the notebook printed."""
    (number,) = pattern.findall(printed(notebook))
    return float(number)


def kinds(notebook: nbformat.NotebookNode) -> list[list[tuple[str, ...]]]:
    """Of every cell the kinds of its outputs: "stdout", or what a picture is stored as."""
    return [
        [
            (o.name,) if o.output_type == "stream" else tuple(sorted(o.data))
            for o in cell.outputs
            if o.get("name") != "stderr"  # of libraries, and other ones elsewhere
        ]
        for cell in code_cells(notebook)
    ]


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    """The file as it is."""
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook run anew, and the folder that its kernel had for temporary files."""
    folder = tmp_path_factory.mktemp("tutorial")
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = {
        "TMPDIR": str(temporary),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }
    before = sorted(NOTEBOOK.parent.iterdir())
    notebook = run(environment)
    assert sorted(NOTEBOOK.parent.iterdir()) == before  # docs/ is where the kernel runs
    return notebook, temporary


def test_it_runs_and_learns(executed):
    notebook, _ = executed
    assert percent(TOP1, notebook) > 90


def test_what_the_texts_say_is_so(executed, kept):
    for notebook in (executed[0], kept):  # of two classes; chance is 50
        assert 35 < percent(SHUFFLED, notebook) < 65
        assert percent(LAST_FRAME, notebook) < 85
        assert percent(STOPPED_EARLY, notebook) < 45


def test_it_takes_its_files_away(executed):
    _, temporary = executed
    assert not list(temporary.glob("rvit_tutorial_*"))


def test_the_outputs_kept_are_those_of_its_cells(executed, kept):
    notebook, _ = executed
    assert kinds(kept) == kinds(notebook)
    assert sum("image/png" in kind for cell in kinds(kept) for kind in cell) == 3


def test_the_outputs_kept_are_of_one_run_and_clean(kept):
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert percent(TOP1, kept) > 90
    assert printed(kept, "stderr") == ""
    for cell in cells:
        assert "execution" not in cell.metadata  # times of a machine
        text = "".join(
            output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            for output in cell.outputs
        )
        assert not ABSOLUTE_PATH.search(text), text
    assert NOTEBOOK.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("in /tmp/rvit_tutorial_x/run", True),
        ("PosixPath('/home/me')", True),
        ("C:\\Users", True),
        ("file:///x", True),
        ("(28, 100, 132, 3) -> (10, 48, 48, 3) -> (1, 4)", False),
        ("epoch 1/5, step 32, and docs/data.md, 3 / 4", False),
    ],
)
def test_absolute_paths_are_seen(text, absolute):
    assert bool(ABSOLUTE_PATH.search(text)) == absolute


def test_it_finds_the_repository_from_its_root():
    cell = code_cells(nbformat.read(NOTEBOOK, as_version=4))[0]
    program = f"{cell.source}\nimport rvit_jax\nprint(rvit_jax.__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == ROOT / "rvit_jax" / "__init__.py"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in words}


def test_its_links_lead_somewhere(kept):
    texts = "\n".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", texts) if "://" not in link]
    assert len(links) >= 8
    for link in links:
        name, _, anchor = link.partition("#")
        page = NOTEBOOK.parent / name
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), link


if __name__ == "__main__":
    notebook = run({})
    # The file stays the same where another Python runs it.
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)
