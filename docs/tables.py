# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables of the pages, from the results of the studies.

python docs/tables.py           # writes README.md, docs/*.md and the pages of the results
python docs/tables.py --check   # writes nothing: which tables are not current?

A page has a table between `<!-- table: NAME -->` and `<!-- end of table -->`, and a
figure of a sentence between `<!-- figure: NAME -->` and `<!-- end of figure -->`.
Each study's page of Markdown beside its JSON is made again, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from types import ModuleType


ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "examples" / "studies"
RESULTS = STUDIES / "results"
FOLDERS = (".", "pde", "parametric", "benchmarks")
MARKED = re.compile(
    r"(<!-- (table|figure): (\S+) -->)(.*?)(<!-- end of \2 -->)", re.DOTALL
)

sys.path += [str(STUDIES / folder) for folder in FOLDERS]
sys.path.append(str(STUDIES.parent / "benchmark"))

from study_tools.tables import table  # noqa: E402


def load(name: str) -> dict:
    """Return the content of a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def study(name: str) -> ModuleType:
    return importlib.import_module(name)


def best_accuracy(shift: str, method: str) -> float:
    """Return the best setting's mean over the seeds, in %."""
    settings = load("initialization")["results"][shift][method]
    return max(mean(scores) for scores in settings.values())


def quickstart() -> str:
    names = ("base, not adapted", "LoTRA")
    runs = load("quickstart")["rows"]
    base, lotra = (mean(percent for percent, _ in runs[name]) for name in names)
    return f"{base:.0f} to {lotra:.0f} %"


def starts() -> str:
    shifts = {
        "digits rotated by 30°, noisy, 200 labels": "digits, rotated and noisy (quickstart)",
        "the same without noise, wider layer": "digits, rotated by 30 degrees",
        "the first task on efficient-kan": "efficient-kan: rotated and noisy",
        "the first task on pykan": "pykan: rotated and noisy",
        "from digits to MNIST at 8x8 pixels, 500 labels": "digits to MNIST",
    }
    rows = []
    for title, shift in shifts.items():
        row = [title, f"{best_accuracy(shift, 'full fine-tuning'):.1f}"]
        for ranks in ("(16, 16, 6)", "(8, 8, 4)"):
            for start in ("gradient", "random"):
                row.append(f"{best_accuracy(shift, f'{start} {ranks}'):.1f}")
        row[2] = f"**{row[2]}**"
        rows.append(row)
    header = (
        "| accuracy %, 5 seeds, each at its best rates | full "
        "| (16, 16, 6), gradient | (16, 16, 6), random "
        "| (8, 8, 4), gradient | (8, 8, 4), random |"
    )
    return table(header, rows)


def benchmark() -> dict:
    """Return the results of the benchmark by case."""
    path = ROOT / "examples" / "benchmark" / "results.json"
    return json.loads(path.read_text())["results"]


def is_new(case: str) -> bool:
    """Return whether a case was named before its first run."""
    return case.rpartition(", ")[0] in study("pairs").NEW


def benchmark_cases() -> str:
    scores = study("scores")
    columns = {
        "full": scores.FULL,
        "linear model": "linear model",
        "path": "path",
        "path + one shape": "path + one shape",
        "full on the path": "full on the path",
        "MLP, full": "MLP, full",
        "`fit_adapter`": "fit_adapter",
    }
    lines = []
    for case, rows in benchmark().items():
        cells = [scores.show(rows, method) for method in columns.values()]
        lines.append([f"{case} *" if is_new(case) else case, *cells])
    return table(f"| case, labels | {' | '.join(columns)} |", lines)


def benchmark_methods(methods: list[str]) -> str:
    scores = study("scores")
    results = benchmark()
    known = [rows for case, rows in results.items() if not is_new(case)]
    new = [rows for case, rows in results.items() if is_new(case)]
    lines = []
    for method in methods:
        tallies = [
            scores.tally(cases, method, scores.FULL) for cases in (known, new)
        ]
        size = scores.mean_bytes(results.values(), method)
        lines.append([method, *tallies, size])
    header = (
        f"| method | {len(known)} known cases | {len(new)} new ones | bytes |"
    )
    return table(header, lines)


