# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a KAN on one PDE of a family and adapts it to others: the errors and costs of several methods.

Shown in docs/benchmarks.md.

    python examples/studies/pde/transfer.py  # all families: 100 minutes of one core
    python examples/studies/pde/transfer.py --families burgers --quick  # a minute, for CI: says nothing

Each run is stored in the cache and not repeated, so that an interrupted experiment continues. `--families`, `--seeds`,
`--targets` and `--methods` choose a part. The results, a table and a picture go to `--output`.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from problems.families import FAMILIES
from problems.methods import CACHE, METHODS, QUICK, Setting, run
from rich.progress import track
from study_tools import files, pictures


torch.set_num_threads(1)

DRAWN = ("elliptic", "reaction_diffusion", "burgers")  # the table has all families
RIVAL = "full_adam"  # today's practice
LINES = {
    "full_adam": {"color": "black", "linestyle": "--", "marker": "s"},
    "lotra_adam": {"color": pictures.RED, "linestyle": "--", "marker": "o"},
    "full_lm": {"color": "black", "linestyle": "-", "marker": "s"},
    "lotra_lm": {"color": pictures.RED, "linestyle": "-", "marker": "o"},
}


def error_at(curve: list, position: int, limit: float) -> float:
    """The last error recorded at or before a step (position 0) or a second (position 1)."""
    return [point[2] for point in curve if point[position] <= limit * (1 + 1e-9)][-1]


def seconds_to(curve: list, error: float) -> float | None:
    """The position at which the error was first reached; None if the run never reached it."""
    return next((point[1] for point in curve if point[2] <= error), None)


def summarize(lines: list[dict]) -> list[dict]:
    """One row for each family, target and method: means over the seeds."""
    by_run = {(x["family"], x["target"], x["seed"], x["method"]): x for x in lines}
    rows = []
    for family, target, method in dict.fromkeys((x["family"], x["target"], x["method"]) for x in lines):
        seeds = sorted(s for f, t, s, m in by_run if (f, t, m) == (family, target, method))
        runs = [by_run[family, target, seed, method] for seed in seeds]
        rivals = [by_run.get((family, target, seed, RIVAL)) for seed in seeds]
        row = {key: runs[0][key] for key in ("family", "target", "parameter", "method", "trainable", "share")}
        row |= {"kilobytes": runs[0]["kilobytes"], "seeds": len(seeds)}
        row["base_error"] = statistics.geometric_mean([r["curve"][0][2] for r in runs])
        row["steps"] = max(r["curve"][-1][0] for r in runs)
        row["error"] = statistics.geometric_mean([r["curve"][-1][2] for r in runs])
        row["seconds"] = statistics.mean(r["curve"][-1][1] for r in runs)
        if all(rivals):
            ends = [rival["curve"][-1] for rival in rivals]
            fifths = [error_at(r["curve"], 1, end[1] / 5) for r, end in zip(runs, ends, strict=True)]
            equal = [error_at(r["curve"], 1, end[1]) for r, end in zip(runs, ends, strict=True)]
            reached = [seconds_to(r["curve"], end[2]) for r, end in zip(runs, ends, strict=True)]
            row["error_at_equal_seconds"] = statistics.geometric_mean(equal)
            row["error_at_a_fifth_of_the_seconds"] = statistics.geometric_mean(fifths)
            row["seconds_to_rival"] = None if None in reached else statistics.mean(reached)
            row["rival_seconds"] = statistics.mean(end[1] for end in ends)
        rows.append(row)
    return rows


