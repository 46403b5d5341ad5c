# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Sums of squared residuals of a model: their values, their Jacobian by rows, and damped linear systems."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import call_with_parameters
from .recording import recording
from .row_gradients import row_gradients


# Bytes that a chunk of rows works on: enough for the overhead of its operations to be small, and no more, since fresh
# memory is slow (rows of a [2, 16, 16, 1] KAN cost a quarter more in chunks of four times the size).
CHUNK = 2**27

# From so many rows on, KAN layers are evaluated by hand, and keep less.
ROWS_BY_HAND = 65

Term = tuple[Callable[..., Tensor], Sequence[Tensor], float]


@dataclass
class _Note:
    """What is known of a term's function (kept here, so that no other has its `id`)."""

    function: Callable[..., Tensor]
    row_bytes: int  # what one more row takes
    by_layers: bool  # whether to try `row_gradients`; it has the last word


def check_terms(terms: Iterable[Term]) -> list[Term]:
    """Residual terms with their rows as a tuple and their weight filled in.

    Raises:
        ValueError: A term is not as `LevenbergMarquardt.step` wants it.
    """
    checked = []
    for index, term in enumerate(terms):
        if not isinstance(term, Sequence) or len(term) not in (2, 3) or not callable(term[0]):
            raise ValueError(
                f"Residual term {index} is {type(term).__name__}, but must be (function, rows), or with a weight "
                "behind: (function, rows, weight)."
            )
        function, rows, weight = (*term, 1.0)[:3]
        rows = (rows,) if isinstance(rows, Tensor) else tuple(rows)
        if not rows or not all(isinstance(row, Tensor) and row.dim() for row in rows):
            raise ValueError(f"The rows of {name_term(index, function)} must be tensors, at least one.")
        if len({len(row) for row in rows}) > 1 or len(rows[0]) == 0:
            raise ValueError(
                f"The rows of {name_term(index, function)} have lengths {[len(row) for row in rows]}, but must be "
                "equally many, at least one."
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"The weight of {name_term(index, function)} is {weight!r}, but must be above 0.")
        checked.append((function, rows, float(weight)))
    if not checked:
        raise ValueError("There are no residual terms.")
    return checked


def name_term(index: int, function: Callable) -> str:
    """How messages call a term."""
    return f"residual term {index} ({getattr(function, '__name__', type(function).__name__)})"


