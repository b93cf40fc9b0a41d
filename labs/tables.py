"""Tables of the labs, from the rows of `records.results`: mean ± standard deviation over seeds."""
import json
import re
import statistics
from pathlib import Path

from labs.records import REPOSITORY, Figure

PAGES = REPOSITORY / "labs" / "pages"
# lab -> title of a table of its page -> arms, in order, and columns: title -> figure of the CSV
TABLES = json.loads((PAGES / "tables.json").read_text(encoding="utf-8"))

def by_seed(rows):
    """Those of `results` that have a seed. Rows from an older table have a mean only."""
    return [row for row in rows if row["seed"] is not None]

def figure_of(values):
    """Numbers or words of several seeds as a `Figure`."""
    if isinstance(values[0], str):
        return Figure(", ".join(sorted(set(values))), None, len(values))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.mean(values), deviation, len(values))

def over_seeds(rows, arm, name):
    """A figure of an arm as a `Figure`: over its seeds if any were measured, else as an older table
    had it; None if there is neither."""
    found = [row[name] for row in rows if row["arm"] == arm and name in row]
    measured = [value for value in found if not isinstance(value, Figure)]
    return figure_of(measured) if measured else next(iter(found), None)

def cell(found):
    """A `Figure` in words; a missing one is "not measured"."""
    if found is None:
        return "not measured"
    if isinstance(found.mean, str):
        return found.mean
    spread = "" if found.deviation is None else f" ± {found.deviation:.3f}"
    # three seeds are the rule
    few = {1: " (1 seed)", 2: " (2 seeds)"}.get(found.seeds, "")
    return f"{found.mean:.3f}{spread}{few}"

def markdown(lines):
    """A markdown table from lists of cells; the first is the header."""
    header, *rest = lines
    lines = [header, ["---"] * len(header), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def table(rows, arms, columns):
    """A markdown table, mean ± standard deviation, an arm a row; columns: title -> figure."""
    known = {row["arm"] for row in rows}
    lines = [[arm, *(cell(over_seeds(rows, arm, name)) for name in columns.values())]
             for arm in arms if arm in known]
    return markdown([["arm", *columns], *lines])

def page_tables(lab, rows):
    """The tables of a lab's page in markdown, as far as they have any row."""
    known = {row["arm"] for row in rows}
    return "\n\n".join(f"{title}:\n\n{table(rows, part['arms'], part['columns'])}"
                       for title, part in TABLES[lab].items() if known.intersection(part["arms"]))

def origin(rows):
    """Where rows were measured: their commits and devices."""
    commits = sorted({name for row in rows for name in row["commit"].split()})
    devices = sorted({name for row in rows for name in row.get("device", "a CPU").split(", ")})
    return f"{', '.join(commits)} on {', '.join(devices)}"

def write_block(path, name, body):
    """Put a text between the lines <!-- name --> and <!-- /name --> of a page; ValueError if it has
    none."""
    page = Path(path)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = re.compile(f"{begin}.*?{end}", re.DOTALL)
    text, n = block.subn(lambda _: f"{begin}\n{body}\n{end}", page.read_text(encoding="utf-8"))
    if not n:
        raise ValueError(f"{path}: add the lines {begin} and {end}, between which the text goes")
    page.write_text(text, encoding="utf-8")

def publish(lab, rows, text, path):
    """Print a table; with a path, also write it there, as `write_block` does, with its command."""
    print(text)
    if path:
        source = f"Written by `python -m labs.{lab} --table={path}`, measured at commit"
        write_block(path, lab, f"{source} {origin(rows)}.\n\n{text}")
