# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One learning rate for every width: LoTRA's components trained at rates of their own, beside one rate for all.

    python examples/studies/learning_rates.py  # widths 16 to 512, about half an hour on one core
    python examples/studies/learning_rates.py --quick  # a few seconds, for CI: says nothing about the rule
    python examples/studies/learning_rates.py --library efficient-kan  # or pykan: one task, widths 16 and 64

A random KAN of three layers [n, n, n, n] is adapted to a teacher, which is the same KAN with a rank-3 update of half
the size of its coefficients in each layer. Every learning rate of a half-decade grid, for SGD of a finer one up to the
rate at which it diverges, is tried at each width n, with policy "uniform" (one rate) and "width" (see
`peft_lotra.optim.create_lotra_optimizer`), by Adam and by SGD. For SGD "width" is a rule that lost to one rate, and is
not in the package: factor_out at sqrt(n / 16). The result is the error after 300 steps, divided by the error of the
base (1: nothing learned). Runs that the result file has are not repeated. A second task starts from a [2, n, n, 1] KAN
that has learned one function of two variables, and adapts it to another one.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from study_tools.pictures import STYLES
from study_tools.tasks import build
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig, find_kan_layers
from peft_lotra.kan import KAN
from peft_lotra.layers.registry import get_kan_spec
from peft_lotra.optim import create_lotra_optimizer


torch.set_num_threads(1)  # additional threads slow down such small matrices

POLICIES = ("uniform", "width")
OPTIMIZERS = {
    "Adam": (torch.optim.Adam, [2e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]),
    "SGD": (torch.optim.SGD, [3e-2, 1e-1, 3e-1, 4e-1, 6e-1, 1.0, 3.0]),
}
# the widest network by task and optimizer; a run of width 512 takes half a minute
TASKS = {"teacher": {"Adam": 512, "SGD": 256}, "function": {"Adam": 256}}
KEYS = ("task", "optimizer", "policy", "width", "lr")  # of a row of the results
RANKS = 4
BATCH = 128


@dataclass
class Problem:
    """The task that a base model is adapted to; losses are divided by `scale`."""

    base: nn.Module
    x: Tensor  # (steps, batch, inputs)
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    scale: float


def make_problem(task: str, library: str, width: int, seed: int, steps: int) -> Problem:
    torch.manual_seed(1000 * seed + width)
    if task == "teacher":
        base = build(library, [width] * 4)
        target = make_teacher(base, rank=3, size=0.5)
    else:
        base, target = KAN([2, width, width, 1]), second_function
        pretrain(base, first_function)
    inputs = find_kan_layers(base)[0].shape[1]
    x, x_test = torch.rand(steps, BATCH, inputs) * 2 - 1, torch.rand(1024, inputs) * 2 - 1
    with torch.no_grad():
        y, y_test = torch.stack([target(batch) for batch in x]), target(x_test)
        scale = (y_test - base(x_test)).square().mean().item()
    return Problem(base, x, y, x_test, y_test, scale)


@torch.no_grad()
def make_teacher(base: nn.Module, rank: int, size: float) -> nn.Module:
    """The KAN with an update of the given rank in each layer, `size` times as large as the layer's coefficients."""
    teacher = copy.deepcopy(base)
    for info in find_kan_layers(teacher):
        layer = teacher.get_submodule(info.name)
        coefficients = get_kan_spec(layer).locate(layer)
        tensor = coefficients.read(layer)
        factors = [torch.randn(length, rank) for length in tensor.shape]
        update = torch.einsum("abc,oa,ib,kc->oik", torch.randn(rank, rank, rank), *factors)
        update *= size * tensor.norm() / update.norm()
        for name, part in coefficients.split(update).items():
            layer.get_parameter(name).add_(part)
    return teacher


def first_function(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, :1] + x[:, 1:])


def second_function(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[:, :1]) * x[:, 1:].square() + torch.exp(-4 * (x[:, :1] - x[:, 1:]).square())