def all_methods() -> str:
    return benchmark_methods(
        [m for m in study("methods").METHODS if m != "base"]
    )


def few_methods() -> str:
    return benchmark_methods(
        ["linear model", "path + one shape", "full on the path"]
    )


def many_series() -> str:
    names = {
        "one KAN for all series": "one KAN for all",
        "its last layer": "last layer",
        "LoTRA, `r=4`, from the gradient": "LoTRA, r=4, from the gradient",
        "a linear path": "a linear path",
        "LoTRA, one shape, on the path": "LoTRA, one shape, on a linear path",
        "a copy": "full copies",
        "a separate KAN": "a KAN of its own",
        "a separate linear model": "a linear model of its own",
        "an MLP as the base, LoRA, `r=1`": "MLP, LoRA, r=1",
        "a copy of the MLP": "MLP, full copies",
    }
    parts = [
        part["methods"] for part in load("many_series")["results"].values()
    ]
    rows = []
    for title, name in names.items():
        errors = [f"{mean(part[name]['test'].values()):.3f}" for part in parts]
        rows.append([title, f"{parts[0][name].get('bytes', 0):,}", *errors])
    header = (
        "| for each series | bytes | households, a week "
        "| households, a month | industries |"
    )
    return table(header, rows)


def slim_digits() -> str:
    runs = load("slim_images_digits")["rows"]

    def average(model: str, key: str) -> float:
        return mean(run[key] for run in runs if run["model"] == model)

    dense = average("dense KAN", "parameters")
    rows = []
    cases = [  # title, model, how many times fewer parameters
        ("dense KAN", "dense KAN", ""),
        (
            "**Slim KAN** from scratch, ranks (20, 20, 2)",
            "Slim KAN (20, 20, 2)",
            " ({:.1f}x fewer)",
        ),
        (
            "**Slim KAN** from scratch, ranks (10, 10, 2)",
            "Slim KAN (10, 10, 2)",
            " ({:.1f}x)",
        ),
        ("dense KAN of fewer units", "narrow KAN", ""),
        ("MLP", "MLP", ""),
    ]
    for title, model, ratio in cases:
        size = average(model, "parameters")
        shown = f"{size:,.0f}{ratio.format(dense / size)}"
        rows.append([title, shown, f"{average(model, 'accuracy'):.1f}"])
    header = (
        "| digits, mean of 5 seeds, [64, 64, 10] | parameters | accuracy % |"
    )
    return table(header, rows)


def lycoris() -> str:
    record = load("beside_lycoris")
    digits = "digits, rotated and noisy (quickstart)"
    random = best_accuracy(digits, "random (16, 16, 6)")
    names = {
        "full fine-tuning": "full fine-tuning",
        "LoTRA from the gradient, (16, 16, 6)": "LoTRA, gradient start",
        "the same from random factors": "LoTRA, random start",
        "LoKr, factors of 2": "LoKr",
        "LoHa in Tucker form, rank 8": "LoHa",
    }
    rows = []
    for title, name in names.items():
        settings = record["results"][name].values()
        accuracy = f"{max(mean(scores) for scores in settings):.1f}"
        if name == "LoTRA, random start":
            accuracy += (
                f" ({random:.1f} at the best of six settings: "
                "[training well](training.md))"
            )
        rows.append([title, f"{record['parameters'][name]:,}", accuracy])
    return table("| | parameters | accuracy % |", rows)


