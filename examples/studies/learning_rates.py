# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One learning rate for every width and rank: LoTRA's components at rates of their own, beside one rate for all.

Shown in docs/training.md.

    python examples/studies/learning_rates.py  # widths 16 to 512, about half an hour on one core
    python examples/studies/learning_rates.py --sweep ranks  # ranks 2 to 16, four optimizers, three tasks: 90 minutes
    python examples/studies/learning_rates.py --quick  # a few seconds, for CI: says nothing about the rule
    python examples/studies/learning_rates.py --library efficient-kan  # or pykan: one task, widths 16 and 64

A random KAN of three layers [n, n, n, n] is adapted to a teacher, which is the same KAN with a rank-3 update of half
the size of its coefficients in each layer. A second task starts from a [2, n, n, 1] KAN that has learned one function
of two variables, and adapts it to another one; a third from a [64, n, 10] KAN that reads digits, and adapts it to 200
rotated and noisy ones. Every learning rate of a half-decade grid, for SGD of a finer one up to the rate at which it
diverges, is tried at each width n and rank, with policy "uniform" (one rate), "width" (factor_out and factor_in at
sqrt(16 / n)), and "grown" (factor_out at sqrt(n / 16), for SGD); "ranks" is "width" with the core at 16 / (r2 r3) and
factor_out at 4 / r1. The table has it also for ranks above 4 alone: "ranks above 4" is what Adam has in
`peft_lotra.create_lotra_optimizer`. Muon is torch's for the factors, which are matrices, and Adam for the core.
The result is the error after training, divided by the error of the base (1: nothing learned). Runs that the result
file has are not repeated.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import get_peft_model
from study_tools import files, together
from study_tools.pictures import STYLES
from study_tools.tables import table
from study_tools.tasks import build, rotated_digits, train
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, find_kan_layers
from peft_lotra.kan import KAN
from peft_lotra.layers.recognize import get_kan_spec


torch.set_num_threads(1)  # additional threads slow down such small matrices

