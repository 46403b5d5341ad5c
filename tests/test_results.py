# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The numbers of README.md and of the pages have their JSON: each table with numbers, and sentences."""

import json
import re
from operator import itemgetter
from pathlib import Path
from statistics import geometric_mean, mean, median

import pytest
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "studies" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# a header, the line below it, of which a cell is aligned to the right (numbers), and the rows
TABLE = re.compile(r"^\|(.*)\|\n\|[ :|-]*-:[ :|-]*\|\n((?:\|.*\n)+)", re.MULTILINE)
# those are written by studies, and compared as a whole in tests/examples/test_tables.py
WRITTEN = {
    *("pde.md: problem", "pde.md: shape", "pde.md: demo", "scoreboard.md: published"),
    *(f"benchmarks.md: {header}" for header in ("size", "n", "frozen base")),
}

Rows = list[list[str]]
Values = list[list]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


TABLES: dict[str, Rows] = {
    f"{path.name}: {next(filter(None, cells(header)))}": [cells(line) for line in body.splitlines()]
    for path in PAGES
    for header, body in TABLE.findall(re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL))
}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def accuracy(part: str, method: str) -> float:
    """The best setting's mean over the seeds, %."""
    return max(mean(scores) for scores in load("initialization")["results"][part][method].values())


def error(family: str, target: str, method: str, key: str = "error") -> float:
    rows = load("pde/transfer")["rows"]
    (row,) = (row for row in rows if (row["family"], row["target"], row["method"]) == (family, target, method))
    return 100 * row[key]


def sizes(widths: list[int], r: int | tuple[int, int, int] = (16, 16, 6)) -> tuple[int, int]:
    """Parameters of an adapter, and of its base."""
    model = get_peft_model(KAN(widths), LoTRAConfig(r=r))
    return model.get_nb_trainable_parameters()[0], sum(part.numel() for part in model.unload().parameters())


def readme_accuracies() -> Values:
    rows = []
    parts = {
        "digits, rotated and noisy (quickstart)": sizes([64, 32, 10]),
        "pykan: rotated and noisy": sizes([64, 32, 10])[0],
        "digits to MNIST": sizes([64, 48, 10]),
    }
    for part, parameters in parts.items():
        full, ours = (accuracy(part, method) for method in ("full fine-tuning", "gradient (16, 16, 6)"))
        rows.append([full, (ours, ours < full), parameters])
    return rows


def readme_pdes() -> Values:
    rows = []
    for case in (("allen_cahn", "middle"), ("burgers", "far")):
        adam, lm, ours = (error(*case, method) for method in ("full_adam", "full_lm", "lotra_lm"))
        early = error(*case, "lotra_lm", "error_at_a_fifth_of_the_seconds")
        rows.append([adam, (early, early > adam), lm, (ours, ours > lm)])
    return rows


def starts() -> Values:
    parts = (
        "digits, rotated and noisy (quickstart)",
        "digits, rotated by 30 degrees",
        "efficient-kan: rotated and noisy",
        "pykan: rotated and noisy",
        "digits to MNIST",
    )
    methods = [f"{start} {ranks}" for ranks in ("(16, 16, 6)", "(8, 8, 4)") for start in ("gradient", "random")]
    return [[accuracy(part, method) for method in ("full fine-tuning", *methods)] for part in parts]


def few_labels() -> Values:
    results = [part for name, part in load("few_labels")["results"].items() if name.startswith("digits")]

    def chosen(row: dict, data: str = "test") -> float:  # by validation data
        rate = max(row["rates"].values(), key=lambda rate: mean(rate["validation"].values()))
        return mean(rate[data].values())

    def best(part: dict) -> dict:  # of the ranks
        rows = [row for name, row in part.items() if name.startswith("LoTRA, gradient start, r=")]
        return max(rows, key=lambda row: chosen(row, "validation"))

    names = (
        *("KAN, full fine-tuning", "KAN, spline weights", "KAN, last layer", "LoTRA, random start, r=4"),
        *(f"LoTRA, gradient start, {r}" for r in ("r=4", "r=(8, 8, 4)", "budget of 10 %")),
        *("MLP, full fine-tuning", "MLP, LoRA, r=3"),
    )
    rows = [[max(part[n]["parameters"] for part in results), *(chosen(part[n]) for part in results)] for n in names]
    found = [best(part) for part in results]
    return [*rows[:7], [max(row["parameters"] for row in found), *map(chosen, found)], *rows[7:]]


