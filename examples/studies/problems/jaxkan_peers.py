# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""jaxKAN (extra `peers`) on the standard problems: its residuals, layers and settings, for so many CPU seconds.

The settings are those of its tutorial on physics-informed KANs: [2, 6, 6, 1], Adam at 1e-3, 4,096 Sobol points in the
whole domain, 64 on each side, the conditions as terms of weight 1; Chebyshev layers of degree 5 with its start
"glorot_fine", or cubic spline layers of 5 intervals with theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable


# before jax is imported: one thread, as ours
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jaxkan.models.KAN import KAN  # noqa: E402
from jaxkan.pikan.pde import get_ac_res, get_burgers_res, get_helmholtz_res  # noqa: E402
from jaxkan.pikan.sampling import get_collocs_sobol  # noqa: E402

from problems.standard import PROBLEMS, Problem  # noqa: E402


LAYERS = {
    "chebyshev": {"D": 5, "flavor": "exact", "residual": None, "external_weights": False}
    | {"init_scheme": {"type": "glorot_fine"}, "add_bias": True},
    "spline": {"k": 3, "G": 5, "init_scheme": {"type": "glorot"}},
}
RESIDUALS = {"burgers": get_burgers_res, "allen_cahn": get_ac_res, "helmholtz": get_helmholtz_res}
EPOCHS = 5000
_EVERY = 50  # epochs between two looks at the clock


def _sides(name: str, seed: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Points on the sides where values are given, and the values; its order of coordinates is (t, x) or (x, y)."""
    if name == "helmholtz":
        ranges = [((-1, -1), (-1, 1)), ((1, 1), (-1, 1)), ((-1, 1), (-1, -1)), ((-1, 1), (1, 1))]
        points = jnp.concatenate([get_collocs_sobol(ranges=list(one), total_points=64, seed=seed) for one in ranges])
        return points, jnp.zeros((len(points), 1))
    ranges = [((0, 0), (-1, 1)), ((0, 1), (-1, -1)), ((0, 1), (1, 1))]
    start, *walls = (get_collocs_sobol(ranges=list(one), total_points=64, seed=seed) for one in ranges)
    x = start[:, 1:]
    values = -jnp.sin(jnp.pi * x) if name == "burgers" else x**2 * jnp.cos(jnp.pi * x)
    on_wall = 0.0 if name == "burgers" else -1.0
    return jnp.concatenate([start, *walls]), jnp.concatenate([values, jnp.full((128, 1), on_wall)])


def train(
    name: str, kind: str, seed: int, seconds: float, report: Callable[[str], None], epochs: float = float("inf")
) -> dict:
    """Train for so many CPU seconds, without those of compilation, or so many epochs; return a record."""
    problem: Problem = PROBLEMS[name]
    model = KAN([2, 6, 6, 1], kind, LAYERS[kind], seed=seed)
    first = (-1, 1) if name == "helmholtz" else (0, 1)
    inner = get_collocs_sobol(ranges=[first, (-1, 1)], total_points=4096, seed=seed)
    edge, values = _sides(name, seed)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    equation = RESIDUALS[name]()

    @nnx.jit
    def step(model: KAN, optimizer: nnx.Optimizer, inner, edge, values):
        def loss_of(model: KAN):
            return jnp.mean(equation(model, inner) ** 2) + jnp.mean((model(edge) - values) ** 2)

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    x, t = (np.linspace(low, high, count) for low, high, count in _test_axes(problem))
    grid = np.stack(np.meshgrid(x, t, indexing="ij"), -1).reshape(-1, 2)
    grid = jnp.asarray(grid if name == "helmholtz" else grid[:, ::-1])
    reference = problem.solve(problem.resolution, problem.stop).reshape(-1, 1)

    def error() -> float:
        return float(np.linalg.norm(np.asarray(model(grid)) - reference) / np.linalg.norm(reference))

    clock = time.process_time()
    step(model, optimizer, inner, edge, values).block_until_ready()
    compilation, spent, done, curve = time.process_time() - clock, 0.0, 1, []
    while spent < seconds and done < epochs:
        clock = time.process_time()
        for _ in range(_EVERY):
            loss = step(model, optimizer, inner, edge, values)
        loss.block_until_ready()
        spent, done = spent + time.process_time() - clock, done + _EVERY
        if not curve or spent > 1.3 * curve[-1][0]:
            curve.append((spent, done, error()))
    curve.append((spent, done, error()))
    report(f"jaxKAN {kind}, {name}, seed {seed}: error {curve[-1][2]:.2e} after {done} epochs, {spent:.0f} CPU s")
    return {"seed": seed, "error": curve[-1][2], "seconds": spent, "compilation": compilation, "steps": done} | {
        "curve": curve
    }


def _test_axes(problem: Problem) -> list[tuple[float, float, int]]:
    low = -problem.high[0] if problem.half else problem.low[0]
    return [(low, problem.high[0], 256), (problem.low[1], problem.high[1], 101)]
