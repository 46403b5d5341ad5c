# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Functions by Slim KANs: a dense KAN beside a Slim KAN on twelve target functions.

Shown in docs/slim.md.

    python examples/studies/slim_functions.py  # about five minutes on one core
    python examples/studies/slim_functions.py --quick  # two functions, a few steps, for CI

The targets are those of the KAN literature (arXiv 2404.19756): special functions of two variables, the four-variable
toy, and dimensionless formulas from the Feynman equations, of 2 to 6 variables. All networks are [n, 32, 32, 1] and
get the same steps and batches. The error is the root mean square error on fresh points, divided by the standard
deviation of the target. Runs that the result file already contains are not repeated.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import special
from study_tools import files
from study_tools.pictures import BLUE
from study_tools.tables import table
from tqdm import tqdm

from peft_lotra import create_lotra_optimizer
from peft_lotra.kan import KAN, SlimKAN


torch.set_num_threads(1)  # additional threads slow down such small matrices

pi = math.pi

# name: variables, and the function of variables between -1 and 1
FUNCTIONS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "Bessel J_v(x)": (2, lambda v, x: special.jv(2 + 2 * v, 10 + 10 * x)),
    "Bessel I_v(x)": (2, lambda v, x: special.ive(1 + v, 3 + 2.9 * x)),
    "elliptic E(phi|m)": (2, lambda phi, m: special.ellipeinc(pi * phi, (m + 1) / 2)),
    "elliptic F(phi|m)": (2, lambda phi, m: special.ellipkinc(pi / 2 * phi, 0.45 * (m + 1))),
    "exp(sin(pi x) + y^2)": (2, lambda x, y: np.exp(np.sin(pi * x) + y**2)),
    "exp of sines, 4 variables": (
        4,
        lambda a, b, c, d: np.exp((np.sin(pi * (a**2 + b**2)) + np.sin(pi * (c**2 + d**2))) / 2),
    ),
    "I.6.2 normal density": (2, lambda t, s: np.exp(-((3 * t) ** 2) / (2 * (1 + 0.6 * s) ** 2)) / (1 + 0.6 * s)),
    "I.16.6 velocities": (2, lambda a, b: 0.9 * (a + b) / (1 + 0.81 * a * b)),
    "I.29.16 two waves": (3, lambda a, s, t: np.sqrt(1 + (1 + a) ** 2 - 2 * (1 + a) * np.cos(pi * (s - t)))),
    "I.50.26 anharmonic": (2, lambda t, a: np.cos(pi * t) + (a + 1) / 2 * np.cos(pi * t) ** 2),
    "II.6.15a dipole": (3, lambda a, b, c: (1.5 + c) * np.sqrt((a + 1) ** 2 + (b + 1) ** 2) / 4),
    "I.9.18 gravitation": (
        6,
        lambda a, b, c, d, e, f: (2 + a) / ((1.5 + 0.5 * b) ** 2 + (c - d) ** 2 + (e - f) ** 2),
    ),
}

KINDS = ("dense", "slim")
HIDDEN = 32
TRAIN, TEST, BATCH = 4096, 2048, 256
# The best of 3e-3, 5e-3, 1e-2 and 2e-2 (dense) and of 5e-3, 1e-2, 2e-2 and 3e-2 (slim) by the median over the twelve
# functions, on data and initializations of another seed (100). So were the ranks, of six ways
# to spend about as many parameters: few for the mode in, more for the modes out and basis.
LEARNING_RATES = {"dense": 1e-2, "slim": 2e-2}


def ranks(inputs: int) -> list:
    """Ranks of the layers. The last layer, of one output, stays dense: its factors would be larger."""
    return [(12, min(inputs, 4), 8), (20, 4, 5), None]


def make_data(name: str, seed: int) -> list[torch.Tensor]:
    """x, y, x_test, y_test; targets with mean 0 and variance 1 over the training points."""
    inputs, function = FUNCTIONS[name]
    x = np.random.default_rng(seed).uniform(-1, 1, (TRAIN + TEST, inputs))
    y = function(*x.T)
    y = (y - y[:TRAIN].mean()) / y[:TRAIN].std()
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y[:, None], dtype=torch.float32)
    return [x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]]


