# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Accuracy by the bytes of a stored update: full fine-tuning at 32 to 2 bits, beside LoTRA at 32, 16 and 8.

Shown in docs/when.md.

    python examples/studies/bytes.py  # 15 minutes on one core, no network; goes on where it was stopped
    python examples/studies/bytes.py --quick  # a few seconds, for CI: says nothing
    python examples/studies/bytes.py --redraw  # the table and the picture from bytes.json

Three pairs of the benchmark and Burgers' equation (problems/pairs.py). Full fine-tuning trains all coefficients; its
update is then rounded to 32, 8, 4, 3 or 2 bits for each coefficient. LoTRA takes 60 of these steps, keeps 2 to 30 % of
the coefficients by `extract_lotra` in the metric of the data, and trains on; (full, full, 1) starts from the gradient,
and has one learned shape for each layer. The components are stored in 32, 16 (`LoTRAConfig(storage="float16")`) or 8
bits.

Below 16 bits the rounding is uniform. Each output of a layer, or column of a factor, has one scale in float16, which
minimizes its squared error. Bytes are those of a safetensors file, with its header. All methods take 300 steps, five
seeds; validation data choose the learning rate before anything is rounded. Writes bytes.json, .md and .png.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pairs  # of the benchmark
import safetensors.torch
import torch
from peft import get_peft_model
from problems.pairs import Pair, burgers
from study_tools import files, together
from study_tools.pictures import BLUE, GREEN, RED, SKY
from study_tools.tables import table
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, extract_lotra, start_from_gradient
from peft_lotra.kan import KAN


class Case(NamedTuple):
    make: Callable[[int, int], Pair]
    labels: int
    unit: str


TASKS = {
    "digits 0-4 to 5-9": Case(pairs.digits, 50, "accuracy %"),
    "one more household": Case(pairs.household, 168, "explained variance %"),
    "characters, prose to code": Case(pairs.characters, 1000, "accuracy %"),
    "Burgers, viscosity 0.1 to 0.05": Case(burgers, 500, "digits: -log10 of the relative error"),
}
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WARM_STEPS = 60
FULL, ONE_SHAPE = "full fine-tuning", "(full, full, 1)"
LOTRA = {f"LoTRA, {budget:.0%}": budget for budget in (0.02, 0.05, 0.1, 0.2, 0.3)}
BITS = {FULL: (32, 8, 4, 3, 2), **dict.fromkeys((*LOTRA, ONE_SHAPE), (32, 16, 8))}
Trained = tuple[nn.Module, torch.optim.Optimizer]
Adam = partial(torch.optim.Adam, fused=True)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def full(base: nn.Module, lr: float) -> Trained:
    return base, Adam(base.parameters(), lr=lr)


def make_bases(splits: dict[int, Pair], steps: int) -> dict[int, nn.Module]:
    """Return the networks that know the old task, by seed."""
    made, rows = {}, []
    for seed, pair in splits.items():
        torch.manual_seed(seed)
        made[seed] = KAN(pair.widths)
        rows.append(together.draw(pair.old, 2 * steps))
    models, old, pair = list(made.values()), [pair.old for pair in splits.values()], splits[min(splits)]
    optimizer = Adam([{"params": list(model.parameters())} for model in models], lr=5e-3)
    together.train(models, [optimizer], together.batches(old, rows), pair.loss, 2 * steps, call=pair.start)
    return made


def chosen(row: dict) -> str:
    """Return the rate with the best mean over the seeds on the validation data; a run that diverged is the worst."""
    means = {lr: np.mean([*scores["validation"].values()]) for lr, scores in row["rates"].items()}
    return max(means, key=lambda lr: np.nan_to_num(means[lr], nan=-np.inf))


def train(trained: list[Trained], splits: list[Pair], steps: int, decay: bool = True) -> None:
    """Train networks of one architecture at once, each on its own split."""
    groups = [group for _, optimizer in trained for group in optimizer.param_groups]
    data = [split.labeled for split in splits]
    torch.manual_seed(0)
    rows = [together.draw(labeled, steps) for labeled in data]
    batches, loss = together.batches(data, rows), splits[0].loss
    models = [model for model, _ in trained]
    together.train(models, [torch.optim.Adam(groups)], batches, loss, steps, decay, splits[0].outputs)


