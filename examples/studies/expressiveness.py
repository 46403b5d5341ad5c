# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Expressiveness: how well Tucker tensors of few ranks approximate the updates of full fine-tuning, beside a bound.

Shown in docs/paper.md.

    python examples/studies/expressiveness.py  # five minutes on one core, no network
    python examples/studies/expressiveness.py --data-dir PATH/TO/mnist  # one more task: digits to MNIST at 8x8
    python examples/studies/expressiveness.py --redraw

The bound is that of the HOSVD: the squared error of the best approximation of ranks (r, r, r) is at most the sum, over
the three modes, of the squared singular values of the unfolding beyond the r-th. Beside it are the measured error of
HOOI, and that of the function: the root mean square of the difference that the approximation makes to the outputs on
test data, as a share of what the update makes. The controls have the norm of the update in each layer: normal random
numbers, and cubic polynomials of the basis index with random coefficients, which are as smooth as an update may be.
One task has targets that an update of ranks (2, 2, 2) made: full fine-tuning, and LoTRA of ranks 2 to 8, train on
them three times as long, and what is left of the update and of its function says whether they find it.
AdamW fine-tunes the networks, Levenberg-Marquardt those of the two PDEs. Runs that expressiveness.json has are
not repeated. Writes expressiveness.json, .md and .png.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import get_peft_model
from problems.families import FAMILIES, test_points
from study_tools import files, together
from study_tools.pictures import BLUE, GRAY, GREEN, ORANGE
from study_tools.tables import table
from study_tools.tasks import Task, build, diabetes, digits_to_mnist, function_family, rotated_digits, train
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.compress.spectra import spectrum_of
from peft_lotra.compress.updates import coefficient_updates
from peft_lotra.kan import KAN
from peft_lotra.layers.recognize import get_kan_spec
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.tucker import cap_ranks, tucker


torch.set_num_threads(1)  # additional threads slow down such small matrices

RANKS = (2, 4, 8, 16)
Deltas = dict[str, Tensor]  # an update (out, in, basis) by layer


Found = tuple[nn.Module, nn.Module, Tensor]  # the base, the fine-tuned network, test inputs


def of_data(make: Callable[[int], Task], seed: int, steps: int, bar: tqdm) -> Found:
    task = make(seed)
    torch.manual_seed(seed)
    base = train(build("peft-lotra", task.widths), task, task.before, 2 * steps, 5e-3, bar)
    tuned = train(copy.deepcopy(base), task, task.after, steps, 1e-2, bar)
    return base.double(), tuned.double(), task.test[0].double()


def planted(seed: int, steps: int, bar: tqdm) -> tuple[Task, nn.Module, Deltas]:
    """The function family's base, and an update of ranks (2, 2, 2) of all layers that makes the targets."""
    task = function_family(seed)
    torch.manual_seed(seed)
    base = train(build("peft-lotra", task.widths), task, task.before, 2 * steps, 5e-3, bar)
    moved = copy.deepcopy(base)
    for parameter in moved.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    updates = coefficient_updates(base, moved).items()
    deltas = {name: tucker(found.tensor, cap_ranks(2, found.tensor.shape)).dense() for name, found in updates}
    task.after, task.test = ((x, output(base, deltas, x)) for x, _ in (task.after, task.test))
    return task, base, deltas


def of_known_rank(seed: int, steps: int, bar: tqdm) -> Found:
    task, base, _ = planted(seed, steps, bar)
    tuned = train(copy.deepcopy(base), task, task.after, steps, 1e-2, bar)
    return base.double(), tuned.double(), task.test[0].double()


