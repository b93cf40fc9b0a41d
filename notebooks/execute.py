"""
Execute the notebooks at full size and write their outputs in place.

    python notebooks/execute.py                 all of them, one after the other
    python notebooks/execute.py 1_collapse      one of them, by the beginning of its name

What an earlier execution left in out/notebook_1 and so on is removed first.
"""
import os
import shutil
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def joined(outputs):
    """Outputs of a cell, with successive parts of one stream as one output."""
    whole = []
    for output in outputs:
        stream = output.output_type == "stream" and output.name
        if stream and whole and whole[-1].get("name") == stream:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def without_noise(notebook):
    """Remove what differs in each execution and says nothing about the lesson."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)            # times
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    # the kernel adds the version of Python, which differs between machines
    notebook.metadata.language_info = dict(name="python")


def execute(notebook, folder=FOLDER):
    """Run all cells of a notebook (as nbformat reads it) in `folder`; its outputs are replaced.

    CellExecutionError if a cell fails.
    """
    from nbconvert.preprocessors import ExecutePreprocessor
    # a progress bar would leave a line of output for each second
    os.environ["TQDM_DISABLE"] = "1"
    runner = ExecutePreprocessor(timeout=None, kernel_name="python3")
    runner.preprocess(notebook, dict(metadata=dict(path=str(folder))))
    without_noise(notebook)


def main(names):
    """Execute the notebooks whose names begin with one of names, or all of them."""
    try:
        import nbformat
    except ImportError:
        sys.exit("nbformat is missing: run `pip install -r requirements-notebooks.txt` first")
    paths = [path for path in sorted(FOLDER.glob("*.ipynb"))
             if not names or path.name.startswith(tuple(names))]
    if not paths:
        sys.exit(f"no notebook in {FOLDER} begins with {' or '.join(names)}")
    for path in paths:
        # a run that finds an older one in its folder says so: outputs would differ
        shutil.rmtree(FOLDER.parent / "out" / f"notebook_{path.name[0]}", ignore_errors=True)
        started = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main(sys.argv[1:])