def prepare(method: str, base: nn.Module, warm: nn.Module, split: Pair, lr: float) -> Trained:
    """Return the network and the optimizer of a method; `warm` took the first steps of full fine-tuning."""
    base = copy.deepcopy(base)
    if method == FULL:
        return full(base, lr)
    if method == ONE_SHAPE:
        model = get_peft_model(base, LoTRAConfig())
        x, y = split.labeled
        start_from_gradient(model, lambda: split.loss(split.outputs(model, x), y))
        return model, create_lotra_optimizer(model, Adam, lr=lr)
    model = extract_lotra(base, warm, budget=int(LOTRA[method] * count(base)), inputs=split.labeled[0])
    components = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # the rate of a component is relative to its size
    groups = [{"params": [part], "lr": lr * part.detach().square().mean().sqrt().item()} for part in components]
    return model, Adam(groups)


def round_rows(rows: Tensor, bits: int) -> tuple[Tensor, int]:
    """Round each row to 2^bits multiples of its scale; return the rows, and how many scales there are."""
    if bits >= 16:
        return rows.to(torch.float16 if bits == 16 else torch.float32).float(), 0
    half = 2 ** (bits - 1)
    largest = rows.abs().amax(1, keepdim=True)
    best, least = torch.zeros_like(rows), rows.square().sum(1, keepdim=True)
    for share in torch.linspace(0.2, 1.2, 51).tolist():
        for sign in (1, -1):  # there is one more level below zero than above, times the scale
            scale = (sign * share * largest / half).half().float()
            rounded = torch.where(scale == 0, 0.0, (rows / scale).round().clamp(-half, half - 1)) * scale
            error = (rounded - rows).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best, len(rows)


