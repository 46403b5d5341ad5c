# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a KAN on one PDE of a family and adapts it to others: the errors and costs of several methods.

    python examples/studies/pde/transfer.py  # all families and the table: 100 minutes of one core
    python examples/studies/pde/transfer.py --family allen_cahn  # about 25 minutes of one core
    python examples/studies/pde/transfer.py --family allen_cahn --quick  # a minute, for CI: says nothing
    python examples/studies/pde/transfer.py --family allen_cahn --fields  # its picture alone, from one run: 3 minutes
    python examples/studies/pde/transfer.py --report  # the table of all families from what was run

Each run is stored in the cache and not repeated, so that an interrupted experiment continues. `--seeds`,
`--targets` and `--methods` choose a part. The results, a table and a picture (reference, base, adapted, error) go to
`--output`.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import json
import statistics
import textwrap
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from problems.families import FAMILIES, GRID, Family, test_points
from problems.methods import CACHE, METHODS, QUICK, Setting, pretrained, run, train
from rich.console import Console
from rich.progress import track
from study_tools import files, pictures


torch.set_num_threads(1)

RIVAL = "full_adam"  # today's practice
ENDS = ["lotra_lm", "full_lm", "tenth_lm", "lotra_adam", "scratch_adam"]  # columns of the table of the README
MAIN = ["full_adam", "lotra_adam", "full_lm", "lotra_lm"]  # the lines of the small picture
# colors tell the methods, dashes the optimizers
LINES = {
    name: {"color": color, "linestyle": "-" if name.endswith("_lm") else "--", "marker": marker, "markersize": 4}
    for name, color, marker in (
        ("scratch_adam", pictures.GRAY, "x"),
        ("full_adam", "black", "s"),
        ("full_lm", "black", "s"),
        ("tenth_lm", pictures.BLUE, "*"),
        ("lora_adam", pictures.SKY, "v"),
        ("lotra_adam", pictures.RED, "o"),
        ("lotra_lm", pictures.RED, "o"),
        ("lotra_random_lm", pictures.ORANGE, "P"),
        ("lotra_uniform_adam", pictures.ORANGE, "D"),
        ("lotra_small_adam", pictures.GREEN, "^"),
        ("lotra_small_lm", pictures.GREEN, "^"),
    )
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
        row["base_error"] = geometric([r["curve"][0][2] for r in runs])
        row["steps"] = max(r["curve"][-1][0] for r in runs)
        row["error"] = geometric([r["curve"][-1][2] for r in runs])
        row["seconds"] = statistics.mean(r["curve"][-1][1] for r in runs)
        if all(rivals):
            ends = [rival["curve"][-1] for rival in rivals]
            fifths = [error_at(r["curve"], 1, end[1] / 5) for r, end in zip(runs, ends, strict=True)]
            equal = [error_at(r["curve"], 1, end[1]) for r, end in zip(runs, ends, strict=True)]
            reached = [seconds_to(r["curve"], end[2]) for r, end in zip(runs, ends, strict=True)]
            row["error_at_equal_seconds"] = geometric(equal)
            row["error_at_a_fifth_of_the_seconds"] = geometric(fifths)
            row["seconds_to_rival"] = None if None in reached else statistics.mean(reached)
            row["rival_seconds"] = statistics.mean(end[1] for end in ends)
        rows.append(row)
    return rows


def geometric(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def markdown_of(rows: list[dict]) -> str:
    """The same as a table in a README."""
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


def headline_of(rows: list[dict]) -> str:
    """The table of the README: the errors in % of some methods, a row for each family and target."""
    by_method = {(row["family"], row["target"], row["method"]): row for row in rows}
    lines = [
        "| | full fine-tuning, Adam | LoTRA by LM, a fifth of its seconds | the same, random start | LoTRA by LM "
        "| full fine-tuning, LM | LM, ends with a tenth of the parameters | seconds to full Adam's error "
        "| LoTRA by Adam | from scratch, Adam |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for family, target in dict.fromkeys((row["family"], row["target"]) for row in rows):
        found = {method: by_method.get((family, target, method)) for method in METHODS}
        adapter = found["lotra_lm"]
        if adapter is None or found[RIVAL] is None:
            continue
        errors = [
            found[RIVAL]["error"],
            *(found[x] and found[x].get("error_at_a_fifth_of_the_seconds") for x in ("lotra_lm", "lotra_random_lm")),
            *(found[name] and found[name]["error"] for name in ENDS),
        ]
        cells = ["-" if error is None else f"{100 * error:.2g}" for error in errors]
        reached = adapter.get("seconds_to_rival")
        seconds = "-" if reached is None else f"{reached:.1f} of {adapter['rival_seconds']:.0f}"
        lines.append(f"| {family}, {target} | {' | '.join([*cells[:6], seconds, *cells[6:]])} |")
    return "\n".join(lines) + "\n"


def draw_fields(family: Family, setting: Setting, cache: Path, path: Path) -> None:
    """Draw reference, base, adapted network and error for each target, of one run (seed 0)."""
    base = pretrained(family, setting, 0, cache)
    size = (10.5, 2.4 * len(family.targets) + 0.6)
    shared = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(len(family.targets), 4, figsize=size, **shared)
    low, label = (-1, "y") if family.name == "elliptic" else (0, "t")
    for row, (target, parameter) in zip(axes, family.targets.items(), strict=True):
        model, curve = train(METHODS["lotra_lm"], family, target, parameter, base, setting, 0)
        with torch.no_grad():
            fields = [family.reference(parameter), base(test_points()), model(test_points())]
        fields = [field.reshape(GRID, GRID) for field in fields]
        titles = (
            "reference",
            f"base, error {100 * curve[0][2]:.2g} %",
            f"LoTRA by LM, error {100 * curve[-1][2]:.2g} %",
            "LoTRA - reference",
        )
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title)
        bound = max(field.abs().max().item() for field in fields)
        meshes = [pictures.draw_field(ax, x, (-1, 1, low, 1), bound) for ax, x in zip(row, fields, strict=False)]
        pictures.field_bar(figure, meshes[0], row[:3])
        pictures.field_bar(figure, pictures.draw_field(row[3], fields[2] - fields[0], (-1, 1, low, 1)), row[3])
        row[0].set_ylabel(f"{target}: {family.parameter_name} = {parameter:g}\n{label}")
    for axis in axes[-1]:
        axis.set_xlabel("x")
    name = family.name.replace("_", "-").title()
    figure.suptitle(
        f"{name}, {family.title}: the base at {family.parameter_name} = {family.base:g} moves to three others\n"
        f"One run. {pictures.FIELD_LINES}"
    )
    figure.savefig(path)
    plt.close(figure)


def draw_curves(lines: list[dict], targets: list[str], methods: list[str], path: Path) -> None:
    """Draw the mean error over the seeds against seconds: a row for each family, or for two if the target is one."""
    families = [name for name in FAMILIES if any(line["family"] == name for line in lines)]
    panels = [[(family, target) for target in targets] for family in families]
    if len(targets) == 1 and len(panels) % 2 == 0:
        panels = [[*first, *second] for first, second in zip(panels[::2], panels[1::2], strict=True)]
    size = (4 * len(panels[0]), 3.2 * len(panels) + 1)
    figure, axes = plt.subplots(len(panels), len(panels[0]), figsize=size, squeeze=False, layout="constrained")
    for (family, target), ax in zip(sum(panels, []), axes.flat, strict=True):
        for method in methods:
            runs = [x for x in lines if (x["family"], x["target"], x["method"]) == (family, target, method)]
            if not runs:
                continue
            points = list(zip(*(x["curve"][1:] for x in runs), strict=False))  # ends with the shortest run
            seconds = [statistics.mean(s for _, s, _ in point) for point in points]
            errors = [100 * geometric([e for *_, e in point]) for point in points]
            style = LINES[method] | {"markevery": max(1, len(points) // 8)}
            ax.plot(seconds, errors, **style, label=METHODS[method].title)
        parameters = {x["parameter"] for x in lines if (x["family"], x["target"]) == (family, target)}
        title = f"{family.replace('_', '-')}: {FAMILIES[family].parameter_name} {FAMILIES[family].base:g} to "
        ax.set(xscale="log", yscale="log", title=title + ", ".join(f"{value:g}" for value in parameters))
    for row in axes:
        row[0].set_ylabel("relative L2 error, %")
    for ax in axes[-1]:
        ax.set_xlabel("CPU seconds")
    handles = {text: line for ax in axes.flat for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4 if len(methods) > 4 else 2)
    figure.suptitle(textwrap.fill(message_of(lines, targets), int(11 * size[0])))
    figure.savefig(path)
    plt.close(figure)


def message_of(lines: list[dict], targets: list[str]) -> str:
    """What the curves show: the share of the seconds in which the adapter has the rival's error."""
    rows = [row for row in summarize(lines) if row["method"] == "lotra_lm" and row["target"] in targets]
    shares = [row["seconds_to_rival"] / row["rival_seconds"] for row in rows if row.get("seconds_to_rival")]
    if not shares or len(shares) < len(rows):
        return "Error by time when a trained KAN moves to another parameter of its PDE"
    share = f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"
    return (
        f"LoTRA with Levenberg-Marquardt (LM) reaches the error of full fine-tuning with Adam in {share} % of the time"
    )


def report(lines: list[dict], output: Path, name: str) -> None:
    rows = summarize(lines)
    files.write(output / f"{name}.json", {"rows": rows, "runs": lines}, indent=None)
    files.write_page(output / f"{name}.md", f"{headline_of(rows)}\n{markdown_of(rows)}")
    draw(lines, output, name)


def draw(lines: list[dict], output: Path, name: str) -> None:
    """A picture of four methods on one target, and one of all."""
    targets = [target for target in ("near", "middle", "far") if any(x["target"] == target for x in lines)]
    draw_curves(lines, ["middle"] if "middle" in targets else targets[:1], MAIN, output / f"{name}.png")
    draw_curves(lines, targets, list(METHODS), output / f"{name}_all.png")


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="25 minutes on one core for each family",
        writes="FAMILY.json, .md, .png, _all.png and _fields.png; with --report transfer.*; runs in --cache",
        folder=command_line.RESULTS / "pde",
        quick="a tiny setting: to see it run",
        redraw=True,
    )
    parser.add_argument("--family", choices=list(FAMILIES), help="default: each, and the table of all")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and curves of all that was run")
    parser.add_argument("--fields", action="store_true", help="draw the fields of --family alone: three minutes")
    parser.add_seeds(1, 2, 3, 4, 5)  # rates were chosen on seed 0
    parser.add_choices("--targets", ["near", "middle", "far"])
    parser.add_choices("--methods", METHODS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained bases (default: %(default)s)")
    args = parser.parse_args()
    console = Console()
    setting = QUICK if args.quick else Setting()

    if args.redraw:
        draw(json.loads((args.output / "transfer.json").read_text())["runs"], args.output, "transfer")
        return
    if args.report:
        lines = [json.loads(path.read_text()) for path in sorted((args.cache / "runs").glob("*.json"))]
        order = [list(group) for group in (FAMILIES, ("near", "middle", "far"), METHODS)]
        lines = [x for x in lines if x["setting"] == setting.name]
        lines.sort(key=lambda x: [g.index(x[k]) for g, k in zip(order, ("family", "target", "method"), strict=True)])
        report(lines, args.output, "transfer")
        return
    families = list(FAMILIES.values()) if args.family is None else [FAMILIES[args.family]]
    found, suffix = [], "_quick" if args.quick else ""
    for family in families:
        fields = args.output / f"{family.name}{suffix}_fields.png"
        if not args.fields:
            jobs = list(product(args.seeds, args.targets, args.methods))
            lines = [
                run(method, family, target, setting, seed, args.cache)
                for seed, target, method in track(jobs, description=family.name, console=console)
            ]
            report(lines, args.output, f"{family.name}{suffix}")
            found += lines
        draw_fields(family, setting, args.cache, fields)
        console.print(f"written: {fields} and what is beside it")
    if found and args.family is None:
        report(found, args.output, f"transfer{suffix}")


if __name__ == "__main__":
    main()
