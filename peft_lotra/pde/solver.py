# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One call from the equation to the solution: network, points, steps, knots, finer grids, and when to stop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kan.knots import KnotMap
from ..kan.layer import KANLinear, SplineLayer
from ..kan.network import LayerStack, pairs
from ..kan.refinement import refine_grid
from ..least_squares.levenberg_marquardt import LevenbergMarquardt, LevenbergMarquardtStep
from ..least_squares.problem import check_residuals, check_terms, check_trainable
from ..modules.calls import check_module
from ..modules.checks import check_count, check_function, check_number
from ..modules.report import Report, TextTable
from .adaptive import ResidualSampler, gradient_weights, knot_density
from .boxes import box_points, check_box, side_points
from .constraints import HardConstraint, Part
from .continuation import continuation as continue_
from .features import BoxFeatures


WIDTHS, SPLINE_ORDER = (16, 20, 20), 5  # of a new network: a layer of splines, then tanh layers
GRID_SIZES, SMALLEST_GRID = {1: 8, 2: 8, 3: 5}, 3  # by the dimension of the box
STAGES = 6  # parameters of a continuation
CONTINUED, COARSE = 0.6, 0.8  # shares of the budget after which the continuation, and the coarse grids, end
SOLVED, FAILED = 1e-4, 1e-3  # of the first residual's square: where a stage of a continuation ends, and is undone
MOST_FAILURES = 3  # stages that are undone
POINTS, FINE_POINTS, HELD_POINTS = 1500, 2.5, 1000  # half of the first on a line; the second is a factor
PATIENCE = 15  # steps without a new minimum of the residual that is held out
LARGEST_START_DAMPING = 1e3  # with new points
SLOPE = 0.1  # of `gradient_weights`, for a solution of unit size on [-1, 1]
OUTSIDE = 0.01  # the share of activations outside of a grid that is worth a warning


class Phase(NamedTuple):
    """A part of the training of `solve`.

    Attributes:
        name: "continuation", "coarse" or "fine".
        parameter: That of the equation; NaN without continuation.
        steps, seconds: How long it took.
        loss: The last loss, the weighted mean square of the residual at the points.
        held: The least mean square of the residual at the points that are held out.
        reason: "solved" (the next parameter can come), "budget", "stalled" (the residual that is held out has
            stopped to fall) or "refused" (no step lowers the loss).
    """

    name: str
    parameter: float
    steps: int
    seconds: float
    loss: float
    held: float
    reason: str