RATES = [2e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SGD_RATES = [3e-2, 1e-1, 3e-1, 4e-1, 6e-1, 1.0, 3.0]
KEYS = ("task", "optimizer", "policy", "width", "rank", "lr")  # of a row of the results
# for each sweep: the steps, the rows of each, the seeds by width, and what is run: a task, an optimizer, its policies,
# ranks, widths and rates
SWEEPS = {
    "widths": {
        "steps": 300,
        "batch": 128,
        "seeds": {16: 3, 64: 3, 256: 3, 512: 1},
        "runs": [
            ("teacher", "Adam", ("uniform", "width"), (4,), (16, 64, 256, 512), RATES),
            ("teacher", "SGD", ("uniform", "grown"), (4,), (16, 64, 256), SGD_RATES),
            ("function", "Adam", ("uniform", "width"), (4,), (16, 64, 256), RATES),
        ],
    },
    "ranks": {
        "steps": 150,
        "batch": 32,
        "seeds": {16: 3, 64: 3, 256: 3, 512: 3},
        "runs": [  # at width 16 the policies of the widths are "uniform"
            (task, optimizer, policies, ranks, (width,), RATES[1:] + [1.0] * optimizer.startswith("SGD"))
            for width, optimizer, policies, ranks in (
                (16, "Adam", ("width", "ranks"), (2, 4, 8, 16)),
                (64, "Adam", ("uniform", "width", "ranks"), (2, 4, 16)),
                (64, "Adam", ("width", "ranks"), (8,)),
                (64, "SGD, momentum", ("uniform", "width", "grown"), (4,)),
                (64, "Muon", ("uniform", "width"), (4,)),
                (64, "AdamW", ("width",), (4,)),
                (16, "SGD, momentum", ("uniform",), (4,)),
                (16, "Muon", ("uniform", "width"), (4,)),
                (256, "Adam", ("width",), (2,)),
                (256, "Adam", ("uniform", "width"), (4,)),
                (256, "Adam", ("width", "ranks"), (8,)),
                (256, "Adam", ("uniform", "width", "ranks"), (16,)),
                (512, "Adam", ("uniform", "width"), (4,)),
                (512, "Adam", ("width", "ranks"), (16,)),
                (16, "AdamW", ("width",), (2, 4)),
                (64, "AdamW", ("width",), (2,)),
                (256, "AdamW", ("width",), (4,)),
                *((width, "AdamW", ("width", "ranks"), (16,)) for width in (16, 64)),
                *((width, "SGD, momentum", ("uniform",), (2, 16)) for width in (16, 64)),
                *((width, "Muon", ("uniform", "width", "ranks"), (2, 16)) for width in (16, 64)),
                (256, "SGD, momentum", ("uniform", "width", "grown"), (4,)),
                (256, "Muon", ("uniform", "width"), (4,)),
            )
            for task in ("teacher", "function", "digits")
        ],
    },
}


@dataclass
class Problem:
    """The task that a base model is adapted to; losses are divided by `scale`."""

    base: nn.Module
    x: Tensor  # (steps, batch, inputs)
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    scale: float


def make_problem(task: str, library: str, width: int, seed: int, steps: int, batch: int) -> Problem:
    torch.manual_seed(1000 * seed + width)
    loss: Callable = F.mse_loss
    if task == "digits":
        digits, loss = rotated_digits(seed, hidden=width), F.cross_entropy
        base = train(build(library, digits.widths), digits, digits.before, 300, 5e-3, tqdm(disable=True))
        rows = torch.randint(len(digits.after[0]), (steps, batch))
        (x, y), (x_test, y_test) = (part[rows] for part in digits.after), digits.test
    else:
        if task == "teacher":
            base = build(library, [width] * 4)
            target = make_teacher(base, rank=3, size=0.5)
        else:
            base, target = KAN([2, width, width, 1]), second_function
            pretrain(base, first_function)
        inputs = find_kan_layers(base)[0].shape[1]
        x, x_test = torch.rand(steps, batch, inputs) * 2 - 1, torch.rand(1024, inputs) * 2 - 1
        with torch.no_grad():
            y, y_test = torch.stack([target(rows) for rows in x]), target(x_test)
    with torch.no_grad():
        scale = loss(base(x_test), y_test).item()
    return Problem(base, x, y, x_test, y_test, loss, scale)


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


def groups_of(model: nn.Module, policy: str, lr: float) -> list[dict]:
    """A group with the rate of the policy for each component of each layer."""
    groups = []
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=lr, policy="uniform")
    for group in optimizer.param_groups:
        component = group["name"].partition("/")[0]
        for parameter in group["params"]:
            rate, size = lr, max(len(parameter), 16)
            if policy in ("width", "ranks") and component in ("factor_out", "factor_in"):
                rate *= math.sqrt(16 / size)
            if policy == "ranks" and component == "core":
                rate *= 16 / math.prod(parameter.shape[1:])
            if policy == "ranks" and component == "factor_out":
                rate *= 4 / parameter.shape[1]
            if policy == "grown" and component == "factor_out":
                rate *= math.sqrt(size / 16)
            groups.append({"params": [parameter], "lr": rate, "component": component})
    return groups


def optimizers_of(name: str, groups: list[dict]) -> list[torch.optim.Optimizer]:
    if name in ("Adam", "AdamW"):
        return [getattr(torch.optim, name)(groups, fused=True)]
    if name != "Muon":
        return [torch.optim.SGD(groups, momentum=0.9 if name == "SGD, momentum" else 0.0)]
    cores = [group for group in groups if group["component"] == "core"]
    factors = [group for group in groups if group["component"] != "core"]
    return [
        torch.optim.Adam(cores, fused=True),
        torch.optim.Muon(factors, adjust_lr_fn="match_rms_adamw", weight_decay=0.0),
    ]


