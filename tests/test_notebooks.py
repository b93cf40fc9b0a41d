"""The notebooks are lessons with their outputs: their code must run, and their outputs must be
current.

Each one is executed in two ways, at FAST size: as plain code, for which no Jupyter is needed; and
in a kernel, as Jupyter does, where requirements-notebooks.txt is installed.
"""
import importlib.util
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from labs import llm_jepa
from tests import toy

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# what a cell shows if its last line is a call and has no semicolon
OBJECT = re.compile(r"<[\w.]+ object at 0x|<matplotlib|\[?Text\(|<Figure>")
JUPYTER = all(importlib.util.find_spec(name) for name in ("nbconvert", "ipykernel"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    """(source, outputs) of each code cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell["outputs"])
            for cell in cells if cell["cell_type"] == "code"]


def n_pictures(outputs):
    """The number of pictures among outputs."""
    return sum("image/png" in output.get("data", {}) for output in outputs)


def committed(path):
    """All outputs of a notebook as it is committed."""
    return [output for _, outputs in code_cells(path) for output in outputs]


def shortened(source):
    """A cell at FAST size."""
    return source.replace("FAST = False", "FAST = True")


@pytest.fixture
def folder(tmp_path):
    """A copy of the repository, of links: what a notebook writes stays in it. Toy regexes."""
    for path in [*ROOT.glob("*.py"), ROOT / "labs"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "notebooks").mkdir()
    data = tmp_path / "data"
    data.mkdir()
    for path in (ROOT / "data").iterdir():
        if path.name != "nlrx":
            (data / path.name).symlink_to(path)
    (data / "nlrx").mkdir()
    (data / "nlrx/prepare.py").symlink_to(ROOT / "data/nlrx/prepare.py")
    toy.write_regexes(data / "nlrx")                    # the real ones are a download
    return tmp_path


@each_notebook
def test_runs_as_plain_code(path, folder, monkeypatch):
    """Each cell, in order, started in the folder of the notebooks."""
    plt.switch_backend("Agg")
    plt.close("all")
    monkeypatch.chdir(folder / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(llm_jepa, "FOLDER", folder / "data/nlrx")
    names = {"__name__": "__main__"}
    try:
        for number, (source, _) in enumerate(code_cells(path), 1):
            exec(compile(shortened(source), f"{path.name}, code cell {number}", "exec"), names)
        assert len(plt.get_fignums()) == n_pictures(committed(path))
    finally:
        plt.close("all")


@pytest.mark.skipif(not JUPYTER, reason="to execute notebooks in a kernel, `pip install -r "
                                        "requirements-notebooks.txt`")
@each_notebook
def test_runs_in_a_kernel(path, folder, monkeypatch):
    """As in Jupyter: as many pictures as are committed, no objects as text, no warnings."""
    import nbformat

    from notebooks.execute import execute
    # a progress bar would be output
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = shortened(cell.source)
    execute(notebook, folder / "notebooks")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert n_pictures(outputs) == n_pictures(committed(path))
    check_outputs(outputs)


def check_outputs(outputs):
    """No error, no warning, and no object that was meant to be drawn as text."""
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
        assert output["output_type"] != "execute_result", output["data"]
        if output["output_type"] == "stream":
            assert not OBJECT.search("".join(output["text"]))


@each_notebook
def test_is_committed_with_its_outputs(path):
    """Full size, executed from top to bottom."""
    source = "".join(source for source, _ in code_cells(path))
    assert source.count("FAST = False") == 1
    assert n_pictures(committed(path)) > 0
    check_outputs(committed(path))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


def first_cell(path, monkeypatch, folder, modules=()):
    """Execute the cell that looks for the repository, in a folder outside of it."""
    monkeypatch.chdir(folder)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    exec(code_cells(path)[0][0], {})


@each_notebook
def test_outside_of_the_repository_it_says_so(path, tmp_path, monkeypatch):
    """One sentence and no endless search; in Colab another one, because there it is cloned."""
    with pytest.raises(FileNotFoundError, match="outside of the repository"):
        first_cell(path, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="set REPOSITORY to the address of your clone"):
        first_cell(path, monkeypatch, tmp_path, ["google.colab"])