@dataclass
class Solution(Report):
    """What `solve` found; `print` shows how.

    Attributes:
        model: The `HardConstraint` network: x (..., I) in the coordinates of the box to u (..., O), float64.
        low, high: The ends of the box, (I,).
        first_residual, residual: The root mean square of the residual at points that are never trained, before the
            training and after it.
        history: The record of each step.
        phases: The parts of the training.
        notes: What was noticed: activations outside of grids, grids that were not refined.
    """

    model: HardConstraint
    low: Tensor
    high: Tensor
    first_residual: float = math.nan
    residual: float = math.nan
    history: list[LevenbergMarquardtStep] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values, without the model."""
        values = super().as_dict()
        del values["model"]
        return values

    def _table(self) -> TextTable:
        columns = ["phase", ">parameter", ">steps", ">seconds", ">loss", ">held out", "ended by"]
        form = "{:s} {:.3g} {:d} {:.1f} {:.1e} {:.1e}"
        rows = [[*form.format(*phase[:-1]).replace("nan", "-").split(), phase.reason] for phase in self.phases]
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        note = (
            f"{count:,} parameters. Residual between the points (root mean square): {self.residual:.1e}, "
            f"{self.first_residual:.1e} at the start."
        )
        return TextTable(columns, rows, [note, *self.notes])

    def plot(self, count: int = 101) -> Any:
        """Draw the first output over the first two coordinates, the others in the middle of the box, or over a line.

        Needs matplotlib; `peft_lotra.plotting.plot_history(result.history)` draws the steps.
        """
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(4.5, 3.4), layout="constrained")
        share = torch.linspace(0, 1, count, dtype=torch.float64).unsqueeze(1)
        lines = torch.lerp(self.low, self.high, share).unbind(1)[:2]
        x = ((self.low + self.high) / 2).repeat(count ** len(lines), 1)
        x[:, : len(lines)] = torch.cartesian_prod(*lines).view(-1, len(lines))
        u = self.model(x)[:, 0].detach()
        if len(lines) == 1:
            axis.plot(*lines, u)
            axis.set(xlabel="coordinate 0", ylabel="u")
        else:
            figure.colorbar(axis.pcolormesh(*lines, u.view(count, count).T, cmap="RdBu_r"))
            axis.set(title="u", xlabel="coordinate 0", ylabel="coordinate 1")
        return figure


@torch.inference_mode(False)
def solve(
    residual: Callable[..., Tensor],
    low: Sequence[float],
    high: Sequence[float],
    *,
    distance: Part,
    lift: Part = 0.0,
    outputs: int = 1,
    periodic: Collection[int] = (),
    terms: Sequence[Any] = (),
    continuation: tuple[float, float] | None = None,
    network: nn.Module | None = None,
    seconds: float = 60.0,
    steps: int | None = None,
    refine: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Solution:
    r"""Solves a PDE on a box: finds a network u = lift + distance network whose residual is small everywhere.

    A layer of splines of each coordinate and three tanh layers, on the box scaled to [-1, 1], are trained by
    Levenberg-Marquardt. Each step has new points, a third of them where the residual is large, and residuals count
    less where u is steep. A continuation goes from an easy parameter to the wanted one in six steps of equal ratio, or
    of equal length if zero is between them; a step that ends in a poor minimum is undone, and a quarter of it taken.
    Each phase ends by its share of the budget, or when the residual at points that are never trained has stopped to
    fall, and keeps the parameters with the least one.

    If a `KAN` is given, its knots move to where the solution bends before each step of a continuation, and its grids
    are twice as fine for the last fifth of the budget.

    Args:
        residual: `residual(model, x)`, or `residual(model, x, parameter)` with `continuation`: takes points (n, I) to
            residuals (n,) or (n, m), row by row, usually by `jet(model, x)`, or by `torch.autograd.grad`.
        low, high: The ends of the box, I numbers each.
        distance, lift: The exact conditions, see `HardConstraint`; `BoxDistance` is a distance for sides of the box.
        outputs: The number of unknown functions.
        periodic: The indices of periodic coordinates.
        terms: Other residual terms, (function, rows) or (function, rows, weight) as for `LevenbergMarquardt`: data, or
            conditions that are not exact.
        continuation: The first and the last parameter of the equation.
        network: A KAN (`KAN([I, 8, 8, outputs], 8, 5, norm="tanh")`, for adapters of all layers), an MLP or another
            one, (n, I) to (n, outputs). It is trained in place and becomes float64. The box is scaled to [-1, 1] in
            front of it unless it has `BoxFeatures` or its grids are the box.
        seconds: The time to take. No step is begun that, as long as the last one, would end later.
        steps: The number of steps to take instead: the same result on a busy machine.
        refine: Whether the grids of a `KAN` get finer at the end. Steps there that do not lower the held-out residual
            are undone.
        seed: Of the network and the points.
        progress: Whether to show a bar.

    Returns:
        The solution; `result.model(x)` evaluates it.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The box is empty; `distance` is zero on no side of it and there are no `terms`; the network takes
            other inputs; residuals are not finite, of a wrong shape, or depend on other rows; a number is out of
            range. Nothing is trained then.

    Warns:
        UserWarning: Activations leave the grids of a network's KAN layers.

    Source: docs/pde.md says what it is made of, and what it reaches.

    Example:
        >>> from peft_lotra.kan import jet
        >>> from peft_lotra.pde import BoxDistance, solve
        >>> def poisson(model, x):  # u'' = -1 on [0, 10], u = 0 at both ends
        ...     return jet(model, x)[2][0] + 1
        >>> box = BoxDistance([0], [10])
        >>> result = solve(poisson, [0], [10], distance=box, steps=14, progress=False)
        >>> middle = torch.tensor([[5.0]], dtype=torch.float64)
        >>> abs(result.model(middle).item() - 12.5) < 0.1
        True
    """
    low_end, high_end = check_box(low, high)
    start = stop = math.nan
    if continuation is not None:
        start, stop = (check_number(end, "continuation", "(-inf, inf)") for end in continuation)
    check_function(residual, "residual", 2 if continuation is None else 3)
    steps = None if steps is None else check_count(steps, "steps", low=1 if continuation is None else STAGES + 1)
    budget = check_number(seconds, "seconds", "(0, inf)") if steps is None else steps
    points = box_points(low, high, HELD_POINTS, seed=seed)
    terms = list(terms)
    network = _network(network, low_end, high_end, check_count(outputs, "outputs"), periodic, seed)
    model = HardConstraint(network, distance, lift).double()
    sides, _ = side_points(low, high, 50)
    _check_model(model, points, sides.split(50), bool(terms))
    result = Solution(model, low_end, high_end)
    sampler = ResidualSampler(low, high, POINTS if len(low_end) > 1 else POINTS // 2, seed=1000 * seed)
    training = _Training(result, residual, terms, points, sampler, budget, steps is None, progress)
    result.first_residual = training.norm(start)
    if continuation is not None:

        def stage(parameter: float) -> float:
            share, first = min(CONTINUED * (len(result.phases) + 1) / STAGES, COARSE), result.first_residual**2
            least = training.fit("continuation", parameter, share, SOLVED * first)
            failures = sum(phase.held > FAILED * first for phase in result.phases)
            # neither the first stage nor one that is out of time can be tried again
            return 0.0 if training.ended or len(result.phases) == 1 or failures > MOST_FAILURES else least / first

        continue_(model, stage, start, stop, target=FAILED, prepare=training.move_knots, steps=STAGES - 1)
    kan = training.kan if refine else None
    training.fit("coarse", stop, 1.0 if kan is None else COARSE)
    if kan is not None and training.spent() < 1:  # a last phase on grids that are twice as fine
        is_finer = training.regrid(2, samples=_inputs(model, points, kan))
        sampler.count = round((FINE_POINTS if is_finer else 1) * sampler.count)
        training.fit("fine" if is_finer else "coarse", stop, 1.0)
    training.bar.close()
    result.residual = training.norm(stop)
    for name, share in _outside(model, points):
        note = f"{share:.0%} of the inputs of `{name}` are outside of its grid, where its splines are zero."
        warnings.warn(f"{note} Bound them by `KAN(norm='tanh')`, or give a wider `grid_range`.", stacklevel=3)
        result.notes.append(note)
    return result


def _network(
    network: nn.Module | None, low: Tensor, high: Tensor, outputs: int, periodic: Collection[int], seed: int
) -> nn.Module:
    """Return the network of the box's coordinates."""
    features = BoxFeatures(low.tolist(), high.tolist(), periodic)
    if network is None:
        grid_size = GRID_SIZES.get(len(low), SMALLEST_GRID)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [features]
            layers += [KANLinear(features.out_features, WIDTHS[0], grid_size, SPLINE_ORDER)]
            for pair in pairs([*WIDTHS, outputs]):
                layers += [nn.Tanh(), nn.Linear(*pair)]
        return nn.Sequential(*layers)
    check_module(network, "network")
    check_trainable(network)
    present = _first(network, BoxFeatures)
    if present is not None:
        if sorted(periodic) not in ([], present.periodic):
            raise ValueError(f"`periodic` is {periodic}, but the network's own `BoxFeatures` have {present.periodic}.")
        return network
    layer = _first(network, SplineLayer)
    on_box = layer is not None and torch.equal(layer.grid_bounds.double(), torch.stack([low, high], 1))
    return network if on_box and not periodic else nn.Sequential(features, network)