def fronts() -> str:
    names = (
        "predicted",
        "one step",
        "POD, exact",
        "POD, projected",
        "POD, members",
        "POD, shifted",
    )
    results = load("parametric/fronts")["results"]
    rows = []
    for members in (5, 9):
        runs = [run for run in results if run["members"] == members]
        row = [str(members)]
        for name in names:
            middle = median(run["medians"][name] for run in runs)
            worst = max(run["worst"][name] for run in runs)
            row.append(f"{middle:.1e}, {worst:.1e}")
        rows.append(row)
    header = (
        "| members | predicted | one step | POD of exact solutions "
        "| projection error | POD of the members | shifted POD |"
    )
    return table(header, rows)


def convolutions() -> str:
    results = load("convolutions")
    accuracy = {
        (row["budget"], row["method"]): mean(row["accuracy"])
        for row in results["rows"]
    }
    rows = []
    for budget in results["budgets"]:
        values = [accuracy[budget, method] for method in ("LoTRA", "LoRA")]
        shown = [
            f"**{value:.1f}**" if value == max(values) else f"{value:.1f}"
            for value in values
        ]
        rows.append([f"{budget:,}", *shown])
    header = "| parameters, at most | LoTRA | PEFT's LoRA |"
    return table(header, rows, left=0)


def jet_orders() -> str:
    names = ("KAN, `jet`", "KAN, nested autograd")
    names += ("MLP, `jet`", "MLP, nested autograd")
    methods = load("pde/jet_orders")["milliseconds"].values()
    rows = []
    for name, times in zip(names, methods, strict=True):
        shown = [
            f"{time:.0f}" if time >= 100 else f"{time:.1f}" for time in times
        ]
        rows.append([name, *shown])
    header = "| CPU ms | order 1 | order 2 | order 3 | order 4 |"
    return table(header, rows)


def rates_by_rank() -> str:
    tasks = {
        "teacher": "an update of rank 3",
        "function": "another function",
        "digits": "rotated digits",
    }
    lines = learning_rates("learning_rates_ranks").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    ]
    by_policy = {tuple(row[:3]): row for row in cells}
    rows = []
    for task, title in tasks.items():
        row = [title]
        for policy in ("width", "ranks above 4"):
            found = by_policy[task, "Adam", policy]
            _, worst = found[5].split(", ")
            row += [found[3], worst]
        rows.append(row)
    header = (
        "| task | by widths: best `lr` | error of one `lr` / best, worst "
        "| by ranks: best `lr` | error of one `lr` / best, worst |"
    )
    return table(header, rows).replace("--:", "---")


def learning_rates(name: str) -> str:
    """Return the page of a sweep; runs that diverged have no loss in JSON."""
    rows = load(name)["rows"]
    for row in rows:
        row["losses"] = [
            float("inf") if loss is None else loss for loss in row["losses"]
        ]
    return study("learning_rates").as_text(rows)


def record_of(name: str) -> str:
    """Return the page of a study of PDEs."""
    return study(name).markdown(load(f"pde/{name}"))


def without_first_paragraph(text: str) -> str:
    return text.partition("\n\n")[2]


def times_the_mlp(network: str) -> str:
    """Return the error on ten problems, in multiples of the MLP's."""
    first, _, _ = record_of("ten").partition("\n\n")
    return re.search(rf"^{network}: (\S+) times", first, re.MULTILINE)[1]


def benchmarks() -> str:
    return study("figures.page").section(load("benchmarks/cpu"))


def bank_training() -> str:
    page = study("bank_training").table(load("bank_training"))
    return without_first_paragraph(page)


TABLES: dict[str, Callable[[], str]] = {
    "bank-training": bank_training,
    "benchmarks": benchmarks,
    "convolutions": convolutions,
    "coverage": lambda: study("coverage").table(
        load("parametric/coverage")["results"]
    ),
    "demos": lambda: record_of("demos"),
    "benchmark": benchmark_cases,
    "benchmark-methods": all_methods,
    "readme-benchmark": few_methods,
    "fronts": fronts,
    "jet-orders": jet_orders,
    "lycoris": lycoris,
    "many-series": many_series,
    "rates-by-rank": rates_by_rank,
    "scoreboard": lambda: study("scoreboard").table(
        load("scoreboard")["results"]
    ),
    "shapes": lambda: without_first_paragraph(record_of("shapes")),
    "slim-digits": slim_digits,
    "starts": starts,
    "steps": lambda: study("steps").markdown(load("steps")["results"]),
    "ten": lambda: without_first_paragraph(record_of("ten")),
    "unknowns": lambda: without_first_paragraph(record_of("unknowns")),
}
FIGURES: dict[str, Callable[[], str]] = {
    "hybrid-to-mlp": lambda: times_the_mlp("splines, then tanh"),
    "kan-to-mlp": lambda: times_the_mlp("KAN"),
    "quickstart": quickstart,
}

