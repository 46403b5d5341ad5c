# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which part of a change is constant, linear, or a sum of functions of one input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..compress.data_weights import model_outputs
from ..kan.basis import bspline_basis
from ..modules.calls import evaluating_without_trace
from ..modules.report import Report, TextTable


INTERVALS = (2, 5, 10, 20)  # of the splines of an input; the data choose
PAIR_INTERVALS, PAIR_ORDER = 2, 2  # of the splines whose products are functions of two inputs
ROWS = 4000  # that are looked at, at most
MOST_TERMS = 700
MOST_PAIRS = 2500
FEW_ROWS = 3  # for each term
SMALL = 0.01  # the share of a change that is not worth a name


class Pair(NamedTuple):
    """Two inputs, and the share of the change that is a function of both and no sum of functions of one input."""

    first: str
    second: str
    share: float


@dataclass(eq=False)
class ChangeParts(Report):
    """The parts of a change, as shares of its mean square; prints as a table.

    Attributes:
        constant: The mean of each output.
        linear: What a linear function of the inputs adds to that.
        additive: What a sum of functions of one input adds to that.
        rest: What is no such sum. The four shares sum to 1.
        size: The root mean square of the change.
        pairs: The pairs of inputs that explain most of the rest, taken one by one; of those with at least a tenth of
            it.
        notes: Further remarks.
    """

    constant: float
    linear: float
    additive: float
    rest: float
    size: float
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def _table(self) -> TextTable:
        meaning_of = {
            "constant": "a shift",
            "linear": "a linear function of the inputs",
            "additive": "a sum of functions of one input",
            "rest": "no sum of functions of one input",
        }
        rows = [[name, f"{getattr(self, name):.1%}", text] for name, text in meaning_of.items()]
        rows += [["", f"{share:.1%}", f"of {first} and {second} together"] for first, second, share in self.pairs]
        meaning = "The change is a sum of functions of one input."
        if self.rest >= SMALL:
            meaning = f"{self.rest:.0%} of the change is no such sum: it needs another unit or a product."
        size = f"root mean square of the change: {self.size:.3g}"
        return TextTable(["part", ">share", ""], rows, [size, meaning, *self.notes])


@torch.inference_mode(False)
@torch.no_grad()
def what_changed(
    model: nn.Module, inputs: Tensor, targets: Tensor | None = None, names: Sequence[str] | None = None
) -> ChangeParts:
    r"""Divides the change of a network into a constant, a linear, an additive part, and a rest.

    The change is that of the outputs by the active adapters, f(x) - base(x); or with `targets`, what the data ask
    for, y - base(x). Least squares fit it by a constant, by a linear function, and by a sum over inputs i of splines
    s_i(x_i), with knots where the data are. Each part is what a fit explains beyond the one before, with the mean
    square of the residuals corrected for the number of terms. The data choose the number of intervals of the splines.

    What the additive part explains can be written into edges that lead from the inputs to the outputs. The rest
    needs another unit, or a product; noise in the targets is a part of it.

    Args:
        model: The adapted model; with `targets` also one without adapters. It stays unchanged.
        inputs: Inputs of the model, (rows, in), more than six times as many rows as columns. Up to 4,000 rows are
            used.
        targets: The targets (rows, out).
        names: The names of the inputs.

    Raises:
        ValueError: The model has no active adapter; the inputs have another width than the model takes, too few
            rows, or values that are not finite; the targets or names are not as many.

    Example:
        >>> from peft_lotra import what_changed
        >>> class Zero(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 0 * x[:, :1]
        >>> x = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
        >>> parts = what_changed(Zero(), x, targets=(x[:, :1] - 0.5) * (x[:, 1:] - 0.5), names=["a", "b"])
        >>> round(parts.rest, 1), parts.pairs[0].first, parts.pairs[0].second
        (1.0, 'a', 'b')
    """
    x, names = _check_inputs(inputs, names)
    if targets is None and not any(map(_is_adapted, model.modules())):
        raise ValueError(
            "Nothing is adapted: the model has no active adapter that is not merged. Pass `targets` to see what data "
            "ask for."
        )
    chosen = torch.linspace(0, len(x) - 1, min(ROWS, len(x))).long()
    after = _outputs(model, inputs[chosen]) if targets is None else _check_targets(targets, len(x))[chosen]
    with _without_adapters(model):
        before = _outputs(model, inputs[chosen])
    if after.shape != before.shape:
        raise ValueError(f"`targets` has {after.shape[1]} columns, but the model returns {before.shape[1]}.")
    return _divide(after - before, x[chosen], names)


