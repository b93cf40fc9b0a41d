"""What the pages say can be trusted: commands parse, links resolve, numbers equal their CSV.

Each check is also given a page on which it must fail.
"""
import csv
import dataclasses
import importlib
import re
import shlex
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest

import report
import sample
import train
from flags import read_flags
from labs import arms, figures, movie, plots, tables
from labs.diagram import diagram

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "labs" / "README.md", *sorted((ROOT / "labs" / "pages").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# -- commands --------------------------------------------------------------------------------------

def commands_of(text):
    """The command lines that begin with python or pip, of code blocks and of code in sentences."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", prose)
    found = []
    for line in lines:
        # what follows two blanks or a # explains the command
        line = re.split(r"\s{2,}|\s#", line.removeprefix("$ "))[0]
        parts = re.split(r"\s*(?:&&|;)\s*", line)
        found += [part for part in parts if re.match("(python|pip) ", part)]
    return found


def modules_kind(module):
    """The dataclass whose flags a lab takes."""
    source = Path(module.__file__).read_text("utf-8")
    called = re.search(r"(?:main|command_line)\(\w+, (\w+)\)\s*$", source)
    if called:
        return getattr(module, called[1])
    return getattr(module, "Flags", arms.Flags)


def run_nothing(command, monkeypatch):
    """Parse a command as its program would; ValueError, SystemExit or ImportError if it fails."""
    program, *words = shlex.split(command)
    if program == "pip":
        for word in words:
            if word.endswith(".txt") and not (ROOT / word).exists():
                raise ValueError(f"no file {word}")
        return
    if "--help" in words:
        words.remove("--help")
    name, *argv = words
    if name == "-m":
        module, *argv = argv
        if module == "pytest":
            return check_tests(argv)
        lab = importlib.import_module(module)
        if module == "labs.plots":
            unknown = set(argv) - set(plots.PLOTS)
            if unknown:
                raise ValueError(f"labs.plots draws no {unknown}")
            return
        kind = modules_kind(lab)
        kind(**read_flags(kind, argv, module))
    elif name == "train.py":
        given = read_flags(train.Config, argv, name)
        recipe = train.RECIPES[given.get("recipe", "default")]
        train.Config(**train.PRESETS[given.get("preset", "tiny")] | recipe | given)
    elif name == "sample.py":
        sample.Flags(**read_flags(sample.Flags, argv, name, positional="prompt"))
    elif name == "report.py":
        monkeypatch.setattr(report, "compare", lambda *parsed: None)
        report.main(argv)
    else:
        source = (ROOT / name).read_text("utf-8")
        for flag in argv:
            if flag.startswith("--") and f'"{flag.split("=")[0]}"' not in source:
                raise ValueError(f"{name} has no {flag}")


def is_flag(code):
    """Is `--name` or `--name=value ...` understood by one of the programs?"""
    words = shlex.split(code)
    names = (*plots.PLOTS.keys() - plots.ELSEWHERE, "teachers", "figures")
    labs = [importlib.import_module(f"labs.{name}") for name in names]
    for kind in (train.Config, sample.Flags, *(modules_kind(lab) for lab in labs)):
        fields = {field.name for field in dataclasses.fields(kind)}
        if all(word.partition("=")[0].removeprefix("--") in fields for word in words):
            try:
                read_flags(kind, [word for word in words if "=" in word], "page")
                return True
            except SystemExit:
                continue
    return False


def check_tests(argv):
    """`pytest -k WORD` must choose a test."""
    if argv:
        word = argv[argv.index("-k") + 1]
        if not any(word in path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")):
            raise ValueError(f"no test is called {word}")


@each_page
def test_every_command_of_a_page_parses(page, monkeypatch):
    for command in commands_of(page.read_text("utf-8")):
        try:
            run_nothing(command, monkeypatch)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{command}: {error!r}")


@each_page
def test_every_flag_in_a_sentence_exists(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    flags = [code for code in re.findall(r"`([^`]+)`", prose) if code.startswith("--")]
    assert [code for code in flags if not is_flag(code)] == []
    assert not is_flag("--pretrain_step=3") and not is_flag("--seed=one") and is_flag("--seed=1")


@pytest.mark.parametrize("command", [
    "python train.py --recipe=best", "python train.py --d_model=3", "python sample.py --ask=me",
    "python -m labs.nothing", "python -m labs.collapse --jobs=two", "python -m labs.plots nothing",
    "python -m labs.figures --films", "python report.py --out=a.jpg out/a", "python gone.py",
    "python data/wordnet/prepare.py --output=a", "pip install -r gone.txt",
    "python -m pytest -k no_" + "such_test"])
def test_a_command_that_does_not_exist_is_noticed(command, monkeypatch):
    assert commands_of(f"```\n{command}      with words behind it\n```") == [command]
    assert commands_of(f"Take `{command}`.") == [command]
    with pytest.raises((Exception, SystemExit)):
        run_nothing(command, monkeypatch)


# -- links and pictures ----------------------------------------------------------------------------

def anchors_of(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text, page):
    """Relative links and pictures of a page that lead nowhere."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    broken = []
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors_of(target.read_text("utf-8")):
            broken.append(link)
    return broken


@each_page
def test_every_relative_link_and_picture_resolves(page):
    assert broken_links(page.read_text("utf-8"), page) == []


def test_a_broken_link_is_noticed():
    links = ["gone.md", "README.md#gone", "assets/gone.png", "#gone"]
    text = " ".join(f"[a]({link})" for link in links) + ' <img src="gone.svg"> [b](tjepa.py)'
    assert broken_links(text, README) == [*links, "gone.svg"]


def test_the_committed_diagram_is_the_one_that_the_script_draws():
    svg = (ROOT / "assets" / "phases.svg").read_text("utf-8")
    assert svg == diagram() and ElementTree.fromstring(svg).tag.endswith("svg")


# -- numbers ---------------------------------------------------------------------------------------

def block_of(page, name):
    """What stands between <!-- name --> and <!-- /name -->; "" if nothing does."""
    found = re.search(f"<!-- {name} -->(.*?)<!-- /{name} -->", page.read_text("utf-8"), re.DOTALL)
    return found[1] if found else ""


def rows_in(block):
    """The rows of all tables of a block, lists of cells, without the lines below the headers."""
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [row for row in rows if set(row[0]) != {"-"}]


def from_csv(name, arm, figure):
    """Mean, deviation and seeds of a figure, read without any code of the labs."""
    with open(ROOT / "labs" / "results" / name, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["figure"]) == (arm, figure)]
    measured = [float(row["value"]) for row in rows if row["seed"]]
    if measured:
        deviation = statistics.stdev(measured) if len(measured) > 1 else None
        return statistics.mean(measured), deviation, len(measured)
    return float(rows[0]["value"]), float(rows[0]["deviation"]), int(rows[0]["seeds"])