def recovered(seed: int, steps: int, bar: tqdm) -> dict[str, dict[str, float]]:
    """What is left of the planted update and of its function, by rank of the adapter; 0 for full fine-tuning."""
    task, base, deltas = planted(seed, steps, bar)
    x, y = task.test
    total, changed = sum(delta.square().sum() for delta in deltas.values()), (y - output(base, {}, x)).norm()
    rows = {}
    for r in (0, 2, 4, 8):
        torch.manual_seed(seed)
        tuned = copy.deepcopy(base)
        if r:
            model = get_peft_model(tuned, LoTRAConfig(r=r))
            start_from_gradient(model, lambda m=model: task.loss(m(task.after[0]), task.after[1]))
            optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
            draws = together.draw(task.after, 3 * steps)
            together.train([model], [optimizer], together.batches([task.after], [draws]), task.loss, 3 * steps)
            tuned = model.merge_and_unload()
        else:
            train(tuned, task, task.after, 3 * steps, 1e-2, bar)
        left = {name: deltas[name] - found.tensor for name, found in coefficient_updates(base, tuned).items()}
        rows[str(r)] = {
            "tensor": (sum(part.square().sum() for part in left.values()) / total).sqrt().item(),
            "function": ((output(tuned, {}, x) - y).norm() / changed).item(),
        }
    return rows


def of_pde(name: str, seed: int, steps: int, bar: tqdm) -> Found:
    """A PDE at the family's first parameter, then at the middle one, by Levenberg-Marquardt."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    networks, generator = [KAN([2, 16, 16, 1], dtype=torch.float64)], torch.Generator().manual_seed(seed)
    for parameter, count in ((family.base, steps // 10), (family.targets["middle"], steps // 15)):
        networks.append(copy.deepcopy(networks[-1]))
        terms = family.terms(parameter, generator, 1500)
        LevenbergMarquardt(networks[-1], floor=1e-6).fit(terms, count, progress=False)
        bar.update(count)
    return networks[1], networks[2], test_points()


def random_like(deltas: Deltas) -> Deltas:
    return {name: scaled(torch.randn_like(delta), delta) for name, delta in deltas.items()}


def smooth_like(deltas: Deltas) -> Deltas:
    """A cubic polynomial of the basis index for each edge; the residual weight, the last slice, is random."""
    found = {}
    for name, delta in deltas.items():
        powers = torch.linspace(-1, 1, delta.shape[2] - 1).to(delta)[None].pow(torch.arange(4)[:, None])
        curves = torch.randn(*delta.shape[:2], 4).to(delta) @ powers
        found[name] = scaled(torch.cat([curves, torch.randn(*delta.shape[:2], 1).to(delta)], 2), delta)
    return found


def scaled(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor * (like.norm() / tensor.norm())


@torch.no_grad()
def output(base: nn.Module, deltas: Deltas, x: Tensor) -> Tensor:
    """The output of the base with these updates."""
    model = copy.deepcopy(base)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        for path, part in get_kan_spec(layer).locate(layer).split(delta).items():
            layer.get_parameter(path).add_(part)
    return model(x)


def errors(base: nn.Module, deltas: Deltas, x: Tensor) -> dict[str, dict[str, float]]:
    """By rank: the bound, and the measured errors of tensor and function, as shares of the update's."""
    total = sum(delta.square().sum() for delta in deltas.values())
    changed, before = output(base, deltas, x), output(base, {}, x)
    rows = {}
    for r in RANKS:
        near = {name: tucker(delta, cap_ranks(r, delta.shape)).dense() for name, delta in deltas.items()}
        values = [mode for delta in deltas.values() for mode in spectrum_of(delta).singular_values]
        rows[str(r)] = {
            "bound": (sum(mode[r:].square().sum() for mode in values) / total).sqrt().item(),
            "tensor": (sum((deltas[name] - near[name]).square().sum() for name in deltas) / total).sqrt().item(),
            "function": ((output(base, near, x) - changed).norm() / (changed - before).norm()).item(),
        }
    return rows