def adapt(problem: Problem, optimizer: str, rank: int, runs: list[tuple[str, float]], seed: int) -> list[float]:
    """The errors on the test points of each policy and rate, trained at once; infinite if the training diverges."""
    models, groups = [], []
    for policy, lr in runs:
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(problem.base), LoTRAConfig(r=rank))
        models.append(model)
        groups += groups_of(model, policy, lr)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return tuple(part[step].expand(len(runs), *part.shape[1:]) for part in (problem.x, problem.y))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return problem.loss(outputs, y) / problem.scale

    optimizers = optimizers_of(optimizer, groups)
    losses = together.train(models, optimizers, batch, loss, len(problem.x), decay=False)
    with torch.no_grad():
        errors = [loss(model(problem.x_test), problem.y_test).item() for model in models]
    stays = (losses < 1e4).all(0).tolist()
    return [error if stay and math.isfinite(error) else math.inf for error, stay in zip(errors, stays, strict=True)]


def runs_of(setting: dict) -> list[tuple]:
    """task, optimizer, policy, width, rank, lr and seed of all runs; those trained at once are neighbors."""
    return [
        (task, optimizer, policy, width, rank, lr, seed)
        for task, optimizer, policies, ranks, widths, rates in setting["runs"]
        for width in widths
        for seed in range(setting["seeds"].get(width, 0))
        for rank in ranks
        for policy in policies
        if rank != 4 or policy != "ranks"  # which is "width" then
        for lr in rates
    ]


def sweep(setting: dict, losses: dict[tuple, float], save: Callable[[], None]) -> None:
    """Add the losses of the runs of the setting that are not there yet."""
    missing = [run for run in runs_of(setting) if run not in losses]
    bar, known = tqdm(total=len(missing), unit="run", ncols=100), {}
    for (task, optimizer, width, rank, seed), alike in groupby(missing, lambda run: (*run[:2], *run[3:5], run[6])):
        runs = list(alike)
        if (task, width, seed) not in known:
            known[task, width, seed] = make_problem(
                task, setting["library"], width, seed, setting["steps"], setting["batch"]
            )
        errors = adapt(known[task, width, seed], optimizer, rank, [(run[2], run[5]) for run in runs], seed)
        losses.update(zip(runs, errors, strict=True))
        save()
        bar.update(len(runs))


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def curves(rows: list[dict], task: str, optimizer: str, policy: str) -> dict[tuple[int, int], dict[float, float]]:
    """The mean loss over the seeds by width and rank, and lr."""
    result: dict[tuple[int, int], dict[float, float]] = {}
    for row in rows:
        if (row["task"], row["optimizer"], row["policy"]) == (task, optimizer, policy):
            result.setdefault((row["width"], row["rank"]), {})[row["lr"]] = mean(row["losses"])
    return result


def all_curves(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict[tuple[int, int], dict[float, float]]]]:
    """By task and optimizer, then by policy."""
    kinds = {(row["task"], row["optimizer"]): None for row in rows}
    policies = dict.fromkeys(row["policy"] for row in rows)
    found = {kind: {policy: curves(rows, *kind, policy) for policy in policies} for kind in kinds}
    for by_policy in found.values():
        width = by_policy.get("width", {})
        if by_policy.get("ranks"):  # at rank 4 the same as "width"
            by_policy["ranks"] |= {setting: losses for setting, losses in width.items() if setting[1] == 4}
            few = {setting: losses for setting, losses in width.items() if setting[1] <= 4}
            by_policy["ranks above 4"] = by_policy["ranks"] | few
    return {kind: {policy: found for policy, found in part.items() if found} for kind, part in found.items()}


def shared_rate(by_width: dict[tuple[int, int], dict[float, float]]) -> float:
    """The rate with the smallest worst case: the largest ratio, over the widths, of its loss to the best loss."""
    rates = set.intersection(*(set(losses) for losses in by_width.values()))
    return min(sorted(rates), key=lambda lr: max(losses[lr] / min(losses.values()) for losses in by_width.values()))