def _is_adapted(layer: Any) -> bool:
    """Return whether a layer has an active adapter."""
    if not isinstance(layer, BaseTunerLayer) or layer.merged or layer.disable_adapters:
        return False
    present = [getattr(layer, kind, {}) for kind in layer.adapter_layer_names]
    return any(name in of_kind for name in layer.active_adapters for of_kind in present)


def _check_inputs(inputs: Any, names: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Return the inputs in float64 on the CPU, and the names of the columns."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or not inputs.is_floating_point():
        given = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"`inputs` is {given}, but must be a floating point tensor (rows, in).")
    x = inputs.detach().double().cpu()
    rows, width = x.shape
    if not x.isfinite().all():
        raise ValueError("`inputs` has NaN or infinite values.")
    terms = 2 * (1 + 3 * width)
    if rows <= terms:
        raise ValueError(
            f"`inputs` has {rows} rows, but a sum of functions of {width} inputs needs more than {terms}."
        )
    if names is not None and len(names) != width:
        raise ValueError(f"`names` has {len(names)} entries, but the inputs have {width} columns.")
    return x, [f"input {i}" for i in range(width)] if names is None else list(names)


def _check_targets(targets: Tensor, rows: int) -> Tensor:
    """Return the targets (rows, out), in float64 on the CPU."""
    if not isinstance(targets, Tensor) or targets.shape[:1] != (rows,) or not targets.isfinite().all():
        raise ValueError(f"`targets` must be a tensor of {rows} rows, one for each input, with finite values.")
    return targets.detach().double().cpu().reshape(rows, -1)


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs (rows, out), in float64 on the CPU."""
    try:
        with evaluating_without_trace(model):
            outputs = model_outputs(model, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"The model cannot be run on `inputs` of shape {tuple(inputs.shape)}: {error}") from error
    return outputs.double().cpu().reshape(len(inputs), -1)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Disable the adapters of a model that are not merged.

    Unlike `disable_adapter` of PEFT, it keeps what requires a gradient.
    """
    layers: Any = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    layers = [layer for layer in layers if not getattr(layer, "merged", False)]  # PEFT would unmerge them
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def _divide(change: Tensor, x: Tensor, names: list[str]) -> ChangeParts:
    """Divide a change (rows, out) by fits of the inputs (rows, in)."""
    rows = len(x)
    low, high = x.aminmax(dim=0)
    varies = high > low
    total = change.square().mean().item()
    notes = [f"{name} is constant" for name, moves in zip(names, varies.tolist(), strict=True) if not moves]
    if total == 0:
        return ChangeParts(0.0, 0.0, 0.0, 0.0, 0.0, [], ["The outputs did not change on these inputs."])

    if not varies.any():
        raise ValueError("All columns of `inputs` are constant. Pass inputs that differ.")
    low, high, x = low[varies], high[varies], x[:, varies]
    names = [name for name, moves in zip(names, varies.tolist(), strict=True) if moves]
    one = torch.ones(rows, 1, dtype=x.dtype)
    constant_fit = _Fit(one, change)
    linear_fit = _Fit(torch.cat([one, (x - low) / (high - low)], 1), change)
    most = min(rows / 2, MOST_TERMS)
    allowed = [intervals for intervals in INTERVALS if x.shape[1] * (intervals + 2) < most] or [1]
    ranks = _rank(x)
    splines = [_Fit(torch.cat([_spline_terms(ranks, count), x], 1), change) for count in allowed]
    additive = min(splines, key=lambda fit: fit.variance)
    left = [total]
    for fit in (constant_fit, linear_fit, additive):
        left.append(min(left[-1], fit.variance))  # the correction may exceed what a term explains
    constant, linear, of_splines = ((before - after) / total for before, after in pairwise(left))
    rest = left[-1] / total
    pairs = []
    if rows < FEW_ROWS * len(additive.basis.T):
        notes.append(f"{rows} rows are few for {len(additive.basis.T)} terms: the shares are rough")
    if rest >= SMALL:
        if additive is splines[-1]:
            notes.append("the finest splines were taken: the rest may have fast oscillations")
        count = len(names) * (len(names) - 1) // 2
        if count > MOST_PAIRS:
            notes.append(f"{count:,} pairs of inputs are too many to look at")
        else:
            pairs = _find_pairs(additive, ranks, names, total, rest)
    return ChangeParts(constant, linear, of_splines, rest, total**0.5, pairs, notes)