def many_series() -> Values:
    names = (
        *("one KAN for all", "last layer", "LoTRA, r=4, from the gradient", "full copies"),
        *("a KAN of its own", "a linear model of its own", "MLP, LoRA, r=1", "MLP, full copies"),
    )
    parts = [part["methods"] for part in load("many_series")["results"].values()]
    return [[parts[0][name].get("bytes", 0), *(mean(p[name]["test"].values()) for p in parts)] for name in names]


def fifty_tasks() -> Values:
    names = (
        *("50 heads (last layer)", "LoTRA, r=4, from the gradient", "LoTRA, r=(8, 8, 4), from the gradient"),
        *("50 full copies", "50 KANs without the base", "MLP, 50 heads", "MLP, 50 full copies"),
    )
    kinds = (["rotated", "permuted"], ["negative"], ["renamed", "grouped"])
    kinds = (*kinds, sum(kinds, []))
    rows = [load("fifty_tasks")["methods"][name] for name in names]
    return [
        [row["bytes"], *(mean(run[kind] for run in row["test"].values() for kind in part) for part in kinds)]
        for row in rows
    ]


def slim_images() -> Values:
    rows = load("slim_images_digits")["rows"]

    def of(model: str, key: str) -> float:
        return mean(row[key] for row in rows if row["model"] == model)

    def row(model: str, ratio: bool = False, then: bool = False) -> list:
        first = f"{model}, as it is" if then else model
        size = of(first, "parameters")
        scores = (of(first, "accuracy"), *([of(f"{model}, 1 epoch", "accuracy")] if then else []))
        return [(size, of("dense KAN", "parameters") / size) if ratio else size, scores]

    trained = ("energy 0.99", "1/8", "1/8, without inputs")
    return [
        row("dense KAN"),
        *(row(f"Slim KAN {ranks}", True) for ranks in ("(20, 20, 2)", "(10, 10, 2)")),
        *(row(f"slim(dense), {how}", True, True) for how in trained),
        row("narrow KAN"),
        row("MLP"),
    ]


def lycoris() -> Values:
    found = load("beside_lycoris")
    random = accuracy("digits, rotated and noisy (quickstart)", "random (16, 16, 6)")
    rows = []
    for name in ("full fine-tuning", "LoTRA, gradient start", "LoTRA, random start", "LoKr", "LoHa"):
        best = max(mean(scores) for scores in found["results"][name].values())
        rows.append([found["parameters"][name], (best, random) if name == "LoTRA, random start" else best])
    return rows


def fronts() -> Values:
    names = ("predicted", "one step", "POD, exact", "POD, projected", "POD, members", "POD, shifted")
    results, rows = load("parametric/fronts")["results"], []
    for members in (5, 9):
        medians, worst = ([run[key] for run in results if run["members"] == members] for key in ("medians", "worst"))
        rows.append([(median(run[name] for run in medians), max(run[name] for run in worst)) for name in names])
    return rows


def convolutions() -> Values:
    found = load("convolutions")
    best = {(row["budget"], row["method"]): mean(row["accuracy"]) for row in found["rows"]}
    return [[best[budget, method] for method in ("LoTRA", "LoRA", "dense deltas")] for budget in found["budgets"]]


def jet_speed() -> Values:
    eager, both = (run["milliseconds"] for run in load("pde/jet_speed")["rows"])
    rows = [[], []]
    for size in (5, 20):
        plain = [run[f"value and Laplacian, grid {size}"] for run in (eager, both)]
        rows[0].append((min(plain), max(plain)))
        compiled = both[f"value and Laplacian, grid {size}, compiled"]
        rows[1].append((compiled, compiled > max(plain)))
    return rows


def jet_orders() -> Values:
    return list(load("pde/jet_orders")["milliseconds"].values())


def standard() -> Values:
    found = load("pde/standard")
    rows = []
    for name in (
        *("burgers", "allen_cahn", "helmholtz"),
        *("korteweg_de_vries", "sine_gordon", "advection", "fisher"),
    ):
        errors = [run["error"] for run in found["results"][name]]
        rows.append([(median(errors), max(errors)), found["peers"][name]["mlp"][0]["error"]])
    return rows


