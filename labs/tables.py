"""Tables of the labs, from the rows of `arms.results`: mean ± standard deviation over seeds."""
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

class Figure(NamedTuple):
    """A figure over several seeds. The mean of words is a word; one seed has no deviation."""
    mean: Any
    deviation: float | None
    seeds: int

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
    if measured:
        return figure_of(measured)
    return found[0] if found else None

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

def tables(rows, parts):
    """Markdown: a titled table for each of parts, title -> (arms, columns), that has any row."""
    known = {row["arm"] for row in rows}
    return "\n\n".join(f"{title}:\n\n{table(rows, arms, columns)}"
                       for title, (arms, columns) in parts.items() if known.intersection(arms))

def publish(lab, rows, text, path):
    """Print a table; with a path, also write it there between <!-- lab --> and <!-- /lab -->, with
    its command, commits and devices. ValueError if the file has no such lines."""
    print(text)
    if not path:
        return
    commits = sorted({name for row in rows for name in row["commit"].split()})
    devices = sorted({name for row in rows for name in row.get("device", "a CPU").split(", ")})
    body = (f"<!-- {lab} -->\nWritten by `python -m labs.{lab} --table={path}`, measured at commit "
            f"{', '.join(commits)} on {', '.join(devices)}.\n\n{text}\n<!-- /{lab} -->")
    block = re.compile(f"<!-- {lab} -->.*?<!-- /{lab} -->", re.DOTALL)
    page, n = block.subn(lambda _: body, Path(path).read_text(encoding="utf-8"))
    if not n:
        raise ValueError(f"--table={path} has no place for it: "
                         f"add the lines <!-- {lab} --> and <!-- /{lab} -->")
    Path(path).write_text(page, encoding="utf-8")