def _first(model: nn.Module, kind: type) -> Any:
    """Return the first module of a kind in the model; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, kind)), None)


@torch.no_grad()
def _check_model(model: HardConstraint, x: Tensor, sides: Sequence[Tensor], has_terms: bool) -> None:
    """Raise a `ValueError` unless the network takes the box's coordinates, and `distance` is zero on a side."""
    try:
        model.kan(x[:2])
    except Exception as error:
        inputs = f"{x.shape[1]} coordinates scaled to [-1, 1], of which a periodic one gives two inputs"
        raise ValueError(f"`network` fails on {inputs}: {error}") from error
    model(x[:2])  # checks the shapes of distance and lift
    size, *on_sides = (model.part("distance", points, model.kan(points)).abs().amax(0) for points in (x, *sides))
    if not has_terms and not any((value <= 1e-6 * size).any() for value in on_sides):
        raise ValueError(
            "`distance` is zero on no side of the box: take `BoxDistance`, or give `terms` for conditions."
        )


@dataclass
class _Training:
    """The state of `solve`, and its steps."""

    result: Solution
    equation: Callable[..., Tensor]
    terms: list[Any]
    held: Tensor
    sampler: ResidualSampler
    budget: float  # steps, or seconds
    timed: bool
    progress: bool
    parameter: float = math.nan  # of the present phase
    last: float = 0.0  # the share of the budget that was used up after the last step
    ended: bool = False  # whether one more step is too much for the phase
    differentiates: bool = False  # whether the residual needs points that require a gradient

    def __post_init__(self) -> None:
        from tqdm.auto import tqdm

        self.model, self.history, self.phases = self.result.model, self.result.history, self.result.phases
        self.clock = time.monotonic()
        self.optimizer = LevenbergMarquardt(self.model, floor=1e-6, memory=2**32)
        self.kan = _first(self.model, LayerStack)
        self.features: BoxFeatures | None = _first(self.model, BoxFeatures)
        self.bar = tqdm(total=math.ceil(self.budget), unit="s" if self.timed else "step", disable=not self.progress)

    def spent(self) -> float:
        """Return the share of the budget that is used up."""
        return (time.monotonic() - self.clock if self.timed else len(self.history)) / self.budget

    def norm(self, parameter: float) -> float:
        """Return the root mean square of the residual at the held-out points.

        Raises:
            ValueError: A term is not finite there, or malformed.
        """
        self.parameter = parameter
        try:
            problem, residuals = self.optimizer.evaluate_held(self.held_terms())
        except RuntimeError:  # of `torch.autograd.grad`
            self.differentiates = True
            problem, residuals = self.optimizer.evaluate_held(self.held_terms())
        if message := problem.find_not_finite(residuals):
            raise ValueError(f"The {message}")
        return math.sqrt(problem.losses(residuals)[0])

    def held_terms(self) -> list[Any]:
        """Return the equation at the held-out points, and the terms of the caller."""
        points = self.held.requires_grad_(self.differentiates)
        return check_terms([(self.residual, (points, torch.ones_like(points[:, :1]))), *self.terms])

    def residual(self, model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Evaluate the equation: one function in all phases, so that Levenberg-Marquardt tries it once."""
        arguments = (x,) if math.isnan(self.parameter) else (x, self.parameter)
        return weight * check_residuals(self.equation(model, *arguments), "`residual`", len(x))

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """See `gradient_weights`, for slopes across half of the box, and u of unit size."""
        size = self.model(x).square().mean().sqrt().clamp(min=1e-12).item()
        return gradient_weights(self.model, x, SLOPE / size, (self.sampler.high - self.sampler.low).diag() / 2)

    def fit(self, name: str, parameter: float, until: float, target: float = 0.0) -> float:
        """Take steps until a share of the budget is used up, the residual is at the target, or does not fall any more.

        Returns:
            The least mean square of the residual at the held-out points. The model has the parameters of this step.
        """
        optimizer = self.optimizer
        start, before = time.monotonic(), len(self.history)
        self.parameter = parameter
        if name == "continuation":  # another equation
            optimizer.forget()
            optimizer.damping = min(1e-2, 100 * optimizer.damping)
        is_linear = self.features is not None and not self.features.waves.any()
        knots = _first(self.model, KnotMap) if is_linear else None  # of the box's coordinates

        def weighted(x: Tensor) -> Tensor:
            weights = self.weights(x)
            return self.residual(self.model, x.requires_grad_(self.differentiates), weights)

        def draw(number: int) -> list[Any]:
            optimizer.damping = min(optimizer.damping, LARGEST_START_DAMPING)
            x = self.sampler.draw(weighted, knots).requires_grad_(self.differentiates)
            return [(self.residual, (x, self.weights(x))), *self.terms]

        def is_over(number: int, record: LevenbergMarquardtStep) -> bool:
            self.history.append(record)
            previous, self.last = self.last, self.spent()
            self.ended = 2 * self.last - previous > until + 1e-9
            self.bar.n = min(self.bar.total, round(self.last * self.bar.total))
            self.bar.set_postfix(phase=name, loss=record.loss, held=record.held_loss)
            return self.ended or record.held_loss <= target

        held = self.held_terms()
        for _ in range(3):  # a step that is refused may not be on other points
            optimizer.fit(draw, 10**9, held=held, patience=PATIENCE, callback=is_over, progress=False)
            if self.history[-1].accepted or self.ended:
                break
        records = self.history[before:]
        last, least = records[-1], min(record.held_loss for record in records)
        reason = "budget" if self.ended else "stalled" if last.accepted else "refused"
        reason = "solved" if least <= target else reason
        seconds = time.monotonic() - start
        self.phases.append(Phase(name, parameter, len(records), seconds, last.loss, least, reason))
        return least

    def move_knots(self, parameter: float) -> None:
        """Move the knots of the first layer to where the solution bends, once there is one."""
        if self.phases and self.features is not None and self.kan is not None:
            density = torch.ones(self.features.out_features, 64, dtype=torch.float64)
            of_coordinates = knot_density(self.model, self.sampler.low.tolist(), self.sampler.high.tolist())
            for j, i in enumerate(self.features.sources.tolist()):
                if i not in self.features.periodic:
                    density[j] = of_coordinates[i]
            self.regrid(1, density=density, tolerance=math.inf)

    def regrid(self, factor: int, **options: Any) -> bool:
        """Change the grids if they can be changed."""
        size = max(getattr(layer, "grid_size", 0) for layer in self.kan.layers)
        try:
            refine_grid(self.kan, factor * size, **options)
        except (TypeError, ValueError) as error:  # adapters, Slim layers
            self.result.notes[:] = [f"The grids stay as they are: {error}"]
            return False
        return True


@torch.no_grad()
def _inputs(model: nn.Module, x: Tensor, layer: nn.Module) -> Tensor:
    """Return the inputs of a layer of the model."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(x)
    handle.remove()
    return inputs[0]


def _outside(model: nn.Module, x: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the layers with activations outside of their grids, and the share of these."""
    for name, layer in model.named_modules():
        if isinstance(layer, SplineLayer):
            low, high = layer.grid_bounds.unbind(-1)
            slack = 1e-6 * (high - low)
            z = _inputs(model, x, layer)
            share = ((z < low - slack) | (z > high + slack)).double().mean().item()
            if share > OUTSIDE:
                yield name, share
