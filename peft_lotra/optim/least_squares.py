# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Sums of squared residuals of a model: their values, and their Jacobian by rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.observer import observing
from ..modules.calls import call_with_parameters
from ..modules.checks import as_number
from .evaluation import evaluating
from .recording import Recorder
from .row_gradients import row_gradients
from .shards import Shards


CHUNK = 2**27  # bytes of a chunk of rows: enough for a small overhead, and no more, since fresh memory is slow

# Rows of a trial by layers: from 65 on KAN layers are evaluated by hand, and a prime tells the tensors that have rows.
TRIAL_ROWS = 67

Term = tuple[Callable[..., Tensor], Sequence[Tensor], float]


@dataclass
class TermPlan:
    """How the Jacobian of a term is computed; its numbers do not depend on it."""

    function: Callable[..., Tensor]  # kept here so that no other function gets its `id`
    bytes_by_rows: int  # the memory that one more row takes by `torch.func.vmap`
    bytes_by_layers: int = 0  # the same by `row_gradients`; 0 if the network cannot be recorded

    @property
    def row_bytes(self) -> int:
        """The memory that one more row takes."""
        return self.bytes_by_layers or self.bytes_by_rows


Plans = dict[tuple, TermPlan]


def check_terms(terms: Iterable[Any], least: int = 1) -> list[Term]:
    """Residual terms with their rows as a tuple and their weight filled in; a malformed one is a ValueError, and so is
    one with fewer rows than `least`."""
    checked = []
    if isinstance(terms, (str, Mapping)) or not isinstance(terms, Iterable):
        raise ValueError(f"The residual terms are a {type(terms).__name__}, but must be a list of (function, rows).")
    for index, term in enumerate(terms):
        if not isinstance(term, Sequence) or len(term) not in (2, 3) or not callable(term[0]):
            raise ValueError(
                f"Residual term {index} is {type(term).__name__}, but must be (function, rows), or with a weight "
                "behind: (function, rows, weight)."
            )
        parts: tuple[Any, ...] = (*term, 1.0)
        function, rows, weight = parts[:3]
        rows = tuple(rows) if isinstance(rows, Sequence) else (rows,)
        if not rows or not all(isinstance(row, Tensor) and row.dim() and not row.is_meta for row in rows):
            raise ValueError(f"The rows of {name_term(index, function)} must be tensors with values, at least one.")
        if len({len(row) for row in rows}) > 1 or len(rows[0]) < least:
            raise ValueError(
                f"The rows of {name_term(index, function)} have lengths {[len(row) for row in rows]}, but must be "
                f"equally many{', at least one' * least}."
            )
        if not as_number(weight) > 0:
            raise ValueError(f"The weight of {name_term(index, function)} is {weight!r:.100}, but must be above 0.")
        checked.append((function, rows, float(weight)))
    if not checked:
        raise ValueError("There are no residual terms.")
    return checked


def name_term(index: int, function: Callable) -> str:
    """The name of a term in messages."""
    return f"residual term {index} ({getattr(function, '__name__', type(function).__name__)})"


def _list_modules(names: list[str]) -> str:
    return f" (here of {', '.join(repr(name) for name in names)})" if names else ""


