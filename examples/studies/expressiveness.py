# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Expressiveness: how well Tucker tensors of few ranks approximate the updates of full fine-tuning, beside a bound.

    python examples/studies/expressiveness.py  # two minutes on one core, no network

The bound is that of the HOSVD: the squared error of the best approximation of ranks (r, r, r) is at most the sum, over
the three modes, of the squared singular values of the unfolding beyond the r-th. Beside it are the measured error of
HOOI, and that of the function: the root mean square of the difference that the approximation makes to the outputs on
test data, as a share of what the update makes. The controls have the norm of the update in each layer: normal random
numbers, and cubic polynomials of the basis index with random coefficients, which are as smooth as an update may be.
Writes expressiveness.json and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json

import numpy as np
import torch
from study_tools import machine
from study_tools.tasks import build, diabetes, function_family, rotated_digits, train
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra.compress.spectra import spectrum_of
from peft_lotra.compress.updates import coefficient_updates
from peft_lotra.layers.registry import get_kan_spec
from peft_lotra.tucker import cap_ranks, tucker


torch.set_num_threads(1)  # additional threads slow down such small matrices

RANKS = (2, 4, 8, 16)
Deltas = dict[str, Tensor]  # an update (out, in, basis) by layer


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


def as_text(results: dict) -> str:
    head = [f"| {name}: bound | tensor | function " for name in ("update", "random", "smooth random")]
    lines = [f"| task | rank {''.join(head)}|", f"|---|--:{'|--:' * 9}|"]
    for task, kinds in results.items():
        for r in map(str, RANKS):
            cells = [np.mean([run[r][key] for run in runs]) for runs in kinds.values() for key in runs[0][r]]
            lines.append(f"| {task} | {r} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two minutes on one core",
        writes="expressiveness.json and .md; with --quick expressiveness_quick.*",
        folder=command_line.RESULTS,
        quick="one seed, 20 steps: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many runs are averaged (default: 3)")
    args = parser.parse_args()
    seeds, steps = (1, 20) if args.quick else (args.seeds, 300)
    results: dict[str, dict[str, list]] = {}
    tasks = (rotated_digits, function_family, diabetes)
    bar = tqdm(total=seeds * len(tasks) * 3 * steps, unit="step", ncols=100)
    for seed in range(seeds):
        for make in tasks:
            task = make(seed)
            torch.manual_seed(seed)
            base = train(build("peft-lotra", task.widths), task, task.before, 2 * steps, 5e-3, bar).double()
            tuned = train(copy.deepcopy(base).float(), task, task.after, steps, 1e-2, bar).double()
            update = {name: found.tensor.double() for name, found in coefficient_updates(base, tuned).items()}
            kinds = {"update": update, "random": random_like(update), "smooth random": smooth_like(update)}
            rows = results.setdefault(task.name, {})
            for kind, deltas in kinds.items():
                rows.setdefault(kind, []).append(errors(base, deltas, task.test[0].double()))
    bar.close()
    path = args.output / f"expressiveness{'_quick' if args.quick else ''}.json"
    setting = {"seeds": seeds, "steps": steps, "machine": machine.describe()}
    path.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_text(results))
    print(as_text(results))


if __name__ == "__main__":
    main()
