# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What an adapter changed: the parts of the change of the outputs, and the effect of each edge."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..kan.basis import bspline_basis
from ..modules.report import Report, TextTable
from .data_weights import model_outputs
from .edges import EdgeChange, edge_changes


INTERVALS = (2, 5, 10, 20)  # of the splines of an input; the data choose
PAIR_INTERVALS, PAIR_ORDER = 2, 2  # of the splines whose products are functions of two inputs
ROWS = 4000  # that are looked at, at most
MOST_TERMS = 700
MOST_PAIRS = 2500
FEW_ROWS = 3  # for each term
RIDGE = 1e-9  # of the largest diagonal entry; inputs that repeat each other lose nothing
SMALL = 0.01  # the share of a change that is not worth a name
PRINTED = 10  # edges


class InputShare(NamedTuple):
    """An input, and the share of the change that no sum of functions of the other inputs explains."""

    name: str
    share: float


class Pair(NamedTuple):
    """Two inputs, and the share of the change that is a function of both and no sum of functions of one input."""

    first: str
    second: str
    share: float


@dataclass(eq=False)
class ChangeReport(Report):
    """The parts of a change, as shares of its mean square, and the effects of the edges; prints as a table.

    Attributes:
        constant: The mean of each output.
        linear: The gain by a linear function of the inputs.
        additive: The gain by a sum of functions of one input.
        rest: The part that is not a sum of functions of one input. The four shares sum to 1.
        size: The root mean square of the change.
        inputs: The inputs whose functions explain at least 1 % of the change each, the largest share first.
        pairs: The pairs of inputs that explain at least a tenth of the rest each, the largest share first.
        notes: Further remarks.
        edges: The edges of all dense KAN layers with an active adapter, as `EdgeChange`, the largest effect first.
            Merged and disabled adapters do not count. The table has the first ten.
    """

    constant: float
    linear: float
    additive: float
    rest: float
    size: float
    inputs: list[InputShare] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    edges: list[EdgeChange] = field(default_factory=list)

    def _table(self) -> TextTable:
        rows = [
            ["constant", f"{self.constant:.1%}", "a shift"],
            ["linear", f"{self.linear:.1%}", "a linear function of the inputs"],
            ["additive", f"{self.additive:.1%}", "a sum of functions of one input"],
        ]
        for name, share in self.inputs:
            rows.append(["", f"{share:.1%}", f"explained only by a function of {name}, linear or not"])
        rows.append(["rest", f"{self.rest:.1%}", "not a sum of functions of one input"])
        for first, second, share in self.pairs:
            rows.append(["", f"{share:.1%}", f"a function of {first} and {second} together"])
        part = "edges"
        changed = [edge for edge in self.edges if edge.effect > 0]
        for edge in changed[:PRINTED]:
            text = f"{edge.layer}, input {edge.input} to output {edge.output}: effect {edge.effect:.3g}"
            rows.append([part, f"{edge.share:.1%}", text])
            part = ""
        notes = [f"root mean square of the change: {self.size:.3g}"]
        if len(changed) > PRINTED:
            notes.append(f"the {PRINTED} of {len(self.edges):,} edges with the largest effect")
        if self.rest >= SMALL:
            notes.append(
                f"{self.rest:.0%} of the change is not a sum of functions of one input. "
                "It needs hidden units or products of inputs."
            )
        elif self.size > 0:
            notes.append("The change is a sum of functions of one input.")
        return TextTable(["part", ">share", ""], rows, notes + self.notes)