NUMBERS = {
    "README.md: accuracy %": readme_accuracies,
    "README.md: error %": readme_pdes,
    "training.md: accuracy %, 5 seeds, each at its best rates": starts,
    "when.md: labels": few_labels,
    "when.md: each series has": many_series,
    "when.md: accuracy %": fifty_tasks,
    "slim.md: digits, mean of 5 seeds, [64, 64, 10]": slim_images,
    "comparison.md: parameters": lycoris,
    "parametric.md: members": fronts,
    "convolutions.md: parameters, at most": convolutions,
    "benchmarks.md: CPU ms, 5 intervals": jet_speed,
    "benchmarks.md: CPU ms": jet_orders,
    "benchmarks.md: relative L2 error": standard,
}


def test_each_table_with_numbers_has_its_results():
    assert set(TABLES) == WRITTEN | set(NUMBERS)


@pytest.mark.parametrize("table", NUMBERS)
def test_numbers(table):
    rows, expected = TABLES[table], NUMBERS[table]()
    assert len(rows) == len(expected)
    for (_, *row), values in zip(rows, expected, strict=True):
        for cell, value in zip(row, values, strict=True):
            check(cell, value)


def check(cell: str, value: float | tuple) -> None:
    """The cell has the values, rounded to its digits, and a mark if the last one says that we lose."""
    values = list(value) if isinstance(value, tuple) else [value]
    marked = values.pop() if isinstance(values[-1], bool) else False
    assert cell.endswith("▲") == marked
    numbers = re.findall(r"\d+\.?\d*(?:e-\d+)?", cell.replace(",", ""))
    assert len(numbers) == len(values)
    for number, value in zip(numbers, values, strict=True):
        mantissa, _, exponent = number.partition("e")
        unit = float(f"1e{int(exponent or 0) - len(mantissa.partition('.')[2])}")
        assert abs(float(number) - value) <= 0.5001 * unit


def sentences_of_index() -> list[str]:
    base, ours, full = (
        mean(run[0] for run in load("quickstart")["rows"][name])
        for name in ("base, not adapted", "LoTRA", "full fine-tuning")
    )
    return [f"From {base:.0f} to {ours:.0f} %", f"all of them trained reach {full:.0f}"]


def sentences_of_when() -> list[str]:
    small, large = sizes([2, 1, 1], 4), sizes([2, 10, 10, 1], 4)
    narrow, wide = (
        row["ms"]
        for row in load("benchmarks/cpu")["training_step"]["rows"]
        if row["kan"] == "own KAN" and (row["widths"], row["batch"]) in (([16, 16], 256), ([1024, 1024], 1024))
    )
    steps = [f"{ms[name]['total'][1]:.3g}" for ms in (narrow, wide) for name in ("full fine-tuning", "LoTRA")]
    lm = {(row["width"], row["method"]): row["seconds"] for row in load("pde/lm_cost")["rows"]}
    parts = (RESULTS / "rivals.md").read_text().split("### ")
    row = r"^\| ([^|]+) \| [\d,]+ \| [\d.]+ \| ([\d.]+) \|"
    text, pde, *mnist = (
        dict(re.findall(row, part, re.M))
        for name in ("characters", "Burgers", "digits to MNIST, 200 ", "digits to MNIST, 1000 ")
        for part in parts
        if part.startswith(name)
    )
    methods = (
        "KAN, full fine-tuning",
        "LoTRA, gradient start, r=(8, 8, 4)",
        "LoRA of slices",
        "MLP, full fine-tuning",
    )
    errors = [f"{100 * 10 ** -float(pde[name]):.1f} %" for name in methods]
    full, residual, ours = (
        " and ".join(part[name] for part in mnist)
        for name in ("KAN, full fine-tuning", "KAN, residual weights", "LoTRA, gradient start, r=(8, 8, 4)")
    )
    return [
        f"[2, 1, 1] has {small[1]}, its adapter at `r=4` {small[0]}",
        f"[2, 10, 10, 1] has {large[1]:,} and {large[0]}",
        f"takes {steps[0]} ms in full, {steps[1]} with LoTRA",
        f"{steps[2]} and {steps[3]} ms",
        f"{lm[128, 'LoTRA']:.2f} instead of {lm[128, 'full']:.1f} s",
        f"{text[methods[0]]} and {text['KAN, last layer']} % of the next characters, {text[methods[1]]} by LoTRA, "
        f"{text[methods[3]]} by an MLP in full",
        f"is {errors[0]}, by LoTRA {errors[1]}, by LoRA of slices {errors[2]}, by an MLP in full {errors[3]}",
        f"cores have {of_cores(10)} times the error in half of the seconds at width 10 (five seeds), {of_cores(64)}",
        f"MNIST: {full} % in full, {residual} by the residual weights (11 %), {ours} by LoTRA (8 %)",
    ]


