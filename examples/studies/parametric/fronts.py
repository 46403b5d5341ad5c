# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A front that moves, by families of few members and by POD of exact solutions.

Shown in docs/parametric.md.

    python examples/studies/parametric/fronts.py --seeds 0
    python examples/studies/parametric/fronts.py --quick                # for CI: says nothing

u_t + c u_x = 0 on [-1, 1] x [0, 1] has the solution tanh((x + 0.5 - c t) / 0.06), for speeds c from 0.2 to 1. POD
interpolates the coefficients of its modes by cubic splines. `projected` is the best that any method on these modes can
do. `shifted` moves the snapshots by the speed before, which is known here: it is then the same field for all c.
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from study_tools import files, machine, tables
from torch import Tensor, nn

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


torch.set_num_threads(1)

LOW, HIGH, BASE, WIDTH = 0.2, 1.0, 0.6, 0.06
X, T = torch.linspace(-1, 1, 129, dtype=torch.float64), torch.linspace(0, 1, 65, dtype=torch.float64)
GRID = torch.cartesian_prod(X, T)


def exact(x: Tensor, c: float) -> Tensor:
    return torch.tanh((x[:, :1] + 0.5 - c * x[:, 1:]) / WIDTH)


def equation(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    _, (u_x, u_t), _ = jet(model, x)
    return u_t + c * u_x


def known(model: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    return model(x) - u


def terms_of(c: float, points: int, seed: int) -> list[tuple]:
    """The equation, and the values at t = 0 and at x = -1, which do not depend on c."""
    draw = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(points, dtype=torch.float64)
    x = torch.stack([2 * draw[:, 0] - 1, draw[:, 1]], dim=1)
    few = x[: points // 5]
    start = torch.stack([few[:, 0], torch.zeros_like(few[:, 0])], dim=1)
    inflow = torch.stack([-torch.ones_like(few[:, 1]), few[:, 1]], dim=1)[::4]
    return [
        (equation, (x, torch.full_like(x[:, :1], c))),
        (known, (start, exact(start, 0.0)), 10.0),
        (known, (inflow, -torch.ones_like(inflow[:, :1])), 10.0),
    ]


def error(field: Tensor | np.ndarray, c: float) -> float:
    """The relative L2 error of values on the grid."""
    field = torch.as_tensor(field).detach().reshape(-1, 1)
    return ((field - exact(GRID, c)).norm() / exact(GRID, c).norm()).item()


def pretrained(points: int, seed: int, steps: int) -> KAN:
    torch.manual_seed(seed)
    base = KAN([2, 10, 10, 1], 8, dtype=torch.float64)
    LevenbergMarquardt(base, floor=1e-6).fit(terms_of(BASE, points, seed), steps, progress=False)
    return base


def pod(speeds: np.ndarray, snapshots: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fields (unseen, places) by interpolated coefficients, and by projection of the solutions on the modes."""
    modes = np.linalg.svd(snapshots, full_matrices=False)[2]
    truth = np.stack([exact(GRID, c).numpy().ravel() for c in unseen])
    return CubicSpline(speeds, snapshots @ modes.T)(unseen) @ modes, truth @ modes.T @ modes


def shifted(speeds: np.ndarray, unseen: np.ndarray) -> list[np.ndarray]:
    """Snapshots in the frame of the front, averaged over the speeds, and moved to the unseen speed."""
    frame = np.linspace(-2, 2, 513)
    mean = np.zeros_like(frame)
    for c in speeds:
        field = exact(GRID, c).numpy().reshape(len(X), len(T))
        mean += np.mean([np.interp(frame + c * t, X, field[:, i]) for i, t in enumerate(T.numpy())], 0) / len(speeds)
    return [np.interp(GRID[:, 0] - c * GRID[:, 1], frame, mean) for c in unseen]


def run(base: KAN, members: int, points: int, seed: int, unseen: np.ndarray) -> dict:
    speeds = np.linspace(LOW, HIGH, members)
    family = ParametricAdapter(base, partial(terms_of, points=points, seed=seed))
    start = time.process_time()
    report = family.fit(speeds.tolist(), progress=False)
    seconds = time.process_time() - start
    own = np.stack([family.predict(c)(GRID).detach().numpy().ravel() for c in speeds])
    truth = np.stack([exact(GRID, c).numpy().ravel() for c in speeds])
    fields: dict[str, Any] = dict(zip(("POD, exact", "POD, projected"), pod(speeds, truth, unseen), strict=True))
    fields["POD, members"] = pod(speeds, own, unseen)[0]
    fields["POD, shifted"] = shifted(speeds, unseen)
    fields["predicted"] = [family.predict(c)(GRID) for c in unseen]
    fields["one step"] = [family.refine(c)(GRID) for c in unseen]
    errors = {name: [error(f, c) for f, c in zip(values, unseen, strict=True)] for name, values in fields.items()}
    return {
        "seed": seed,
        "members": members,
        "seconds": seconds,
        "steps": [member.steps for member in report],
        "failed": {str(c): text for c, text in report.failed.items()},
        "of members": [error(values, c) for values, c in zip(own, speeds, strict=True)],
        "medians": {name: statistics.median(values) for name, values in errors.items()},
        "worst": {name: max(values) for name, values in errors.items()},
    }


def table(results: list[dict], describe: str) -> str:
    names = list(results[0]["medians"])
    lines = []
    for result in sorted(results, key=lambda r: (r["members"], r["seed"])):
        cells = [f"{result['medians'][name]:.1e}, {result['worst'][name]:.1e}" for name in names]
        of = result["of members"]
        first = [f"{result['members']}, {result['seed']}", f"{result['seconds']:.0f}"]
        lines.append([*first, f"{min(of):.1e} to {max(of):.1e}", *cells])
    text = tables.table(f"| members, seed | CPU s | members, least to largest | {' | '.join(names)} |", lines)
    title = "Relative L2 errors at 20 unseen speeds (median, worst), and of the members themselves."
    return f"{title}\n\n{text}\nMachine: {describe.rpartition(', load ')[0]}, shared with others.\n"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="about three minutes of one core for each seed",
        writes="fronts.json, fronts.md",
        folder=command_line.RESULTS / "parametric",
        quick="a tiny setting, to see that it runs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    points, steps, count = (100, 3, 2) if args.quick else (2000, 60, 20)
    path = files.path_of(args, "fronts")
    results, describe = [], machine.describe()
    for seed in args.seeds[:1] if args.quick else args.seeds:
        unseen = np.sort(np.random.default_rng(seed).uniform(LOW, HIGH, count))
        base = pretrained(points * 5 // 4, seed, steps)
        for members in (5, 9):
            results.append(run(base, members, points, seed, unseen) | {"base": error(base(GRID), BASE)})
            files.write(path, {"machine": describe, "results": results})
            files.write_page(path, table(results, describe))


if __name__ == "__main__":
    main()