@torch.no_grad()
def store(model: nn.Module, base: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """Round what was trained; return the network that a file gives back, and the bytes of the file."""
    model, start, content, scales = copy.deepcopy(model), dict(base.named_parameters()), {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            before = start.get(name, torch.zeros_like(parameter))
            update = parameter - before
            rounded, more = round_rows(update.T if "factor" in name else update.flatten(1), bits)
            parameter.copy_(before + (rounded.T if "factor" in name else rounded.view_as(update)))
            codes = torch.zeros(math.ceil(update.numel() * bits / 8), dtype=torch.uint8)
            content[name.removesuffix(".default")] = codes
            scales += more
    if scales:
        content["scales"] = torch.zeros(scales, dtype=torch.float16)
    return model, len(safetensors.torch.save(content, {"format": "pt"}))


def run_task(task: str, seeds: int, steps: int, rates: int, rows: dict[str, Any], save: Callable[[], None]) -> None:
    """Add the scores of the methods that a task lacks, and save after each."""
    splits = {seed: TASKS[task].make(seed, TASKS[task].labels) for seed in range(seeds)}
    bases = make_bases(splits, steps)
    warm = copy.deepcopy(bases)
    first = [full(model, 1e-2) for model in warm.values()]
    train(first, [*splits.values()], WARM_STEPS, decay=False)
    rows["base"] = {str(seed): split.score(bases[seed], "test") for seed, split in splits.items()}
    for method in tqdm(BITS, task, ncols=100):
        if method in rows:
            continue
        runs = [(seed, lr) for lr in RATES[: 5 if method == FULL else 4][-rates:] for seed in splits]
        try:
            trained = [prepare(method, bases[seed], warm[seed], splits[seed], lr) for seed, lr in runs]
        except ValueError:  # one rank of each layer needs more parameters
            rows[method] = {}
            continue
        alike: dict[tuple, list[int]] = {}
        for place, (model, _) in enumerate(trained):
            alike.setdefault(tuple(parameter.shape for parameter in model.parameters()), []).append(place)
        for places in alike.values():
            of_runs = [splits[runs[place][0]] for place in places]
            train([trained[place] for place in places], of_runs, steps - WARM_STEPS * (method in LOTRA))
        row: dict[str, Any] = {"parameters": int(np.median([count(model) for model, _ in trained])), "rates": {}}
        for (seed, lr), (model, _) in zip(runs, trained, strict=True):
            scores = row["rates"].setdefault(f"{lr:g}", {"validation": {}, "test": {}, "bytes": {}})
            scores["validation"][str(seed)] = splits[seed].score(model, "validation")
            for bits in BITS[method]:
                kept, size = store(model, bases[seed], bits)
                scores["test"].setdefault(str(bits), {})[str(seed)] = splits[seed].score(kept, "test")
                scores["bytes"].setdefault(str(bits), {})[str(seed)] = size
        rows[method] = row
        save()


class Point(NamedTuple):  # medians of the bytes, and of the scores of all seeds
    method: str
    bits: int
    size: float
    score: float
    scores: list[float]


def points(rows: dict[str, Any]) -> tuple[list[Point], list[Point]]:
    """All points of a task, and those on the front: better than no update, and than all points of fewer bytes."""
    measured, best, highest = [], [], np.median([*rows["base"].values()])
    for method in (method for method in BITS if rows.get(method)):
        row = rows[method]["rates"][chosen(rows[method])]
        for bits, of_seeds in row["test"].items():
            size, scores = np.median([*row["bytes"][bits].values()]), [*of_seeds.values()]
            measured.append(Point(method, int(bits), float(size), float(np.median(scores)), scores))
    for point in sorted(measured, key=lambda point: (point.size, -point.score)):
        if point.score > highest:
            best, highest = [*best, point], point.score
    return measured, best


def as_text(results: dict[str, dict]) -> str:
    """The tables in Markdown."""
    lines = []
    for task, rows in results.items():
        digits, (measured, best) = 2 if task.startswith("Burgers") else 1, points(rows)
        unit, base = TASKS[task].unit, np.median([*rows["base"].values()])
        lines += [f"### {task}, {TASKS[task].labels} labels", "", f"Without an update: {base:.{digits}f}.", ""]
        cells_of_rows = []
        for point in measured:
            seeds = " ".join(f"{score:.{digits}f}" for score in point.scores)
            cells = [point.method, f"{rows[point.method]['parameters']:,}", point.bits, f"{point.size:,.0f}"]
            cells += [f"{point.score:.{digits}f}", seeds, "yes" if point in best else ""]
            cells_of_rows.append(cells)
        lines.append(table(f"| | parameters | bits | bytes | {unit} | seeds | on the front |", cells_of_rows))
    return "\n".join(lines)


def draw(results: dict[str, dict], path: Path) -> None:
    """One panel for each task: the score by bytes, and the front of the best."""
    figure, axes = plt.subplots(2, 2, figsize=(6.2, 6.8))
    styles = [("full update: 32 to 2 bits", RED, "s", [FULL], BITS[FULL])]
    for bits, color in ((32, SKY), (16, BLUE), (8, "black")):
        styles.append((f"LoTRA, {bits} bits: 2 to 30 %", color, "o", [*LOTRA], (bits,)))
    styles.append(("(full, full, 1): 32 to 8 bits", GREEN, "^", [ONE_SHAPE], BITS[ONE_SHAPE]))
    for axis, (task, rows) in zip(axes.flat, results.items(), strict=False):
        (measured, best), base = points(rows), np.median([*rows["base"].values()])
        sizes, scores = (sorted(point[place] for point in measured) for place in (2, 3))
        steps = [(sizes[0], math.nan), *((point.size, point.score) for point in best)]  # from the left to the right
        x, y = zip(*steps, (sizes[-1], steps[-1][1]), strict=True)
        axis.step(x, y, where="post", color="#F0E442", lw=7, zorder=0, label="best update for its size")
        for label, color, marker, methods, bits in styles:
            line = [point for point in measured if point.method in methods and point.bits in bits]
            places = [(point.size, point.score) for point in line]
            axis.semilogx(*zip(*places, strict=True), color=color, marker=marker, label=label, ms=4.5, lw=1.2)
            for point, place in zip(line, places, strict=True) if color == RED else ():
                axis.annotate(point.bits, place, (0, -13), textcoords="offset points", ha="center", color=RED)
        room = 0.12 * (scores[-1] - scores[0])
        axis.axhline(base, color="gray", ls=":", lw=1.2, label="no update")
        title = f"{task.split(',')[0]}, {TASKS[task].labels} labels\nno update: {base:.3g}"
        axis.set_xticks([1e3, 3e3, 1e4, 3e4, 1e5], ["1 kB", "3", "10", "30", "100 kB"])
        axis.set_xticks([], minor=True)
        y_range = scores[0] - 2 * room, scores[-1] + room
        axis.set(title=title, xlim=(0.8 * sizes[0], 1.3 * sizes[-1]), ylim=y_range, xlabel="size of the file")
        axis.set_ylabel("digits of the solution" if task.startswith("Burgers") else TASKS[task].unit)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle("Score by size of the file")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="15 minutes on one core",
        writes="bytes.json, .md and .png; with --quick bytes_quick.*",
        folder=command_line.RESULTS,
        quick="two tasks, one seed, one rate: to see it run",
        redraw=True,
    )
    args = parser.parse_args()
    tasks, (seeds, steps, rates) = [*TASKS][: 2 if args.quick else 4], (1, 61, 1) if args.quick else (5, 300, 5)
    path = files.path_of(args, "bytes")
    results = files.read(path, args.quick, args.redraw).get("results", {})
    for task in () if args.redraw else tasks:
        rows = results.setdefault(task, {})
        if not BITS.keys() <= rows.keys():
            run_task(task, seeds, steps, rates, rows, lambda: files.write(path, {"steps": steps, "results": results}))
    files.write_page(path, as_text(results))
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