@torch.no_grad()
def what_changed(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> ChangeReport:
    r"""Divide the change of a network into a constant, a linear, an additive part, and a rest, and among its edges.

    The change is f(x) - base(x), with f the network with its active adapters; or with `targets`, y - base(x), which
    the data ask for. Least squares fit it by a constant, by a linear function, and by a sum over inputs i of splines
    s_i(x_i), with knots where the data are. Each part is the gain of a fit over the one before, with the mean square
    of the residuals corrected for the number of terms. The data choose the number of intervals of the splines.

    The additive part can be written into edges that lead from the inputs to the outputs. The rest needs another unit,
    or a product; noise in the targets is a part of it. The share of an input is what a fit without its functions
    loses: it is small for inputs that repeat each other.

    The effect of an edge is what the active adapters changed there: the change of its function at the inputs of its
    layer, without the mean, times the derivative of the outputs of the network. The changes of several edges can
    cancel. [`plot_edge_functions`] draws them.

    Args:
        model: The adapted model; with `targets` also one without adapters. It stays unchanged.
        inputs: Inputs of the model, (rows, in), more than six times as many rows as columns. Up to 4,000 rows are
            used.
        targets: The targets (rows, out).
        names: The names of the inputs.

    Raises:
        ValueError: There are too few rows, targets of another shape, or another number of names than of inputs; or the
            inputs or the change have values that are not finite.

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
    if inputs.dim() != 2:
        raise ValueError(f"`inputs` has shape {tuple(inputs.shape)}, but must have rows and columns.")
    rows, width = inputs.shape
    if names is None:
        names = [f"input {index}" for index in range(width)]
    if len(names) != width:
        raise ValueError(f"`names` has {len(names)} entries, but `inputs` has {width} columns.")
    if targets is not None and len(targets) != rows:
        raise ValueError(f"`targets` has {len(targets)} rows, but `inputs` has {rows}.")
    terms = 2 * (1 + 3 * width)
    if rows <= terms:
        raise ValueError(
            f"`inputs` has {rows} rows, but a sum of functions of {width} inputs needs more than {terms}."
        )
    count = min(ROWS, rows)
    chosen = torch.linspace(0, rows - 1, count, dtype=torch.float64, device=inputs.device).long()
    every_input = inputs
    inputs = inputs[chosen]

    outputs = model_outputs(model, inputs) if targets is None else targets[chosen]
    if outputs.dim() == 1:  # as `model_outputs` has it
        outputs = outputs.unsqueeze(1)
    with ExitStack() as stack:
        # unlike `disable_adapter` of PEFT, it keeps what requires a gradient, and merged adapters
        for module in model.modules():
            is_wrapper = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            if is_wrapper and not getattr(module, "merged", False):
                stack.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                module._disable_adapters = True
        base_outputs = model_outputs(model, inputs)
    if outputs.shape != base_outputs.shape:
        shape = tuple(base_outputs.shape)
        raise ValueError(f"`targets` has shape {tuple(outputs.shape)}, but the outputs have {shape}.")
    x = inputs.double().cpu()
    change = outputs.double().cpu() - base_outputs.double().cpu()
    if not x.isfinite().all() or not change.isfinite().all():
        raise ValueError("`inputs` or the change of the outputs have NaN or infinite values.")
    change = change.reshape(len(x), -1)
    report = _divide(change, x, names)
    report.edges = edge_changes(model, every_input)
    return report


def _divide(change: Tensor, x: Tensor, names: Sequence[str]) -> ChangeReport:
    """Divide a change (rows, out) by fits of the inputs (rows, in)."""
    total = change.square().mean().item()
    if total == 0:
        note = "The outputs did not change: no adapter is active, or its update is zero. Merged ones do not count."
        return ChangeReport(0.0, 0.0, 0.0, 0.0, 0.0, notes=[note])

    rows, width = x.shape
    low, high = x.aminmax(dim=0)
    extents = high - low
    notes = [f"{name} is constant" for name, extent in zip(names, extents, strict=True) if extent == 0]
    one = torch.ones(rows, 1, dtype=x.dtype)
    scaled = (x - low) / extents.clamp(min=1e-300)
    linear_terms = torch.cat([one, scaled], 1)
    ranks = _rank(x)
    spline_fits = []
    for intervals in INTERVALS:
        number = width * (intervals + 2)  # of terms
        if not spline_fits or number < min(rows / 2, MOST_TERMS):
            splines = _splines(ranks, intervals, 3).flatten(1)
            terms = torch.cat([linear_terms, splines], 1)
            spline_fits.append(_Fit(terms, change))
    additive_fit = min(spline_fits, key=lambda fit: fit.variance)

    # the correction may exceed what a term explains
    after_constant = min(total, _Fit(one, change).variance)
    after_linear = min(after_constant, _Fit(linear_terms, change).variance)
    after_additive = min(after_linear, additive_fit.variance)
    unexplained = after_additive / total

    count = additive_fit.basis.shape[1]
    if rows < FEW_ROWS * count:
        notes.append(f"{rows} rows are few for {count} terms: the shares are rough")
    pairs = []
    if unexplained >= SMALL:
        if additive_fit is spline_fits[-1]:
            notes.append("the finest splines fit best: finer ones might explain fast oscillations in the rest")
        if width * (width - 1) // 2 > MOST_PAIRS:
            notes.append(f"{width} inputs have too many pairs to look at")
        else:
            pairs = _find_pairs(additive_fit, ranks, names, total, unexplained)
    return ChangeReport(
        constant=(total - after_constant) / total,
        linear=(after_constant - after_linear) / total,
        additive=(after_linear - after_additive) / total,
        rest=unexplained,
        size=total**0.5,
        inputs=_find_inputs(additive_fit, change, names, total),
        pairs=pairs,
        notes=notes,
    )


class _Fit:
    """A least-squares fit of values (rows, out) by terms (rows, count).

    Attributes:
        terms: The terms.
        basis: An orthonormal basis of the terms, (rows, rank).
        residual: The values minus the fit, (rows, out).
        variance: The mean square of the residual, with one row less for each term, and for each of `earlier_terms`
            that were fitted before; infinite if there are not more rows than terms.
    """

    def __init__(self, terms: Tensor, values: Tensor, earlier_terms: int = 0) -> None:
        self.terms = terms
        sizes, vectors = torch.linalg.eigh(terms.T @ terms)
        independent = sizes > 1e-10 * sizes[-1]
        self.basis = terms @ vectors[:, independent] / sizes[independent].sqrt()
        self.residual = values - self.basis @ (self.basis.T @ values)

        self.variance = float("inf")
        freedom = len(values) - self.basis.shape[1] - earlier_terms
        if freedom > 0:
            squares = self.residual.square().sum().item()
            self.variance = squares / (freedom * values.shape[1])


def _rank(x: Tensor) -> Tensor:
    """Return the share of the rows below each entry of a column, which spreads long tails evenly."""
    columns = x.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    not_above = torch.searchsorted(ordered, columns, right=True)
    middle = (below + not_above).T.double() / 2  # of equal values
    return middle / len(x)


def _splines(ranks: Tensor, intervals: int, order: int) -> Tensor:
    """Return the splines (rows, in, count) of each input without the last one: all of them sum to one."""
    splines = bspline_basis(ranks, 0.0, 1.0, intervals, order)
    return splines[:, :, :-1]


def _find_inputs(
    additive: _Fit,
    change: Tensor,
    names: Sequence[str],
    total: float,
) -> list[InputShare]:
    """Return the inputs without whose terms an additive fit loses at least 1 % of the change, the largest loss first.

    With coefficients b of the terms of an input and their block V of the inverse of the Gram matrix, it loses
    b^T V^-1 b. Noise adds to the loss, and the other terms, which can explain a part of anything, lower it.
    """
    rows = len(change)
    gram = additive.terms.T @ additive.terms
    gram.diagonal().add_(RIDGE * gram.diagonal().max())
    inverse = torch.linalg.inv(gram)
    coefficients = inverse @ (additive.terms.T @ change)

    width = len(names)
    numbers = torch.arange(1 + width, len(gram)).view(width, -1)  # of splines, behind constant and linear terms
    inputs = []
    for index, name in enumerate(names):
        linear = torch.tensor([1 + index])
        block = torch.cat([linear, numbers[index]])
        values = coefficients[block]
        losses = torch.linalg.solve(inverse[block][:, block], values)
        loss = (values * losses).sum().item() / change.numel()
        noise = additive.variance * len(block) / rows
        others = additive.basis.shape[1] - len(block)
        share = (loss - noise) / total * rows / (rows - others)
        if share >= SMALL:
            inputs.append(InputShare(name, share))
    return sorted(inputs, key=lambda entry: -entry.share)


def _find_pairs(
    additive: _Fit,
    ranks: Tensor,
    names: Sequence[str],
    total: float,
    unexplained: float,
) -> list[Pair]:
    """Return the pairs of inputs that explain at least a tenth of the rest, the largest first."""
    splines = _splines(ranks, PAIR_INTERVALS, PAIR_ORDER)
    pairs = []
    for i, j in combinations(range(len(names)), 2):
        products = torch.einsum("na,nb->nab", splines[:, i], splines[:, j])
        products = products.flatten(1)
        beyond = products - additive.basis @ (additive.basis.T @ products)
        fit = _Fit(beyond, additive.residual, additive.basis.shape[1])
        share = unexplained - fit.variance / total
        if share > max(0.1 * unexplained, SMALL):
            pairs.append(Pair(names[i], names[j], share))
    return sorted(pairs, key=lambda pair: -pair.share)