# the pages beside the results
PAGES: dict[str, Callable[[], str]] = {
    "bank": lambda: study("bank").table(load("bank")),
    "bank_training": lambda: study("bank_training").table(
        load("bank_training")
    ),
    "bytes": lambda: study("bytes").as_text(load("bytes")["results"]),
    "convolutions": lambda: study("convolutions").as_text(load("convolutions")),
    "expressiveness": lambda: study("expressiveness").as_text(
        load("expressiveness")["results"], load("expressiveness")["recovered"]
    ),
    "extraction": lambda: study("extraction").as_text(
        load("extraction")["results"]
    ),
    "formulas": lambda: study("formulas").as_text(load("formulas")),
    "learning_rates": lambda: learning_rates("learning_rates"),
    "learning_rates_ranks": lambda: learning_rates("learning_rates_ranks"),
    "many_series": lambda: study("many_series").as_text(
        load("many_series")["results"]
    ),
    "parametric/coverage": TABLES["coverage"],
    "parametric/wide": lambda: study("wide").table(load("parametric/wide")),
    "pde/demos": lambda: record_of("demos"),
    "pde/moving_targets": lambda: study("moving_targets").page(
        load("pde/moving_targets")
    ),
    "pde/shapes": lambda: record_of("shapes"),
    "pde/stalls": lambda: record_of("stalls"),
    "pde/ten": lambda: record_of("ten"),
    "pde/unknowns": lambda: record_of("unknowns"),
    "scoreboard": TABLES["scoreboard"],
    "steps": TABLES["steps"],
}


def render(text: str) -> str:
    """Return the text of a page with its tables and figures made again."""

    def replace(match: re.Match) -> str:
        start, kind, name, _, end = match.groups()
        if kind == "table":
            return f"{start}\n{TABLES[name]().strip()}\n{end}"
        return f"{start}{FIGURES[name]()}{end}"

    return MARKED.sub(replace, text)


def changed() -> dict[Path, str]:
    """Return the new text of each file that is not current."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {path: render(path.read_text(encoding="utf-8")) for path in pages}
    texts |= {RESULTS / f"{name}.md": make() for name, make in PAGES.items()}
    return {
        path: text
        for path, text in texts.items()
        if path.read_text(encoding="utf-8") != text
    }


def stale(path: Path, text: str) -> list[str]:
    """Name what is not current in a file: its tables, or the file as a whole."""
    before = MARKED.findall(path.read_text(encoding="utf-8"))
    after = MARKED.findall(text)
    names = [
        old[2] for old, new in zip(before, after, strict=True) if old != new
    ]
    page = path.relative_to(ROOT).as_posix()
    return [f"{page}: {name}" for name in names] or [page]


def unused() -> list[str]:
    """Name the tables and figures that no page has."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    used = {
        match[3]
        for path in pages
        for match in MARKED.finditer(path.read_text(encoding="utf-8"))
    }
    return sorted({*TABLES, *FIGURES} - used)


def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    names = [f"{name}: no page has it" for name in unused()]
    for path, text in changed().items():
        names += stale(path, text)
        if not is_check:
            path.write_text(text, encoding="utf-8")
    if is_check and names:
        listed = "\n".join(names)
        sys.exit(f"Not current, run `python docs/tables.py`:\n{listed}")
    print("\n".join(names) or "all tables are current")


if __name__ == "__main__":
    main()
