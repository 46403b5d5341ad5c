# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0
"""Training steps of PINNs by jets: 2000 points, [2, 16, 16, 1], float32, forward, backward and Adam, medians of 20.

Shown in docs/benchmarks.md.

By grid size, the Laplacian alone and value and Laplacian together, of a KAN as it is and compiled, beside nested
autograd; and other libraries' layers of 8 functions (Gaussians, Chebyshev polynomials, splines of even and uneven
knots), whose closed forms take value and Laplacian.

    python examples/studies/pde/jet_speed.py  # some minutes, most of them the compiler's
"""

from __future__ import annotations

from shared import command_line  # isort: split


import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from study_tools import files
from study_tools.tables import table
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet, laplacian


GRIDS = (5, 20)
WIDTHS = (2, 16, 16, 1)
FUNCTIONS = 8  # of an edge of the other libraries' layers: as many as of a KAN on 5 intervals
BOTH, ALONE = "value and Laplacian", "Laplacian alone"


class _RadialBasisFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.linspace(-2, 2, FUNCTIONS), requires_grad=False)
        self.denominator = 4 / (FUNCTIONS - 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(((x[..., None] - self.grid) / self.denominator) ** 2))


class FastKANLayer(nn.Module):
    """The layer of fast-kan, which is not on PyPI: Gaussians of the normalized input, and a linear layer of silu."""

    def __init__(self, n_in: int, n_out: int, use_layernorm: bool) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(n_in) if use_layernorm else None
        self.rbf = _RadialBasisFunction()
        self.spline_linear = nn.Linear(n_in * FUNCTIONS, n_out, bias=False)
        self.base_activation = F.silu
        self.base_linear = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        normalized = x if self.layernorm is None else self.layernorm(x)
        return self.spline_linear(self.rbf(normalized).flatten(-2)) + self.base_linear(self.base_activation(x))


class ChebyKANLayer(nn.Module):
    """The layer of ChebyKAN, which is not on PyPI: Chebyshev polynomials of tanh."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.cheby_coeffs = nn.Parameter(torch.randn(n_in, n_out, FUNCTIONS) / (n_in * FUNCTIONS))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.acos(torch.tanh(x)).unsqueeze(-1) * torch.arange(FUNCTIONS)
        return torch.einsum("bid,iod->bo", torch.cos(angle), self.cheby_coeffs)


def chain(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    return nn.Sequential(*(layer(n_in, n_out) for n_in, n_out in zip(WIDTHS, WIDTHS[1:], strict=False)))


def others() -> dict[str, nn.Module]:
    found = {
        "FastKAN": chain(lambda n_in, n_out: FastKANLayer(n_in, n_out, use_layernorm=True)),
        "FastKAN without LayerNorm": chain(lambda n_in, n_out: FastKANLayer(n_in, n_out, use_layernorm=False)),
        "ChebyKAN": chain(ChebyKANLayer),
    }
    try:
        from qkan.kan import KAN as EfficientKAN

        found["efficient-kan"] = EfficientKAN(list(WIDTHS))
        found["efficient-kan, uneven knots"] = EfficientKAN(list(WIDTHS))
        for layer in found["efficient-kan, uneven knots"].layers:
            layer.grid.add_(0.05 * torch.sin(3 * layer.grid))
    except ImportError:
        pass
    return found


def nested(model: nn.Module, x: Tensor) -> Tensor:
    """The Laplacian by differentiating a graph twice."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    columns = gradient.unbind(-1)
    return sum(torch.autograd.grad(c.sum(), x, create_graph=True)[0][:, i] for i, c in enumerate(columns))


def value_and_laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """Their sum, as of a PDE with a reaction term."""
    u, _, second = jet(model, x, collapse=True)
    return u + second


class Step:
    """A training step of a function of a model and points; returns milliseconds of CPU time."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
        self.function, self.model, self.x = function, model, x
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def __call__(self) -> float:
        started = time.process_time()
        self.optimizer.zero_grad()
        self.function(self.model, self.x).square().mean().backward()
        self.optimizer.step()
        return 1000 * (time.process_time() - started)


def measure(threads: int, compiled: bool, repetitions: int) -> dict[str, float]:
    """Medians in milliseconds of CPU time. The subjects take turns of three steps, of which the last counts: those
    before bring its memory into the caches, as in a training."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.rand(2000, 2) * 2 - 1
    steps = {}
    for grid in GRIDS:
        for name, function in ((BOTH, value_and_laplacian), (ALONE, laplacian)):
            steps[f"{name}, grid {grid}"] = Step(function, KAN(WIDTHS, grid_size=grid), x)
            if compiled:
                run = torch.compile(function, dynamic=False)
                steps[f"{name}, grid {grid}, compiled"] = Step(run, KAN(WIDTHS, grid_size=grid), x)
    steps[f"{ALONE}, grid {GRIDS[0]}, nested autograd"] = Step(nested, KAN(WIDTHS), x)
    if not compiled:
        for name, model in others().items():
            steps[f"{BOTH}, {name}"] = Step(value_and_laplacian, model, x)
            if name == "efficient-kan":
                steps[f"{ALONE}, {name}, nested autograd"] = Step(nested, model, x)
    rounds = [{name: [step() for _ in range(3)][-1] for name, step in steps.items()} for _ in range(repetitions + 1)]
    del rounds[0]  # which compiles
    return {name: statistics.median(line[name] for line in rounds) for name in steps}


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="some minutes, most of them the compiler's",
        writes="jet_speed.json",
        folder=command_line.RESULTS / "pde",
        needs="test",
        quick="few repetitions, without the compiler: to see it run",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    results, lines = [], []
    # compiled last, since the compiler slows down each later call of a Python function in the process
    for compiled in (False,) if args.quick else (False, True):
        for threads in args.threads:
            medians = measure(threads, compiled, repetitions=2 if args.quick else 20)
            results.append({"threads": threads, "milliseconds": medians})
            for name, value in medians.items():
                subject, _, rest = name.partition(", ")
                grid = rest.split(",")[0] if rest.startswith("grid") else f"grid {GRIDS[0]}"
                lines.append([name, threads, f"{value:.1f}", f"{value / medians[f'{subject}, {grid}']:.2f}"])
    print(table("| training step | threads | CPU ms | / KAN |", lines))
    files.write(files.path_of(args, "jet_speed"), {"rows": results})


if __name__ == "__main__":
    main()