def of_cores(width: int) -> str:
    """At half of the seconds, as a multiple of the least error of all parameters: the means of the three problems."""
    lines = (RESULTS / "pde" / "moving_targets.md").read_text().splitlines()
    rows = [cells(line) for line in lines if f"| {width} | cores alone, LM |" in line]
    return spread([float(row[11].split()[0]) for row in rows])


def forgotten() -> tuple[list[float], list[float]]:
    """For each problem the error of "auto", and of a factor of 0.8, as a multiple of the best fixed factor's."""
    found = load("pde/forgetting")["results"].values()
    first = [{factor: min(runs, key=itemgetter("seed"))["error"] for factor, runs in of.items()} for of in found]
    best = [min(value for factor, value in errors.items() if factor != "auto") for errors in first]
    return tuple([errors[key] / least for errors, least in zip(first, best, strict=True)] for key in ("auto", "0.8"))


def sentences_of_training() -> list[str]:
    rows = [row for row in load("learning_rates")["rows"] if (row["task"], row["optimizer"]) == ("teacher", "Adam")]
    left = {
        lr: [100 * mean(row["losses"]) for row in rows if (row["policy"], row["lr"]) == ("width", lr)]
        for lr in (3e-2, 2e-4)
    }
    return [
        f"leaves {min(left[2e-4]):.0f} to {max(left[2e-4]):.0f} %",
        f"3e-2 leaves {min(left[3e-2]):.1f} to {max(left[3e-2]):.0f} %",
        f"has {spread(forgotten()[0])} times the error",
    ]


def sentences_of_comparison() -> list[str]:
    auto, fixed = forgotten()
    return [f'`forgetting="auto"` has {spread(auto)} times the error', f"has {geometric_mean(fixed):.0f} times"]


def sentences_of_benchmarks() -> list[str]:
    eager, both = (run["milliseconds"] for run in load("pde/jet_speed")["rows"])
    nested = (
        eager["Laplacian alone, grid 5, nested autograd"],
        eager["Laplacian alone, efficient-kan, nested autograd"],
    )
    times = [other / eager["Laplacian alone, grid 5"] for other in nested]
    nested = both["Laplacian alone, grid 5, nested autograd"], nested[1]
    compiled = [other / both["Laplacian alone, grid 5, compiled"] for other in nested]
    lm = {(row["width"], row["method"]): row for row in load("pde/lm_cost")["rows"]}
    full, ours = lm[128, "full"], lm[128, "LoTRA"]
    found = load("pde/family")["at 0.065"]
    several = [f"{100 * found[name]:.{digits}f}" for name, digits in (("sum", 2), ("nu_070", 1), ("nu_060", 1))]
    return [
        f"it is {times[0]:.1f} times as fast as nested autograd through the same KAN, and {times[1]:.0f} times",
        f"compiled {compiled[0]:.1f} and {compiled[1]:.0f} times",
        f"takes {full['seconds']:.0f} s and {full['megabytes'] / 1000:.1f} GB for all parameters",
        f"{ours['seconds']:.1f} s and {ours['megabytes'] / 1000:.2f} GB for the adapter",
        f"has {several[0]} % error, the neighbors {several[1]} and {several[2]} %",
    ]


def sentences_of_convolutions() -> list[str]:
    found = load("convolutions")
    alone, scores = mean(found["base"]), {row["method"]: mean(row["accuracy"]) for row in found["rows"]}
    head, full = scores["head alone"], scores["full fine-tuning"]
    return [f"Without an adapter it is {alone:.1f}, with the head alone (650 parameters) {head:.1f}", f"{full:.1f}"]


def sentences_of_parametric() -> list[str]:
    (eight,) = (row for row in load("parametric/smooth")["rows"] if row["solutions"] == 8)
    family, interpolated, lspg = (f"{eight[name]:.1e}" for name in ("family", "POD, interpolated", "POD, LSPG"))
    runs = [run["rows"] for run in load("parametric/wide")]
    wide = [
        f"{median(median(row[name] for row in rows) for rows in runs):.1e}{word} and "
        f"{max(row[name] for rows in runs for row in rows):.1e}"
        for name, word in (("predicted", " (median)"), ("one step", ""))
    ]
    return [f"an error of {family}", f"has {interpolated} by interpolated coefficients", f"{lspg} by LSPG", *wide]


