# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""A family of adapters on one base: trained at five parameters, served in one batch, interpolated at a sixth.

    python examples/studies/pde/family.py  # two minutes of one core
    python examples/studies/pde/family.py --quick  # for CI

Burgers' equation. Each adapter is trained by Levenberg-Marquardt, started from that of the parameter before it, and
saved: a file of a few kilobytes. Then one batch contains rows of all five (`adapter_names`). For a viscosity between
two of the five, the adapters of these two are averaged: by `add_weighted_adapter` ("cat": the exact sum of the
updates), and by averaging their components. The results are the errors of the averages and of both neighbors.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import PeftModel, get_peft_model
from problems.families import FAMILIES, GRID, test_points
from problems.methods import CACHE, QUICK, Setting, large_config, pretrained
from rich.console import Console
from study_tools import files
from study_tools.pictures import STYLES
from torch import Tensor

from peft_lotra.optim import LevenbergMarquardt


torch.set_num_threads(1)

FAMILY = FAMILIES["burgers"]
VALUES = {"nu_090": 0.09, "nu_080": 0.08, "nu_070": 0.07, "nu_060": 0.06, "nu_050": 0.05}
BETWEEN = ("nu_070", "nu_060", 0.065)


def relative(output: Tensor, solution: Tensor) -> float:
    return ((output - solution).norm() / solution.norm()).item()


def train_family(base: torch.nn.Module, setting: Setting, folder: Path, console: Console) -> None:
    """Saves one adapter for each value; each starts from the adapter of the value before."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), large_config(setting))
    for name, value in VALUES.items():
        terms = FAMILY.terms(value, torch.Generator().manual_seed(1), setting.points)
        history = LevenbergMarquardt(model, floor=1e-6).fit(terms, setting.lm_steps)
        model.save_pretrained(folder / name)
        size = (folder / name / "adapter_model.safetensors").stat().st_size
        console.print(f"{name}: loss {history[-1].loss:.1e}, {size / 1000:.1f} kB in float64")


def load_family(base: torch.nn.Module, folder: Path) -> PeftModel:
    first, *others = VALUES
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


def serve(model: PeftModel, points: Tensor) -> dict[str, Tensor]:
    """The solutions for all values, from one batch in which each row names its adapter."""
    names = [name for name in VALUES for _ in range(len(points))]
    with torch.no_grad():
        output = model(points.repeat(len(VALUES), 1), adapter_names=names)
    return dict(zip(VALUES, output.split(len(points)), strict=True))


def average_components(model: PeftModel, first: str, second: str, share: float) -> None:
    """Adds the adapter "between", whose components are the means of those of two adapters."""
    model.add_adapter("between", copy.deepcopy(model.peft_config[first]))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".between"):
                ends = (parameters[name.removesuffix("between") + other] for other in (first, second))
                parameter.copy_(torch.lerp(*ends, share))


def draw(
    outputs: dict[str, Tensor], errors: dict[str, float], solution: Tensor, fields: dict[str, Tensor], path: Path
) -> None:
    """Draws the final solutions of the batch (left), and those for the viscosity between two others (right)."""
    line = test_points()[:, 0].reshape(GRID, GRID)[:, -1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    colors = plt.cm.viridis(torch.linspace(0, 0.9, len(VALUES)).numpy())
    for color, (name, value) in zip(colors, VALUES.items(), strict=True):
        reference = FAMILY.reference(value).reshape(GRID, GRID)[:, -1]
        left.plot(line, outputs[name].reshape(GRID, GRID)[:, -1], color=color, label=f"{value:g}: {errors[name]:.1e}")
        left.plot(line[::4], reference[::4], ".", color=color)
    left.set(title="Burgers, t = 1: five adapters of one base in one batch (dots: reference)", xlabel="x")
    left.set_ylabel("u")
    left.legend(title="viscosity: relative error")
    first, second, value = BETWEEN
    titles = {
        first: f"the adapter for {VALUES[first]:g}",
        second: f"the adapter for {VALUES[second]:g}",
        "sum": "both updates, each by half (add_weighted_adapter)",
        "between": "components halfway",
    }
    for (name, title), style in zip(titles.items(), STYLES, strict=False):
        distance = (fields[name] - solution).reshape(GRID, GRID).square().mean(1).sqrt().clamp(min=1e-5)
        label = f"{title}: {relative(fields[name], solution):.1e}"
        right.semilogy(line, distance, **style | {"markersize": 4, "markevery": 5}, label=label)
    right.set(title=f"Viscosity {value:g}: no adapter was trained for it, the sum of two serves it", xlabel="x")
    right.set_ylabel("root mean square error over time")
    right.legend(title="relative error", loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two minutes on one core",
        writes="family.json and .png; bases in --cache",
        folder=command_line.RESULTS / "pde",
        quick="a tiny setting: to see it run",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained bases (default: %(default)s)")
    args = parser.parse_args()
    console = Console()
    setting = QUICK if args.quick else Setting()
    base = pretrained(FAMILY, setting, 0, args.cache)
    points = test_points()

    with tempfile.TemporaryDirectory() as folder:
        train_family(base, setting, Path(folder), console)
        model = load_family(base, Path(folder))
    outputs = serve(model, points)
    errors = {name: relative(outputs[name], FAMILY.reference(value)) for name, value in VALUES.items()}

    first, second, value = BETWEEN
    share = (value - VALUES[first]) / (VALUES[second] - VALUES[first])
    solution = FAMILY.reference(value)
    model.add_weighted_adapter([first, second], [1 - share, share], "sum", combination_type="cat")
    average_components(model, first, second, share)
    between, fields = {}, {}
    with torch.no_grad():
        for name in (first, second, "sum", "between"):
            model.set_adapter(name)
            fields[name] = model(points)
            between[name] = relative(fields[name], solution)
    between["base"] = relative(base(points).detach(), solution)
    for name, error in errors.items():
        console.print(f"{name}, served in one batch: error {100 * error:.3f} %")
    console.print(
        f"nu = {value}, no adapter trained: " + ", ".join(f"{n} {100 * e:.3f} %" for n, e in between.items())
    )

    name = "family_quick" if args.quick else "family"
    files.write(args.output / f"{name}.json", {"served": errors, f"at {value}": between})
    draw(outputs, errors, solution, fields, args.output / f"{name}.png")
    console.print(f"written: {args.output / name}.json and .png")


if __name__ == "__main__":
    main()