class LeastSquares:
    """The residuals as a function of the flat vector of the trainable parameters, in float64.

    Each residual is multiplied by sqrt(weight / rows) of its term, so that the loss is the sum of their squares. Only
    `write` changes the model. The `plans` of the step before spare its terms another measurement. Rows, residuals and
    Jacobians are those of this process, losses those of all `shards`.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        terms: list[Term],
        memory: int,
        plans: Plans,
        shards: Shards | None = None,
    ) -> None:
        self.model = model
        self.trainable = trainable
        self.memory = memory
        self.shards = shards = shards or Shards()
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.fixed = {  # in float64, and none of those that autograd refuses to keep
            name: tensor.detach().double().clone() if tensor.is_floating_point() else tensor.clone()
            for name, tensor in state.items()
            if name not in trainable
            and (tensor.is_inference() or tensor.is_floating_point() and tensor.dtype != torch.float64)
        }
        self.sizes = [parameter.numel() for parameter in trainable.values()]
        self.num_parameters = sum(self.sizes)
        self.start = torch.cat([parameter.detach().double().flatten() for parameter in trainable.values()])
        self.modes = tuple(part.training for part in model.modules())
        self.terms: list[Term] = []
        self.plans: Plans = {}
        self._marked: dict[int, set[int]] = {}  # by the id of a function, which of its rows require a gradient
        totals = shards.count_rows(
            [name_term(index, term[0]) for index, term in enumerate(terms)],
            [len(rows[0]) for _, rows, _ in terms],
            [weight for *_, weight in terms],
            self.start,
        )
        shards.run(self._add_terms, terms, totals, plans)

    def _add_terms(self, terms: list[Term], totals: list[int], plans: Plans) -> None:
        for (function, rows, weight), total in zip(terms, totals, strict=True):
            marked = {place for place, row in enumerate(rows) if row.requires_grad}
            self._marked[id(function)] = self._marked.get(id(function), set()) | marked
            rows = tuple(  # copies, into which a function may write before it is found out
                row.detach().to(torch.float64 if row.is_floating_point() else row.dtype, copy=True) for row in rows
            )
            self.terms.append((function, rows, math.sqrt(weight / total)))
            key = self._key(function, rows)
            if key not in self.plans and len(rows[0]):
                if key not in plans:
                    self._check_rows(function, rows, 2)
                self.plans[key] = plans.get(key) or self._plan(function, rows)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(self.sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.trainable.items(), parts, strict=True)}

    def round(self, flat: Tensor) -> Tensor:
        """The values as the parameters would store them, which have fewer digits in a float32 model."""
        named = self._named(flat)
        return torch.cat([named[name].to(p.dtype).double().flatten() for name, p in self.trainable.items()])

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Puts the values into the model."""
        for name, value in self._named(flat).items():
            self.trainable[name].copy_(value)

    def _call(self, function: Callable, scale: float, named: dict[str, Tensor], rows: Sequence[Tensor]) -> Tensor:
        """(n, m) scaled residuals of n rows, with these tensors for the trainable parameters; with a graph if the
        function makes one."""
        evaluate = partial(function, self.model)
        with evaluating(partial(self._name, function)):
            given = tuple(row.detach() for row in rows)  # tensors of this call, which the function may mark as well
            for place in self._marked.get(id(function), ()):
                given[place].requires_grad_()
            values = call_with_parameters(self.model, {**self.fixed, **named}, evaluate, given, {})
        n, is_tensor = len(rows[0]), isinstance(values, Tensor)
        if not is_tensor or not values.is_floating_point() or values.shape[:1] != (n,) or not values.numel():
            given = f"{values.dtype} of shape {tuple(values.shape)}" if is_tensor else type(values).__name__
            raise ValueError(
                f"{self._name(function)} returns {given} for {n} rows, but must return floating point numbers "
                f"of shape ({n},) or ({n}, m): the residuals of each row, without a mean over rows."
            )
        return scale * values.reshape(n, -1).double()

    def _name(self, function: Callable) -> str:
        return "The " + name_term([term[0] for term in self.terms].index(function), function)

    @torch.no_grad()
    def _check_rows(self, function: Callable, rows: Sequence[Tensor], most: int) -> None:
        """Refuses residuals that are random, that change with the other rows, or that write into what they are given.

        Up to `most` rows are evaluated beside as many others, and beside themselves. Equal shapes make equal rounding.
        """
        n = len(rows[0])
        half = max(1, min(most, n // 2))
        first, second = [row[:half] for row in rows], [row[-half:] if n < 2 else row[half : 2 * half] for row in rows]
        buffers = {name: tensor.clone() for name, tensor in self.model.named_buffers()}  # batch normalization writes

        def evaluate(*parts: list[Tensor]) -> Tensor:
            together = [torch.cat(row) for row in zip(*parts, strict=True)]
            named = {**buffers, **self.fixed, **self._named(self.start)}
            with self._unwritten(function, self.start, *together):
                return self._call(function, 1.0, named, together).detach()

        def differ(values: Tensor, others: Tensor) -> bool:
            tolerance = 1e-7 * values.nan_to_num(0, 0, 0).abs().max().item() + 1e-10
            return values.shape != others.shape or not torch.allclose(values, others, 1e-7, tolerance, equal_nan=True)

        before = self._random_state()
        both = evaluate(first, second)
        coupled = differ(both[:half], evaluate(first, first)[:half])
        coupled = coupled or differ(both[half:], evaluate(second, second)[half:])
        if both.shape[1] % len(both) == 0 and len(evaluate(first)[0]) != both.shape[1]:
            raise ValueError(
                f"{self._name(function)} returns {(n, both.shape[1] * n // len(both))} for {n} rows, but must return "
                f"({n},) or ({n}, m) with a fixed m. Shapes ({n},) and ({n}, 1) make such a square by broadcasting: "
                "squeeze or unsqueeze one of the two."
            )
        training = [(name, part) for name, part in self.model.named_modules() if part.training]
        if not torch.equal(before, self._random_state()) or (coupled and differ(both, evaluate(first, second))):
            kinds = [n for n, part in training if getattr(part, "is_random", "Dropout" in type(part).__name__)]
            raise ValueError(
                f"{self._name(function)} is random, so that two evaluations differ. Draw before the step and pass the "
                f"draws as rows, and turn dropout off by `model.eval()`{_list_modules(kinds)}."
            )
        if coupled:
            kinds = [n for n, part in training if "BatchNorm" in type(part).__name__]
            raise ValueError(
                f"{self._name(function)} returns residuals of a row that depend on the other rows, but each must "
                "depend on its own row alone. Give what a residual needs in its row, and put batch normalization into "
                f"evaluation mode by `model.eval()`{_list_modules(kinds)}."
            )

    @contextmanager
    def _unwritten(self, function: Callable, *given: Tensor) -> Iterator[None]:
        """Raises a `ValueError` if what a function is given, the trainable parameters and its rows, is written."""
        before = [tensor.clone() for tensor in given]
        yield
        pairs = zip(given, before, strict=True)
        if not all(torch.equal(*pair) or torch.allclose(*pair, 0, 0, equal_nan=True) for pair in pairs):
            raise ValueError(
                f"{self._name(function)} writes into its rows, or into a parameter of the model. Make a new tensor: "
                "`x = x * 2` for `x *= 2`, and `torch.where` for an assignment to a part."
            )

    def _random_state(self) -> Tensor:
        on_gpu = self.start.is_cuda
        return torch.cuda.get_rng_state(self.start.device) if on_gpu else torch.get_rng_state()

    def _leaves(self) -> dict[str, Tensor]:
        return {name: part.detach().requires_grad_() for name, part in self._named(self.start).items()}

    def _key(self, function: Callable, rows: Sequence[Tensor]) -> tuple:
        shapes = tuple((row.shape[1:], row.dtype) for row in rows)
        return id(function), self.modes, shapes, tuple((name, part.shape) for name, part in self.trainable.items())

    def _plan(self, function: Callable, rows: Sequence[Tensor]) -> TermPlan:
        """Measures what autograd keeps for a row, and whether the Jacobian can be computed by layers."""
        leaves = self._leaves()
        values, one = self._trial(function, rows, 1, leaves)
        _, two = self._trial(function, rows, 2, leaves)
        gradients = 2 * values.shape[1] * self.num_parameters * 8
        plan = TermPlan(function, 3 * max(1, sum(two) - sum(one)) + gradients)
        if TRIAL_ROWS * plan.row_bytes > self.memory:
            return plan
        try:
            with observing(Recorder(leaves.values(), TRIAL_ROWS)) as recorder:
                values, sizes = self._trial(function, rows, TRIAL_ROWS, leaves)
            if recorder.is_complete(values):
                kept = sum(size for size in sizes if size % TRIAL_ROWS == 0) // TRIAL_ROWS
                plan.bytes_by_layers = 3 * max(1, kept) + gradients
        except Exception:  # not by layers, then: an error of the function is met again in the evaluation
            pass
        return plan

    def _trial(
        self, function: Callable, rows: Sequence[Tensor], count: int, leaves: dict[str, Tensor]
    ) -> tuple[Tensor, list[int]]:
        """The residuals of the first row `count` times, and the bytes of each tensor that autograd keeps."""
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor.detach()  # the tensor itself would hold the graph that holds it

        head = [row[:1].expand(count, *row.shape[1:]).contiguous() for row in rows]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return self._call(function, 1.0, leaves, head), sizes

    def _rows_at_once(self, plan: TermPlan) -> int:
        return max(1, min(self.memory // 2, CHUNK) // plan.row_bytes)

    def chunks(self) -> Iterator[tuple[Callable, float, list[Tensor]]]:
        """(function, scale, rows) of each term, in chunks of as many rows as fit."""
        for function, rows, scale in self.terms:
            size = self._rows_at_once(self.plans[self._key(function, rows)]) if len(rows[0]) else 1
            for first in range(0, len(rows[0]), size):
                yield function, scale, [row[first : first + size] for row in rows]

    @torch.no_grad()
    def residuals(self, flat: Tensor) -> Tensor:
        """All residuals, (M,)."""
        named, parts = self._named(flat), [self.start.new_empty(0)]
        for function, scale, rows in self.chunks():
            with self._unwritten(function, flat, *rows):
                parts.append(self._call(function, scale, named, rows).detach().flatten())
        return torch.cat(parts)

    def find_not_finite(self, residuals: Tensor) -> str:
        """A message that names the terms whose residuals are NaN or infinite; empty if there are none."""
        bad = ~residuals.isfinite()
        if not bad.any():
            return ""
        words = []
        for index, (wrong, (function, rows, _)) in enumerate(zip(bad.split(self._counts()), self.terms, strict=True)):
            if wrong.any():
                row = int(wrong.view(len(rows[0]), -1).any(1).nonzero()[0])
                values = ", ".join(str([round(v, 6) for v in part[row].flatten()[:8].tolist()]) for part in rows)
                found = f"{int(wrong.sum())} of {len(wrong)} in {name_term(index, function)}"
                words.append(f"{found}, first in row {row}: {values}")
        return "residuals are NaN or infinite: " + "; ".join(words) + ". The parameters are unchanged."

    def _counts(self) -> list[int]:
        """The number of residuals of each term."""
        named, counts = self._named(self.start), []
        for function, rows, scale in self.terms:
            if not len(rows[0]):
                counts.append(0)
                continue
            with torch.no_grad():
                one = self._call(function, scale, named, [row[:1] for row in rows])
            counts.append(len(rows[0]) * one.shape[1])
        return counts

    def losses(self, residuals: Tensor) -> tuple[float, ...]:
        """The part of the loss of each term."""
        parts = [residuals] if len(self.terms) == 1 else residuals.split(self._counts())
        return tuple(self.shards.sum(torch.stack([part.square().sum() for part in parts])).tolist())

    def loss(self, residuals: Tensor) -> float:
        """The sum of all squares."""
        return self.shards.sum(residuals.square().sum()).item()

    def jacobian(self, function: Callable, scale: float, rows: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The derivatives of the residuals of some rows, (n m, P), in the first rows of `out` if given.

        They come from `row_gradients` if only KAN layers depend on the parameters, from `torch.func.vmap` otherwise.
        """
        plan = self.plans[self._key(function, rows)]
        if plan.bytes_by_layers:
            leaves = self._leaves()
            evaluate = partial(self._call, function, scale, leaves, rows)
            found = row_gradients(evaluate, list(leaves.values()), len(rows[0]), out)
            if found is not None:
                return found
            plan.bytes_by_layers = 0
            self._check_rows(function, rows, len(rows[0]))
        parts = zip(*(row.split(self._rows_at_once(plan)) for row in rows), strict=True)
        found = torch.cat([self._jacobian_by_rows(function, scale, part) for part in parts])
        return found if out is None else out[: len(found)].copy_(found)

    def _jacobian_by_rows(self, function: Callable, scale: float, rows: Sequence[Tensor]) -> Tensor:
        def of_one_row(flat: Tensor, *row: Tensor) -> Tensor:
            one = [part.unsqueeze(0) for part in row]
            values, pull, *_ = torch.func.vjp(lambda p: self._call(function, scale, self._named(p), one)[0], flat)
            return torch.stack([pull(unit)[0] for unit in torch.eye(len(values), device=values.device).to(values)])

        of_rows = torch.func.vmap(of_one_row, (None, *[0] * len(rows)), randomness="different")
        return of_rows(self.start, *rows).flatten(0, 1)

    def pull_back(self, vector: Tensor) -> Tensor:
        """J^T vector, (M,) to (P,), by one backward pass."""
        total, first = torch.zeros_like(self.start), 0
        for function, scale, rows in self.chunks():
            leaves = self._leaves()
            with torch.enable_grad():
                values = self._call(function, scale, leaves, rows).flatten()
            if values.requires_grad:
                part = vector[first : first + len(values)]
                found = torch.autograd.grad(values, list(leaves.values()), part, materialize_grads=True)
                total += torch.cat([gradient.flatten() for gradient in found])
            first += len(values)
        return total