def as_text(results: dict, recoveries: list[dict]) -> str:
    head = [f"| {name}: bound | tensor | function " for name in ("update", "random", "smooth random")]
    lines = []
    for task, kinds in results.items():
        for r in map(str, RANKS):
            cells = [mean(runs, r, key) for runs in kinds.values() for key in ("bound", "tensor", "function")]
            lines.append([task, r, *(f"{cell:.2f}" for cell in cells)])
    text = table(f"| task | rank {''.join(head)}|", lines)
    lines = []
    for r in recoveries[0] if recoveries else ():
        cells = [f"{mean(recoveries, r, key):.2g}" for key in ("tensor", "function")]
        lines.append([f"LoTRA, rank {r}" if r != "0" else "all coefficients", *cells])
    return f"{text}\n{table('| trained on the planted update | tensor | function |', lines)}"


def mean(runs: list[dict], rank: str, key: str) -> float:
    return float(np.mean([run[rank][key] for run in runs]))


def draw(results: dict, path: Path) -> None:
    """By task: the bound and the errors of tensor and function over the rank, of the update and the smooth control."""
    figure, grid = plt.subplots(2, 4, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    for axis in grid.flat[len(results) :]:
        axis.remove()
    for axis, (task, kinds) in zip(grid.flat, results.items(), strict=False):
        for kind, key, color, style, label in (
            ("update", "bound", GRAY, "--", "update: bound"),
            ("update", "tensor", BLUE, "-o", "update: tensor"),
            ("update", "function", GREEN, "-^", "update: function"),
            ("smooth random", "tensor", ORANGE, ":s", "smooth random: tensor"),
            ("smooth random", "function", "black", ":X", "smooth random: function"),
        ):
            axis.plot(RANKS, [mean(kinds[kind], str(r), key) for r in RANKS], style, color=color, label=label)
        axis.set(title=task, ylim=(0, 1.85), xlabel="rank of all modes")
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, RANKS)
        axis.tick_params(labelbottom=True)
    for axis in grid[:, 0]:
        axis.set_ylabel("relative error")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        "Error of an update of full fine-tuning, truncated to Tucker ranks (r, r, r)\n"
    )  # off the panels' titles
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="five minutes on one core",
        writes="expressiveness.json, .md and .png; with --quick expressiveness_quick.*",
        folder=command_line.RESULTS,
        quick="one seed, 20 steps: to see it run",
        redraw=True,
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, for one more task")
    args = parser.parse_args()
    path = files.path_of(args, "expressiveness")
    seeds, steps = (1, 20) if args.quick else (args.seeds, 300)
    tasks: dict[str, Callable[..., Found]] = {"digits, rotated": partial(of_data, rotated_digits)}
    if args.data_dir is not None:
        tasks["digits to MNIST"] = partial(of_data, partial(digits_to_mnist, folder=args.data_dir))
    tasks["function family"] = partial(of_data, function_family)
    tasks["diabetes, older patients"] = partial(of_data, diabetes)
    tasks["function, update of rank 2 planted"] = of_known_rank
    tasks |= {f"PDE: {name}": partial(of_pde, name) for name in ("elliptic", "burgers")}
    known = files.read(path, args.quick, args.redraw)
    results, recoveries = known.get("results", {}), known.get("recovered", [])
    bar = tqdm(unit="step", ncols=100)

    def save() -> None:
        setting = {"seeds": seeds, "steps": steps}
        files.write(path, {"setting": setting, "results": results, "recovered": recoveries})

    for seed in () if args.redraw else range(seeds):
        if len(recoveries) <= seed:
            recoveries.append(recovered(seed, steps, bar))
            save()
        for name, task in tasks.items():
            runs = results.setdefault(name, {"update": [], "random": [], "smooth random": []})
            if len(runs["update"]) > seed:
                continue
            base, tuned, x = task(seed, steps, bar)
            update = {layer: found.tensor.double() for layer, found in coefficient_updates(base, tuned).items()}
            kinds = {"update": update, "random": random_like(update), "smooth random": smooth_like(update)}
            for kind, deltas in kinds.items():
                runs[kind].append(errors(base, deltas, x))
            save()
    bar.close()
    files.write_page(path, as_text(results, recoveries))
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