class LeastSquares:
    """
    The residuals as a function of the flat vector of the trainable parameters, in float64.

    Each is multiplied by the root of its term's weight / rows, so that the loss is the sum of their squares.

    Args:
        model (`nn.Module`): The model; it is not changed but by `write`.
        trainable (`dict[str, nn.Parameter]`): Its parameters that vary.
        terms (`list[Term]`): As `check_terms` returns them.
        memory (`int`): Bytes that matrices and chunks may take.
        notes (`dict`): The `notes` of the step before, so that its terms need not be measured again.

    Attributes:
        notes (`dict`): What is known of the terms; the Jacobian's time and memory depend on it, its numbers do not.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        terms: list[Term],
        memory: int,
        notes: dict[tuple, _Note] | None = None,
    ) -> None:
        self.model = model
        self.trainable = trainable
        self.memory = memory
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.fixed = {
            name: tensor.detach().double()
            for name, tensor in state.items()
            if name not in trainable and tensor.is_floating_point() and tensor.dtype != torch.float64
        }
        self.sizes = [parameter.numel() for parameter in trainable.values()]
        self.num_parameters = sum(self.sizes)
        self.start = torch.cat([parameter.detach().double().flatten() for parameter in trainable.values()])
        self.terms = []
        for function, rows, weight in terms:
            rows = tuple(row.detach().double() if row.is_floating_point() else row for row in rows)
            self.terms.append((function, rows, math.sqrt(weight / len(rows[0]))))
        known = {} if notes is None else notes
        self.notes: dict[tuple, _Note] = {}
        for function, rows, scale in self.terms:
            key = self._key(function, rows)
            if key not in self.notes:
                self.notes[key] = known[key] if key in known else self._examine(function, rows, scale)

    # Parameters

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(self.sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.trainable.items(), parts, strict=True)}

    def round(self, flat: Tensor) -> Tensor:
        """What the parameters would hold: for a float32 model other numbers."""
        named = self._named(flat)
        return torch.cat([named[name].to(p.dtype).double().flatten() for name, p in self.trainable.items()])

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Puts the values into the model."""
        for name, value in self._named(flat).items():
            self.trainable[name].copy_(value)

    # Residuals

    def _call(
        self, function: Callable, scale: float, parameters: Tensor | dict[str, Tensor], rows: Iterable[Tensor]
    ) -> Tensor:
        """(n, m) scaled residuals of n rows, for a flat vector of parameters or for tensors by name."""
        rows = tuple(rows)
        named = parameters if isinstance(parameters, dict) else self._named(parameters)
        values = call_with_parameters(
            self.model, {**self.fixed, **named}, lambda *data: function(self.model, *data), rows, {}
        )
        return scale * values.reshape(len(rows[0]), -1)

    def _leaves(self) -> dict[str, Tensor]:
        return {name: part.detach().requires_grad_() for name, part in self._named(self.start).items()}

    def _key(self, function: Callable, rows: Sequence[Tensor]) -> tuple:
        shapes = tuple((row.shape[1:], row.dtype) for row in rows)
        return id(function), shapes, tuple((name, part.shape) for name, part in self.trainable.items())

    def _examine(self, function: Callable, rows: Sequence[Tensor], scale: float) -> _Note:
        note = _Note(function, self._measure(function, rows, scale, by_layers=False), by_layers=False)
        if (ROWS_BY_HAND + 1) * note.row_bytes <= self.memory:
            try:
                row_bytes = self._measure(function, rows, scale, by_layers=True)
            except Exception:  # not by layers, then; the other way will say what is wrong
                row_bytes = None
            if row_bytes is not None:
                return _Note(function, row_bytes, by_layers=True)
        return note

    def _measure(self, function: Callable, rows: Sequence[Tensor], scale: float, by_layers: bool) -> int | None:
        """The bytes that autograd keeps for one more row of a term, and those of the row's residuals' gradients; with
        `by_layers`, where `row_gradients` makes them, or None if it cannot."""
        kept = []
        least = ROWS_BY_HAND if by_layers else 1
        for count in (least, least + 1):
            sizes: list[int] = []

            def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(tensor.numel() * tensor.element_size())
                return tensor

            head = [row[:1].expand(count, *row.shape[1:]).contiguous() for row in rows]
            leaves = self._leaves()
            saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            record = recording(leaves.values(), count) if by_layers else nullcontext()
            with torch.enable_grad(), saving, record as recorder:
                values = self._call(function, scale, leaves, head)
            if by_layers and not recorder.is_complete(values):
                return None
            kept.append(sum(sizes))
        return max(1, kept[1] - kept[0]) * 3 + 2 * values.shape[1] * self.num_parameters * 8

    def _rows_at_once(self, note: _Note) -> int:
        return max(1, min(self.memory // 2, CHUNK) // note.row_bytes)

    def chunks(self) -> Iterator[tuple[Callable, float, list[Tensor]]]:
        """The terms in parts of as many rows as may be worked on at a time."""
        for function, rows, scale in self.terms:
            size = self._rows_at_once(self.notes[self._key(function, rows)])
            for first in range(0, len(rows[0]), size):
                yield function, scale, [row[first : first + size] for row in rows]

    @torch.no_grad()
    def residuals(self, flat: Tensor) -> Tensor:
        """All of them, (M,)."""
        return torch.cat([self._call(f, scale, flat, rows).flatten() for f, scale, rows in self.chunks()])

    def find_not_finite(self, residuals: Tensor) -> str:
        """The terms whose residuals are NaN or infinite, in words; empty if there are none."""
        bad = ~residuals.isfinite()
        if not bad.any():
            return ""
        words, first = [], 0
        rows = [len(term[1][0]) for term in self.terms]
        per_row = [self._call(f, s, self.start, [r[:1] for r in data]).shape[1] for f, data, s in self.terms]
        for index, (count, width) in enumerate(zip(rows, per_row, strict=True)):
            wrong = int(bad[first : first + count * width].sum())
            first += count * width
            if wrong:
                words.append(f"{wrong} of {count * width} in {name_term(index, self.terms[index][0])}")
        return "residuals are NaN or infinite: " + ", ".join(words) + ". The parameters are unchanged."

    # Jacobian

    def jacobian(self, function: Callable, scale: float, rows: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """
        The derivatives of the residuals of some rows, (n m, P).

        By the inputs and output gradients of KAN layers where these are all that depends on the parameters, and
        otherwise, for any function, one row at a time (`torch.func.vmap`).

        Args:
            out: (n m or more, P); the result is its first rows then.
        """
        note = self.notes[self._key(function, rows)]
        if note.by_layers:
            leaves = self._leaves()
            found = row_gradients(
                lambda: self._call(function, scale, leaves, rows), list(leaves.values()), len(rows[0]), out
            )
            if found is not None:
                return found
            note.by_layers, note.row_bytes = False, self._measure(function, rows, scale, by_layers=False)
        parts = zip(*(row.split(self._rows_at_once(note)) for row in rows), strict=True)
        found = torch.cat([self._jacobian_by_rows(function, scale, part) for part in parts])
        return found if out is None else out[: len(found)].copy_(found)

    def _jacobian_by_rows(self, function: Callable, scale: float, rows: Sequence[Tensor]) -> Tensor:
        def of_one_row(flat: Tensor, *row: Tensor) -> Tensor:
            values, pull = torch.func.vjp(
                lambda parameters: self._call(function, scale, parameters, [part.unsqueeze(0) for part in row])[0],
                flat,
            )
            return torch.stack([pull(unit)[0] for unit in torch.eye(len(values)).to(values)])

        in_dims = (None, *[0] * len(rows))
        return torch.func.vmap(of_one_row, in_dims, randomness="different")(self.start, *rows).flatten(0, 1)

    def pull_back(self, vector: Tensor) -> Tensor:
        """J^T vector, (M,) to (P,), by one backward pass."""
        total, first = torch.zeros_like(self.start), 0
        for function, scale, rows in self.chunks():
            leaves = self._leaves()
            with torch.enable_grad():
                values = self._call(function, scale, leaves, rows).flatten()
            part = vector[first : first + len(values)]
            first += len(values)
            if values.requires_grad:
                found = torch.autograd.grad(values, list(leaves.values()), part, materialize_grads=True)
                total += torch.cat([gradient.flatten() for gradient in found])
        return total

    def linearize(self, residuals: Tensor, floor: float) -> LinearModel:
        """The linear model around the present parameters.

        Raises:
            ValueError: Its matrix does not fit into `memory`.
        """
        return LinearModel(self, residuals, floor)


class LinearModel:
    """
    r + J step, in the space of the P parameters or of the M residuals, whichever is smaller.

    Attributes:
        in_residual_space (`bool`): Which.
        scaling (`Tensor`): S, the diagonal of J^T J bounded from below, (P,).
        matrix (`Tensor`): J^T J, (P, P), or J S^-1 J^T, (M, M).
        jacobian (`Tensor`): J, (M, P), where it fits into half of the memory; None otherwise.
        gradient (`Tensor`): J^T r, (P,).
        complaint (`str`): What is wrong with it; empty if it can be solved.
    """

    def __init__(self, problem: LeastSquares, residuals: Tensor, floor: float) -> None:
        self.problem = problem
        self._residuals = residuals
        self.in_residual_space = len(residuals) < problem.num_parameters
        size = min(len(residuals), problem.num_parameters)
        needed = 2 * size**2 * 8
        if needed > problem.memory:
            raise ValueError(
                f"{problem.num_parameters} trainable parameters and {len(residuals)} residuals make a linear system "
                f"of {size} unknowns, for which {needed / 2**20:.0f} MiB are needed, but `memory` is "
                f"{problem.memory / 2**20:.0f} MiB. Give more, train fewer parameters (an adapter), or use fewer rows."
            )
        self.gradient = torch.zeros_like(problem.start)
        squares = torch.zeros_like(problem.start)
        self.jacobian = None
        if len(residuals) * problem.num_parameters * 8 <= problem.memory // 2:
            self.jacobian = residuals.new_empty(len(residuals), problem.num_parameters)
        elif not self.in_residual_space:
            self.matrix = residuals.new_zeros(size, size)
        first = 0
        for chunk in problem.chunks():
            part = problem.jacobian(*chunk, out=None if self.jacobian is None else self.jacobian[first:])
            self.gradient.addmv_(part.T, residuals[first : first + len(part)])
            if self.jacobian is None and self.in_residual_space:
                squares += part.square().sum(0)
            elif self.jacobian is None:
                self.matrix += _gram(part)
            first += len(part)
        if not self.in_residual_space:
            if self.jacobian is not None:
                self.matrix = _gram(self.jacobian)
            squares = self.matrix.diagonal()
        elif self.jacobian is not None:
            squares = self.jacobian.square().sum(0)
        # Parameters without any effect get the bound, and stay.
        self.scaling = squares.clamp(min=max(floor * squares.max().item(), 1e-300))
        if self.in_residual_space and self.jacobian is not None:
            self.matrix = _gram((self.jacobian / self.scaling.sqrt()).T)
        elif self.in_residual_space:
            self.matrix = self._gram_by_chunks(size)
        self._factored: tuple[float, Tensor | None] = (math.nan, None)
        finite = self.matrix.isfinite().all() and self.gradient.isfinite().all()
        self.complaint = "" if finite else "the Jacobian has NaN or infinite entries. The parameters are unchanged."
        if not self.gradient.any():
            self.complaint = "the gradient is zero: no parameter has an effect on the residuals."

    def _gram_by_chunks(self, size: int) -> Tensor:
        """J S^-1 J^T where J itself does not fit: its parts are computed again for each other part."""
        matrix = self.scaling.new_empty(size, size)
        row = 0
        for number, chunk in enumerate(self.problem.chunks()):
            part = self.problem.jacobian(*chunk) / self.scaling
            column = 0
            for other_number, other_chunk in enumerate(self.problem.chunks()):
                if other_number > number:
                    break
                other = self.problem.jacobian(*other_chunk)
                block = part @ other.T
                matrix[row : row + len(part), column : column + len(other)] = block
                matrix[column : column + len(other), row : row + len(part)] = block.T
                column += len(other)
            row += len(part)
        return matrix

    def _factor(self, damping: float) -> Tensor | None:
        """The Cholesky factor of the damped matrix, kept for the next call; None if it is singular to rounding."""
        if self._factored[0] != damping:
            diagonal = self.matrix.diagonal()
            undamped = diagonal.clone()
            diagonal += damping if self.in_residual_space else damping * self.scaling
            triangle, failed = torch.linalg.cholesky_ex(self.matrix)
            diagonal.copy_(undamped)
            self._factored = (damping, None if failed else triangle)
        return self._factored[1]

    def solve(self, damping: float, residuals: Tensor) -> Tensor | None:
        """-(J^T J + damping S)^-1 J^T residuals, (P,); None if the matrix is singular to rounding."""
        triangle = self._factor(damping)
        if triangle is None:
            return None
        if self.in_residual_space:
            step = -self._transposed(_solve(triangle, residuals)) / self.scaling
        else:
            gradient = self.gradient if residuals is self._residuals else self._transposed(residuals)
            step = -_solve(triangle, gradient)
        return step if step.isfinite().all() else None

    def _transposed(self, vector: Tensor) -> Tensor:
        """J^T vector."""
        return self.problem.pull_back(vector) if self.jacobian is None else self.jacobian.T @ vector

    def promised(self, damping: float, step: Tensor) -> float:
        """By how much the sum of squares falls in the linear model, for the step of this damping."""
        return (damping * self.scaling * step.square() - self.gradient * step).sum().item()

    def norm(self, step: Tensor) -> float:
        """The length of a step in the metric S."""
        return (self.scaling * step.square()).sum().sqrt().item()

    def bend(self, step: Tensor) -> Tensor:
        """The second derivative of the residuals along a step, (M,), by differences over a tenth of it: to the linear
        model where J is there, otherwise central ones, which are one more evaluation."""
        share = 0.1
        ahead = self.problem.residuals(self.problem.start + share * step)
        if self.jacobian is not None:
            return 2 * ((ahead - self._residuals) / share - self.jacobian @ step) / share
        behind = self.problem.residuals(self.problem.start - share * step)
        return (ahead - 2 * self._residuals + behind) / share**2


def _solve(triangle: Tensor, vector: Tensor) -> Tensor:
    """(L L^T)^-1 vector; unlike `torch.cholesky_solve`, without a copy of L."""
    half = torch.linalg.solve_triangular(triangle, vector.unsqueeze(1), upper=False)
    return torch.linalg.solve_triangular(triangle.mT, half, upper=True).squeeze(1)


def _gram(matrix: Tensor) -> Tensor:
    """matrix^T matrix, (n, p) to (p, p), in strips of which only what is on the diagonal and right of it is computed:
    58 % of the operations."""
    size = matrix.shape[1]
    gram = matrix.new_empty(size, size)
    width = -(-size // 6)
    for first in range(0, size, width):
        strip = matrix[:, first : first + width].T @ matrix[:, first:]
        gram[first : first + width, first:] = strip
        gram[first:, first : first + width] = strip.T
    return gram
