"""The notebooks are lessons with their outputs; their code must still run. No Jupyter is needed for that."""
import json
import os
from pathlib import Path

import matplotlib
import pytest

from labs import llm_jepa
from tests import toy

FOLDER = Path(__file__).parents[1] / "notebooks"


def cells(path):
    """Sources and outputs of the code cells."""
    return [("".join(cell["source"]), cell["outputs"]) for cell in json.loads(path.read_text())["cells"]
            if cell["cell_type"] == "code" and cell["source"]]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """Each code cell, in order, at FAST sizes and in a folder of its own."""
    matplotlib.use("Agg")
    for name in ("tjepa.py", "train.py", "labs", "data"):       # what a notebook looks for; what it writes stays here
        os.symlink(FOLDER.parent / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    toy.write_regexes(tmp_path)                                 # the real ones are a download
    monkeypatch.setattr(llm_jepa, "FOLDER", tmp_path)
    code = [source for source, _ in cells(path)]
    assert sum(source.count("FAST = False") for source in code) == 1
    names = {"__name__": "__main__"}
    for number, source in enumerate(code, 1):
        exec(compile(source.replace("FAST = False", "FAST = True"), f"{path.name}, code cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs(path):
    outputs = [output for _, found in cells(path) for output in found]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