def sentences_of_slim() -> list[str]:
    rows = load("slim_images_mnist-10k")["rows"]
    names = ("dense KAN", "MLP", "slim(dense), energy 0.99, as it is")
    scores = [mean(row["accuracy"] for row in rows if row["model"] == name) for name in names]
    return [
        f"dense {scores[0]:.1f} %",
        f"an MLP of equal size {scores[1]:.1f} %",
        f"loses {scores[0] - scores[2]:.1f} points",
        f"and {slim_ratio()} times its error",
    ]


def slim_ratio() -> str:
    """The median of the twelve functions' errors, each the median over the seeds, as a multiple of the dense KAN's."""
    errors: dict[str, dict[str, list[float]]] = {"dense": {}, "slim, ranks 20": {}}
    for row in load("slim_functions")["rows"]:
        errors.get(row["model"], {}).setdefault(row["function"], []).append(row["rmse"])
    dense, slim = (median(map(median, runs.values())) for runs in errors.values())
    return f"{slim / dense:.2f}"


SENTENCES = (
    *(sentences_of_index, sentences_of_when, sentences_of_training, sentences_of_comparison),
    *(sentences_of_benchmarks, sentences_of_convolutions, sentences_of_parametric, sentences_of_slim),
)


@pytest.mark.parametrize("made", SENTENCES)
def test_sentences(made):
    page = (ROOT / "docs" / f"{made.__name__.removeprefix('sentences_of_')}.md").read_text()
    for sentence in made():
        assert sentence in " ".join(page.split())


def test_the_page_of_the_paper() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = load("pde/transfer")["rows"]
    errors = {(row["family"], row["target"], row["method"]): row["error"] for row in rows}
    cases = {key[:2] for key in errors}

    def ratios(method: str, other: str) -> list[float]:
        return [errors[(*case, method)] / errors[(*case, other)] for case in cases]

    one_rate = ratios("lotra_uniform_adam", "lotra_adam")
    assert f"has {spread(one_rate)} times the error" in text
    assert f"{geometric_mean(one_rate):.1f} times in the geometric mean" in text
    assert f"{spread(ratios('lotra_adam', 'full_adam'))} times the error of full fine-tuning" in text
    assert f"from zero {spread(ratios('scratch_adam', 'full_adam'))} times" in text
    assert f"is {spread(ratios('lotra_lm', 'full_lm'))} times more accurate" in text
    assert f"{slim_ratio()} times the error (ratio of the medians" in text


def test_the_expressiveness_on_the_page_of_the_paper() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    energies = [
        (task["update"]["mean"], task["random"]["mean"]) for task in load("low_rank_evidence")["energy"].values()
    ]
    held = spread([100 * update for update, _ in energies], 0)
    assert f"hold {held} % of the energy, {spread([u / r for u, r in energies], 0)} times a random update's" in text
    assert f"hold only {held} % of the energy" in (ROOT / "docs" / "training.md").read_text()
    results = load("expressiveness")["results"]
    tasks = [task for task in results if "planted" not in task]

    def left(kind: str, key: str, rank: int, part: str = "") -> list[float]:
        found = [results[task][kind] for task in tasks if not part or task.startswith("PDE") == (part == "PDE")]
        return [mean(run[str(rank)][key] for run in runs) for runs in found]

    assert len(tasks) == 6
    update, random, smooth = (spread(left(kind, "tensor", 8), 2) for kind in ("update", "random", "smooth random"))
    assert f"leaves {update} of an update, {random} of a random one of its norm, {smooth} of a smooth" in text
    empty = [sum(bound >= 1 for bound in left("update", "bound", rank)) for rank in (2, 4)]
    assert f"on {empty[0]} of six tasks at rank 2 and on {empty[1]} at rank 4" in text
    bound = left("update", "bound", 8)
    ratios = [b / t for b, t in zip(bound, left("update", "tensor", 8), strict=True)]
    assert f"at rank 8 it is {spread(bound, 2)}, {spread(ratios)} times the measured error" in text
    data, pdes = (spread(left("update", "function", 8, part), 2) for part in ("data", "PDE"))
    assert f"leaves {data} on data, but {pdes} on the PDEs" in text
    trained = load("expressiveness")["recovered"]
    (tensor, function), (of_full, in_full) = (
        [mean(run[rank][key] for run in trained) for key in ("tensor", "function")] for rank in ("2", "0")
    )
    assert f"({100 * function:.0f} % are left, by all coefficients {100 * in_full:.0f} %)" in text
    assert f"({tensor:.1f} times its norm is left, by all coefficients {of_full:.1f} times)" in text


def spread(values: list[float], digits: int = 1) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