def markdown_of(rows: list[dict]) -> str:
    """The table of all methods."""
    lines = [
        "Relative L2 error in %, geometric mean over the seeds; seconds are CPU time of one core of a machine that "
        "others used too. `at equal s` and `at s / 5`: error when full fine-tuning by Adam has ended, and at a fifth "
        "of its seconds. `s to full Adam`: seconds to its error; `-` where a seed never got there.\n",
        "| family | target | method | parameters | kB | steps | error % | at equal s | at s / 5 | s | s to full Adam "
        "| seeds |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        reached = row.get("seconds_to_rival")
        columns = (row["error"], row.get("error_at_equal_seconds"), row.get("error_at_a_fifth_of_the_seconds"))
        numbers = ["-" if value is None else f"{100 * value:.3f}" for value in columns]
        lines.append(
            f"| {row['family']} | {row['target']} {row['parameter']:g} | {METHODS[row['method']].title} "
            f"| {row['trainable']} | {row['kilobytes']:.1f} | {row['steps']} | {' | '.join(numbers)} "
            f"| {row['seconds']:.1f} | {'-' if reached is None else f'{reached:.1f}'} | {row['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def draw(lines: list[dict], path: Path) -> None:
    """Draw the mean error of four methods against seconds, at the middle targets of three families."""
    lines = [line for line in lines if line["family"] in DRAWN]
    families = [family for family in FAMILIES.values() if any(line["family"] == family.name for line in lines)]
    figure, axes = plt.subplots(1, len(families), figsize=(10, 4.2), squeeze=False, layout="constrained")
    for family, ax in zip(families, axes.flat, strict=True):
        for method, style in LINES.items():
            wanted = (family.name, "middle", method)
            runs = [x["curve"][1:] for x in lines if (x["family"], x["target"], x["method"]) == wanted]
            points = list(zip(*runs, strict=False))  # ends with the shortest run
            seconds = [statistics.mean(s for _, s, _ in point) for point in points]
            errors = [100 * statistics.geometric_mean([e for *_, e in point]) for point in points]
            every = max(1, len(points) // 8)
            ax.plot(seconds, errors, **style, markersize=4, markevery=every, label=METHODS[method].title)
        change = f"{family.parameter_name} {family.base:g} to {family.targets['middle']:g}"
        title = f"{family.name.replace('_', '-')}:\n{change}"
        ax.set(xscale="log", yscale="log", title=title, xlabel="CPU seconds")
    axes.flat[0].set_ylabel("relative L2 error, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(message_of(lines))
    figure.savefig(path)
    plt.close(figure)


def message_of(lines: list[dict]) -> str:
    """What the curves show: the share of the seconds in which the adapter has the rival's error."""
    rows = [row for row in summarize(lines) if row["method"] == "lotra_lm" and row["target"] == "middle"]
    shares = [row["seconds_to_rival"] / row["rival_seconds"] for row in rows if row.get("seconds_to_rival")]
    if not shares or len(shares) < len(rows):
        return "Error by time when a trained KAN moves to another parameter of its PDE"
    share = f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"
    return (
        "LoTRA with Levenberg-Marquardt (LM) reaches the error of full fine-tuning\n"
        f"with Adam in {share} % of the time"
    )


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="25 minutes on one core for each family",
        writes="transfer.json, .md and .png; runs in --cache",
        folder=command_line.RESULTS / "pde",
        quick="a tiny setting: to see it run",
        redraw=True,
    )
    parser.add_choices("--families", FAMILIES)
    parser.add_seeds(1, 2, 3, 4, 5)  # rates were chosen on seed 0
    parser.add_choices("--targets", ["near", "middle", "far"])
    parser.add_choices("--methods", METHODS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained bases (default: %(default)s)")
    args = parser.parse_args()
    setting = QUICK if args.quick else Setting()

    path = files.path_of(args, "transfer")
    if args.redraw:
        draw(files.read(path)["runs"], path.with_suffix(".png"))
        return
    jobs = list(product(args.families, args.seeds, args.targets, args.methods))
    lines = [
        run(method, FAMILIES[family], target, setting, seed, args.cache)
        for family, seed, target, method in track(jobs, description="runs")
    ]
    rows = summarize(lines)
    drawn = [line for line in lines if line["method"] in LINES and line["target"] == "middle"]
    files.write(path, {"rows": rows, "runs": drawn}, indent=None)
    files.write_page(path, markdown_of(rows))
    draw(lines, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