def run(name: str, kind: str, seed: int, steps: int) -> dict:
    """Train one network and return its error, its number of parameters and the seconds."""
    x, y, x_test, y_test = make_data(name, seed)
    torch.manual_seed(seed)
    inputs = x.shape[1]
    widths = [inputs, HIDDEN, HIDDEN, 1]
    if kind == "dense":
        model = KAN(widths)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATES["dense"])
    else:
        model = SlimKAN(widths, ranks(inputs))
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=LEARNING_RATES["slim"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(TRAIN, (BATCH,))
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        rmse = (model(x_test) - y_test).square().mean().sqrt().item()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "function": name,
        "variables": inputs,
        "model": kind,
        "seed": seed,
        "rmse": rmse,
        "parameters": parameters,
        "seconds": round(seconds, 2),
    }


def summarise(rows: list[dict]) -> dict[str, dict[str, tuple[float, int]]]:
    """The median error over the seeds and the number of parameters, by function and model."""
    table: dict[str, dict[str, tuple[float, int]]] = {}
    for row in rows:
        table.setdefault(row["function"], {}).setdefault(row["model"], []).append((row["rmse"], row["parameters"]))
    return {
        name: {kind: (median(e for e, _ in runs), runs[0][1]) for kind, runs in kinds.items()}
        for name, kinds in table.items()
    }


def as_text(summary: dict) -> str:
    """RMSE as a share of the target's standard deviation (median over the seeds), and parameters."""
    lines = [[name, *("{:.4f}, {:,}".format(*row[kind]) for kind in KINDS)] for name, row in summary.items()]
    fewer = [row["dense"][1] / row["slim"][1] for row in summary.values()]
    lines.append(["Slim / dense: medians, fewer parameters", f"{ratio_of_medians(summary):.2f}", ""])
    lines[-1][2] = f"{min(fewer):.1f} to {max(fewer):.1f} times"
    return table(f"| function | {' | '.join(KINDS)} |", lines)


def ratio_of_medians(summary: dict) -> float:
    dense, slim = (median(row[kind][0] for row in summary.values()) for kind in KINDS)
    return slim / dense


def draw(summary: dict, path: Path) -> None:
    """Draw the error of the Slim KAN as a multiple of the dense KAN's, a line for each function."""
    ratios = {name: row["slim"][0] / row["dense"][0] for name, row in summary.items()}
    names = sorted(ratios, key=ratios.__getitem__)
    figure, ax = plt.subplots(figsize=(6.4, 0.34 * len(names) + 1.6), layout="constrained")
    ax.plot([ratios[name] for name in names], range(len(names)), "o", color=BLUE, ms=7)
    ax.axvline(1, color="black", lw=1)
    ax.set_yticks(range(len(names)), [f"{name} ({summary[name]['dense'][0]:.1%})" for name in names])
    ax.set(xlabel="error of the Slim KAN / error of the dense KAN", ylabel="function (error of the dense KAN)")
    better = sum(ratio < 1 for ratio in ratios.values())
    figure.suptitle(
        f"The Slim KAN has {ratio_of_medians(summary):.2f} times the error of the dense KAN.\n"
        f"It is better on {better} of {len(names)} functions, left of the line."
    )
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="five minutes on one core",
        writes="slim_functions.json and .png; what is in the file is not run again",
        folder=command_line.RESULTS,
        quick="two functions and few steps: to see it run",
        redraw=True,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each network (default: %(default)s)")
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS), metavar="NAME")
    args = parser.parse_args()
    seeds, steps, functions = (1, 20, list(FUNCTIONS)[:2]) if args.quick else (args.seeds, 800, args.functions)
    path = files.path_of(args, "slim_functions")
    setting = {"steps": steps, "hidden": HIDDEN, "batch": BATCH, "learning_rates": LEARNING_RATES}

    known = files.read(path, must=args.redraw)
    rows = known["rows"] if known.get("setting") == setting else []
    done = {(row["function"], row["model"], row["seed"]) for row in rows}
    todo = [
        (function, kind, seed)
        for seed in range(seeds)
        for function in functions
        for kind in KINDS
        if (function, kind, seed) not in done and not args.redraw
    ]
    for function, kind, seed in tqdm(todo, unit="run"):
        rows.append(run(function, kind, seed, steps))
        files.write(path, {"setting": setting, "rows": rows})

    summary = summarise(rows)
    print(as_text(summary))
    draw(summary, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