class _Fit:
    """A least-squares fit of values (rows, out) by terms (rows, count).

    Attributes:
        basis: An orthonormal basis of the terms, (rows, rank).
        residual: What is not fitted, (rows, out).
        variance: Its mean square, with one row less for each term; infinite if there are not more rows than terms.
    """

    def __init__(self, terms: Tensor, values: Tensor) -> None:
        sizes, vectors = torch.linalg.eigh(terms.T @ terms)
        sizes, vectors = sizes.flip(0), vectors.flip(1)
        kept = sizes > 1e-10 * sizes[0]
        self.basis = terms @ vectors[:, kept] / sizes[kept].sqrt()
        self.residual = values - self.basis @ (self.basis.T @ values)
        freedom = len(values) - self.basis.shape[1]
        squares = self.residual.square().sum().item()
        self.variance = squares / (freedom * values.shape[1]) if freedom > 0 else float("inf")


def _rank(x: Tensor) -> Tensor:
    """Return the share of the rows below each entry of a column, which spreads long tails evenly."""
    columns = x.T.contiguous()
    ordered = columns.sort(dim=1).values
    ends = [torch.searchsorted(ordered, columns, right=right) for right in (False, True)]
    return (ends[0] + ends[1]).T.double() / (2 * len(x))


def _spline_terms(ranks: Tensor, intervals: int, order: int = 3) -> Tensor:
    """Return one, and the splines of each input without the last one, which the others and one give."""
    splines = bspline_basis(ranks, 0.0, 1.0, intervals, order)[:, :, :-1]
    return torch.cat([torch.ones_like(ranks[:, :1]), splines.flatten(1)], 1)


def _find_pairs(additive: _Fit, ranks: Tensor, names: list[str], total: float, rest: float) -> list[Pair]:
    """Return the pairs of inputs that explain at least a tenth of the rest, the largest first."""
    splines = bspline_basis(ranks, 0.0, 1.0, PAIR_INTERVALS, PAIR_ORDER)[:, :, :-1]
    pairs = []
    for i, j in combinations(range(len(names)), 2):
        products = (splines[:, i, :, None] * splines[:, j, None, :]).flatten(1)
        beyond = products - additive.basis @ (additive.basis.T @ products)
        fit = _Fit(beyond, additive.residual)
        freedom = len(ranks) - additive.basis.shape[1] - fit.basis.shape[1]
        if freedom > 0:
            variance = fit.residual.square().sum().item() / (freedom * fit.residual.shape[1])
            share = rest - variance / total
            if share > max(0.1 * rest, SMALL):
                pairs.append(Pair(names[i], names[j], share))
    return sorted(pairs, key=lambda pair: -pair.share)