def as_cell(mean, deviation, seeds):
    """A figure as a table has it; the number of seeds where there are fewer than three."""
    spread = "" if deviation is None else f" ± {deviation:.3f}"
    return f"{mean:.3f}{spread}" + {1: " (1 seed)", 2: " (2 seeds)"}.get(seeds, "")


def wrong_cells(rows):
    """Cells of the table of README.md that are not what facts.csv has."""
    expected = [["system, 3 seeds", *figures.COLUMNS]]
    for arm, (name, _) in figures.SYSTEMS.items():
        found = [from_csv("facts.csv", arm, figure) for figure in figures.COLUMNS.values()]
        expected.append([name, *(as_cell(*one) for one in found)])
    assert len(rows) == len(expected)
    return [cell for row, right in zip(rows, expected) for cell, want in zip(row, right)
            if cell != want]


def test_the_table_of_the_first_page_equals_its_csv():
    rows = rows_in(block_of(README, "results"))
    assert wrong_cells(rows) == []
    rows[1][2] = "0.939 ± 0.014"
    assert wrong_cells(rows) == ["0.939 ± 0.014"]


@pytest.mark.parametrize("plot", plots.TABLES)
def test_the_tables_beside_a_plot_equal_their_csv(plot):
    found = block_of(plots.page_of(plot), plot)
    rows = plots.rows_of(plot)
    text = "\n".join(tables.table(rows, part["arms"], part["columns"])
                     for part in plots.TABLES[plot].values())
    assert rows_in(found) == rows_in(text) and len(rows_in(text)) > 2


def shares(text):
    """The numbers of a text that are written as "96 %"."""
    return {float(number) for number in re.findall(r"([\d.]+) %", text)}


def test_the_shares_in_the_sentences_about_the_result_are_in_the_csv():
    section = README.read_text("utf-8").split("## The result")[1].split("\n## ")[0]
    longer = ["twice the steps", "latents alone with twice the steps",
              "masked LM with twice the steps"]
    names = [*figures.SYSTEMS, *longer, figures.FLOOR]
    known = {round(100 * from_csv("facts.csv", arm, figure)[0])
             for arm in names for figure in figures.COLUMNS.values()}
    assert shares(section) - known == set() and 77 not in known


def test_the_numbers_that_explain_the_transcript_are_in_it():
    text = README.read_text("utf-8")
    transcript = block_of(README, "transcript")
    steps = "\n".join(re.findall(r"^\d\. .*(?:\n   .*)*", text, re.MULTILINE))
    for share in shares(steps):
        digits = f"{share / 100:.3f}".rstrip("0")
        assert digits in transcript, digits
    for number in re.findall(r"\b\d\.\d\b(?! %)", steps):
        assert number in transcript, number
    assert "/tmp" not in text


def test_the_numbers_about_the_collapsed_run_are_those_of_the_picture():
    with open(ROOT / "assets" / "health.csv", newline="", encoding="utf-8") as file:
        last = {row["run"]: row for row in csv.DictReader(file)}
    healthy, collapsed = (last[name] for name in movie.RUNS)
    text = README.read_text("utf-8")
    assert f"the collapsed one has {float(collapsed['std']):.2f}".replace("0.", ".") in text
    assert f"the collapsed run keeps {float(collapsed['rank']):.0f}" in text
    assert f"{float(healthy['hit1']):.2f} here".removeprefix("0") in text
    assert float(collapsed["loss"]) < 0.001 < 1 < float(healthy["loss"])
    assert float(collapsed["hit1"]) < 0.002


# -- the size of the first page --------------------------------------------------------------------

def too_much(text):
    """Which limits of the first page a text exceeds."""
    pictures = len(set(re.findall(r"assets/[\w.]+(?:png|svg|gif)", text)))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    n_tables = len(re.findall(r"^\|[ :|-]+\|$", text, re.MULTILINE))
    n_words = sum(bool(re.search(r"\w", word)) for word in text.split())
    return [name for name, exceeded in (("words", n_words > 1600), ("tables", n_tables > 3),
                                        ("pictures", pictures < 4)) if exceeded]


def test_the_first_page_can_be_read_in_ten_minutes():
    text = README.read_text("utf-8")
    assert too_much(text) == []
    assert too_much(text + 300 * " word") == ["words"]
    assert too_much(text + 2 * "\n| |\n|---|\n") == ["tables"]
    assert too_much(text.replace("assets/", "")) == ["pictures"]
    assert (ROOT / "assets" / "latents.gif").stat().st_size < 2e6