def as_text(rows: list[dict]) -> str:
    """A row for each task, optimizer and policy: how far one rate serves all widths and ranks, and what it costs."""
    lines = []
    for (task, optimizer), by_policy in all_curves(rows).items():
        for policy, found in by_policy.items():
            lr = shared_rate(found)
            best = {setting: min(losses, key=losses.get) for setting, losses in found.items()}
            of_own = [losses[lr] / losses[best[setting]] for setting, losses in found.items()]
            rates = f"{min(best.values()):g} to {max(best.values()):g}"
            geometric = math.exp(mean([math.log(ratio) for ratio in of_own]))
            cells = [
                task,
                optimizer,
                policy,
                rates,
                f"{lr:g}",
                f"{geometric:.2f}, {max(of_own):.2f}",
                str(len(found)),
            ]
            lines.append(cells)
    header = "| task | optimizer | policy | best rates | shared rate | its error / the policy's best: mean, worst "
    header += "| pairs of width and rank |"
    return table(header, lines, left=4)


def draw(rows: list[dict], path: Path) -> None:
    """Draw a row of panels per task and optimizer, a panel per policy, and a curve per width."""
    kinds = all_curves(rows)
    titles = {"teacher": "a rank-3 update of a [n, n, n, n] KAN", "function": "another function, a [2, n, n, 1] KAN"}
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(10, 3.4 * len(kinds) + 0.6), sharex="row", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ((task, optimizer), by_policy), row in zip(kinds.items(), axes, strict=True):
        everything = [
            loss for by_width in by_policy.values() for losses in by_width.values() for loss in losses.values()
        ]
        top = 3 * max(loss for loss in everything if loss < 3)  # where the runs are drawn that diverged
        for (policy, by_width), ax in zip(by_policy.items(), row, strict=True):
            colors = plt.colormaps["viridis"](torch.linspace(0, 0.85, len(by_width)).tolist())
            for color, style, ((width, _), losses) in zip(colors, STYLES, by_width.items(), strict=False):
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
        writes="learning_rates.json, .md and .png, with the name of another library added; learning_rates_ranks.*",
        folder=command_line.RESULTS,
        needs="test",
        quick="small widths and few steps: to see it run",
        redraw=True,
    )
    parser.add_argument("--sweep", default="widths", choices=SWEEPS, help="what to vary (default: %(default)s)")
    parser.add_argument("--library", default="peft-lotra", choices=("peft-lotra", "efficient-kan", "pykan"))
    args = parser.parse_args()

    setting = {"library": args.library, **SWEEPS[args.sweep]}
    if args.library != "peft-lotra":  # slower libraries; pykan is at least ten times slower
        runs = [("teacher", "Adam", ("uniform", "width"), (4,), (16, 64), RATES[2:6])]
        setting |= {"seeds": {16: 3, 64: 1}, "runs": runs}
    if args.quick:
        runs = [(*run[:3], run[3][:1], (16, 32), run[5][2:5]) for run in setting["runs"][:3]]
        setting |= {"steps": 40, "seeds": {16: 1, 32: 1}, "runs": runs}
    name = f"learning_rates{'_ranks' if args.sweep == 'ranks' else ''}"
    name += ("" if args.library == "peft-lotra" else f"_{args.library}") + "_quick" * args.quick
    path = args.output / f"{name}.json"
    fixed = {"library": args.library, "steps": setting["steps"], "batch": setting["batch"]}
    known, losses = files.read(path, must=args.redraw), {}
    if known and fixed.items() <= known["setting"].items():
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
        files.write(path, {"setting": fixed, "rows": finite})

    if not args.redraw:
        sweep(setting, losses, save)
    files.write_page(path, as_text(rows()))
    if args.sweep == "widths":
        draw(rows(), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
