# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Ten problems by `peft_lotra.pde.solve`: its own KAN beside a tanh MLP, by the same call and CPU seconds.

python examples/studies/pde/ten.py                            # 100 runs of 60 CPU s
python examples/studies/pde/ten.py --problems burgers --seeds 1 --seconds 20
python examples/studies/pde/ten.py --quick                    # tiny, to see it run

The problems of standard.py, a flow, a reaction with diffusion, and an equation of fourth order. None of them was used
for the choice of `solve`'s KAN (docs/pde.md says how that was made), though its points, weights and phases come from a
recipe that was made with five of them. The two networks of a problem and seed run one after the other, on one thread.
Runs that are in ten.json are not repeated.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import statistics
import time
from unittest.mock import patch

import torch
from problems.more import MORE
from problems.recipe import new_mlp
from problems.records import Record
from problems.standard import PROBLEMS, Problem
from rich.console import Console
from study_tools import machine
from torch import Tensor, nn

from peft_lotra.pde import solve


torch.set_num_threads(1)

TEN = PROBLEMS | MORE
NETWORKS = ("kan", "mlp")


def run(problem: Problem, network: str, seed: int, seconds: float) -> dict:
    """The error of one call."""
    problem.reference()  # outside of the seconds
    torch.manual_seed(seed)
    is_mlp, path = network == "mlp", (problem.start, problem.stop)

    def residual(model: nn.Module, x: Tensor, parameter: float = problem.stop) -> Tensor:
        return problem.residual(model, x, parameter)

    clock = time.process_time()
    with patch("time.monotonic", time.process_time):  # seconds of a busy machine are not the same for all runs
        result = solve(
            residual,
            problem.low,
            problem.high,
            distance=problem.distance,
            lift=problem.lift,
            outputs=problem.outputs,
            periodic=() if is_mlp else problem.features.periodic,
            terms=problem.terms(),
            continuation=path if problem.start != problem.stop else None,
            network=nn.Sequential(problem.features, new_mlp(problem)) if is_mlp else None,
            seconds=seconds,
            seed=seed,
            progress=False,
        )
    return {
        "seed": seed,
        "error": problem.error(result.model),
        "residual": result.residual,
        "seconds": time.process_time() - clock,
        "steps": len(result.history),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "phases": [[phase.name, phase.steps, phase.held, phase.reason] for phase in result.phases],
        "machine": machine.describe(),
    }


def _median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def markdown(record: dict) -> str:
    rows = {name: found for name, found in record["results"].items() if len(found) == len(NETWORKS)}
    if not rows:
        return ""
    medians = {name: [_median(found[n], "error") for n in NETWORKS] for name, found in rows.items()}
    ratios = [kan / mlp for kan, mlp in medians.values()]
    wins = sum(ratio < 1 for ratio in ratios)
    mean = statistics.geometric_mean(ratios)
    first = statistics.geometric_mean(found["kan"][0]["error"] / found["mlp"][0]["error"] for found in rows.values())
    said = f"the KAN has {mean:.2g} times the error of the MLP ({first:.2g} times on the first seed alone)"
    said = said if mean < 1 else f"the MLP is ahead: {said}"
    lines = [
        f"By `solve`, {said} in the geometric mean of {len(rows)} problems, and is better on {wins} of them. Relative "
        f"L2 errors after {record['recipe']['seconds']:g} CPU s on a busy machine, medians (worst); the better in "
        "bold.\n",
        "| problem | KAN | MLP | KAN / MLP | steps | parameters | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in rows.items():
        cells = []
        for n, median in zip(NETWORKS, medians[name], strict=True):
            text = f"**{median:.1e}**" if median == min(medians[name]) else f"{median:.1e}"
            cells.append(text + f" ({max(run['error'] for run in found[n]):.1e})" * (len(found[n]) > 1))
        steps, counts = (
            ", ".join(f"{_median(found[n], key):,.0f}" for n in NETWORKS) for key in ("steps", "parameters")
        )
        ratio = medians[name][0] / medians[name][1]
        seeds = min(len(found[n]) for n in NETWORKS)
        lines.append(f"| {TEN[name].title} | {' | '.join(cells)} | {ratio:.2g} | {steps} | {counts} | {seeds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="100 minutes on one core",
        writes="ten.json, ten.md",
        folder=command_line.RESULTS / "pde",
        quick="three seconds a run: to see it run",
    )
    parser.add_argument("--problems", nargs="+", choices=list(TEN), default=list(TEN))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    args = parser.parse_args()
    seconds = 3.0 if args.quick else args.seconds
    stem = args.output / ("ten_quick" if args.quick else "ten")
    record = Record(stem.with_suffix(".json"), {"recipe": {"seconds": seconds}, "results": {}})
    console = Console(width=110)
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for name in args.problems[-1:] if args.quick else args.problems:
            for network in args.networks:
                if not record.has(seed, "results", name, network):
                    found = run(TEN[name], network, seed, seconds)
                    record.add(found, "results", name, network)
                    console.print(
                        f"{name}, seed {seed}, {network}: error {found['error']:.2e}, {found['steps']} steps"
                    )
    stem.with_suffix(".md").write_text(markdown(record.read()))
    console.print(f"written: {stem}.json and .md")


if __name__ == "__main__":
    main()