def pretrain(model: KAN, target: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.16 / model.layers[1].in_features)
    for _ in range(200):
        x = torch.rand(256, 2) * 2 - 1
        loss = (model(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adapt(problem: Problem, optimizer_name: str, policy: str, lr: float, seed: int) -> float:
    """The error on the test points after one step per batch; infinite if the training diverges."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(problem.base), LoTRAConfig(r=RANKS))
    if (optimizer_name, policy) == ("SGD", "width"):
        policy = {"factor_out": math.sqrt(max(problem.x.shape[-1], 16) / 16)}
    optimizer = create_lotra_optimizer(model, OPTIMIZERS[optimizer_name][0], lr=lr, policy=policy)
    for x, y in zip(problem.x, problem.y, strict=True):
        loss = (model(x) - y).square().mean() / problem.scale
        if not loss.item() < 1e4:
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = ((model(problem.x_test) - problem.y_test).square().mean() / problem.scale).item()
    return error if math.isfinite(error) else math.inf


def runs_of(setting: dict) -> list[tuple]:
    """task, optimizer, policy, width, lr and seed of all runs; the runs of a problem follow each other."""
    return [
        (task, name, policy, width, lr, seed)
        for task, optimizers in setting["tasks"].items()
        for width, seeds in setting["seeds"].items()
        for seed in range(seeds)
        for name, widest in optimizers.items()
        if width <= widest
        for policy in POLICIES
        for lr in setting["rates"][name]
    ]


def sweep(setting: dict, widest: int, losses: dict[tuple, float], save: Callable[[], None]) -> None:
    """Adds the losses of the runs of the setting, up to a width, that are not there yet."""
    problem, of = None, None
    missing = [run for run in runs_of(setting) if run not in losses]
    for task, name, policy, width, lr, seed in tqdm([run for run in missing if run[3] <= widest], unit="run"):
        run = (task, name, policy, width, lr, seed)
        if of != (task, width, seed):
            problem, of = make_problem(task, setting["library"], width, seed, setting["steps"]), (task, width, seed)
        losses[run] = adapt(problem, name, policy, lr, seed)
        save()


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def curves(rows: list[dict], task: str, optimizer: str, policy: str) -> dict[int, dict[float, float]]:
    """The mean loss over the seeds by width and lr."""
    result: dict[int, dict[float, float]] = {}
    for row in rows:
        if (row["task"], row["optimizer"], row["policy"]) == (task, optimizer, policy):
            result.setdefault(row["width"], {})[row["lr"]] = mean(row["losses"])
    return result


def shared_rate(by_width: dict[int, dict[float, float]]) -> float:
    """The rate with the smallest worst case: the largest ratio, over the widths, of its loss to the best loss."""
    rates = set.intersection(*(set(losses) for losses in by_width.values()))
    return min(sorted(rates), key=lambda lr: max(losses[lr] / min(losses.values()) for losses in by_width.values()))


def show_tables(console: Console, rows: list[dict]) -> None:
    for task, optimizer in dict.fromkeys((row["task"], row["optimizer"]) for row in rows):
        uniform = curves(rows, task, optimizer, "uniform")
        for policy in POLICIES:
            by_width = curves(rows, task, optimizer, policy)
            rates = sorted({lr for losses in by_width.values() for lr in losses})
            shared = shared_rate(by_width)
            table = Table(title=f'{task}, {optimizer}, policy "{policy}": loss by learning rate')
            for column in (
                "width",
                *(f"{lr:g}" for lr in rates),
                "best lr",
                f"at {shared:g} / best",
                "/ uniform best",
            ):
                table.add_column(column, justify="right")
            for width, losses in by_width.items():
                best = min(losses, key=losses.get)
                table.add_row(
                    str(width),
                    *(f"{losses[lr]:.2g}" if losses.get(lr, math.inf) < 100 else "-" for lr in rates),
                    f"{best:g}",
                    f"{losses[shared] / losses[best]:.2f}",
                    f"{losses[shared] / min(uniform[width].values()):.2f}",
                )
            console.print(table)


def draw(rows: list[dict], path: Path) -> None:
    """Draws a row of panels per task and optimizer, a panel per policy, and a curve per width."""
    kinds = list(dict.fromkeys((row["task"], row["optimizer"]) for row in rows))
    titles = {"teacher": "a rank-3 update of a [n, n, n, n] KAN", "function": "another function, a [2, n, n, 1] KAN"}
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(10, 3.4 * len(kinds) + 0.6), sharex="row", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (task, optimizer), row in zip(kinds, axes, strict=True):
        by_policy = {policy: curves(rows, task, optimizer, policy) for policy in POLICIES}
        everything = [
            loss for by_width in by_policy.values() for losses in by_width.values() for loss in losses.values()
        ]
        top = 3 * max(loss for loss in everything if loss < 3)  # where the runs are drawn that diverged
        for policy, ax in zip(POLICIES, row, strict=True):
            by_width = by_policy[policy]
            colors = plt.colormaps["viridis"](torch.linspace(0, 0.85, len(by_width)).tolist())
            for color, style, (width, losses) in zip(colors, STYLES, by_width.items(), strict=False):
                good = {lr: loss for lr, loss in sorted(losses.items()) if loss < 3}
                if not good:
                    continue
                worse = [lr for lr in sorted(losses) if lr > max(good)]
                best = min(losses, key=losses.get)
                look = style | {"color": color}
                ax.plot(good.keys(), good.values(), **look, label=f"n = {width}")
                ax.plot(best, losses[best], "*", color=color, ms=15, mec="white", zorder=3)
                if worse:
                    ax.plot([max(good), worse[0]], [good[max(good)], top], color=color, lw=0.8, ls=":")
                    ax.plot(worse[0], top, "x", color=color, ms=7, mew=1.5)
            lr = shared_rate(by_width)
            worst = max(losses[lr] / min(losses.values()) for losses in by_width.values())
            rule = "one rate for all components" if policy == "uniform" else "a rate for each component"
            ax.axvline(lr, color="gray", lw=1, ls=":")
            ax.set(xscale="log", yscale="log", xlabel=f"learning rate of {optimizer}")
            share = "the best error" if worst == 1 else f"at most {worst:.3g} times the best error"
            ax.set_title(f'{rule} (policy "{policy}"):\n{lr:g} has {share} of each width')
            rates = sorted({lr for losses in by_width.values() for lr in losses})
            ticks = [
                lr for lr in rates if round(lr / 10 ** math.floor(math.log10(lr) + 1e-9)) in (1, 3) or lr == rates[0]
            ]
            ax.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
            ax.set_xticks([], minor=True)
            ax.legend()  # where it covers least
        row[0].set_ylabel(f"{titles[task]}:\nerror after training / error of the base", fontsize=9)
    figure.suptitle("Stars: the best rate at each width; crosses at the top: training diverges in one of the seeds.")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="half an hour on one core; a quarter of an hour for another library",
        writes="learning_rates.json and .png, with the name of another library added",
        folder=command_line.RESULTS,
        needs="test",
        quick="small widths and few steps: to see it run",
        redraw=True,
    )
    parser.add_argument("--library", default="peft-lotra", choices=("peft-lotra", "efficient-kan", "pykan"))
    parser.add_argument("--widest", type=int, default=512, help="run no wider networks (default: %(default)s)")
    args = parser.parse_args()

    setting = {
        "library": args.library,
        "tasks": TASKS,
        "steps": 300,
        "seeds": {16: 3, 64: 3, 256: 3, 512: 1},
        "rates": {name: rates for name, (_, rates) in OPTIMIZERS.items()},
    }
    if args.library != "peft-lotra":  # slower libraries; pykan is at least ten times slower
        setting |= {"tasks": {"teacher": {"Adam": 64}}, "seeds": {16: 3, 64: 1}}
        setting["rates"] = {"Adam": OPTIMIZERS["Adam"][1][2:6]}
    if args.quick:
        setting |= {"steps": 40, "seeds": {16: 1, 32: 1}}
        setting["rates"] = {name: rates[2:5] for name, (_, rates) in OPTIMIZERS.items()}
    name = "learning_rates" + ("" if args.library == "peft-lotra" else f"_{args.library}") + "_quick" * args.quick
    path = args.output / f"{name}.json"
    fixed = {"library": args.library, "steps": setting["steps"], "ranks": RANKS, "batch": BATCH}
    known = json.loads(path.read_text()) if path.exists() else {"setting": {}, "rows": []}
    losses = {}
    if fixed.items() <= known["setting"].items():
        for row in known["rows"]:
            for seed, loss in enumerate(row["losses"]):
                losses[(*(row[key] for key in KEYS), seed)] = math.inf if loss is None else loss

    def rows() -> list[dict]:
        """Those of the setting, then what else the file has."""
        found: dict[tuple, list[float]] = {}
        for run in dict.fromkeys([*runs_of(setting), *losses]):
            if run in losses:
                found.setdefault(run[:-1], []).append(losses[run])
        return [dict(zip(KEYS, key, strict=True), losses=values) for key, values in found.items()]

    def save() -> None:
        finite = [{**row, "losses": [x if x < math.inf else None for x in row["losses"]]} for row in rows()]
        path.write_text(json.dumps({"setting": setting | fixed, "rows": finite}, indent=1) + "\n")

    if not args.redraw:
        sweep(setting, args.widest, losses, save)
    show_tables(Console(), rows())
    draw(rows(), path.with_suffix(".png"))
    print(f"written: {path} and .png")


if __name__ == "__main__":
    main()
