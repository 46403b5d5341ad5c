# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Sums of squared residuals of a model: their values, and their Jacobian by rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from ..derivatives.torch_fallback import ExactNorms
from ..modules.calls import call_with_parameters
from ..modules.checks import as_number
from .jacobian import row_gradients
from .shards import Shards


CHUNK = 2**27  # bytes of a chunk of rows: enough for a small overhead, and no more, since fresh memory is slow

# Rows of a trial by layers: from 65 on KAN layers have a backward pass by hand, and a prime tells tensors with rows.
TRIAL_ROWS = 67

Term = tuple[Callable[..., Tensor], Sequence[Tensor], float]


@dataclass
class PreparedTerm:
    """A term with its rows in float64, and how it is evaluated, which is found out when its function is first seen."""

    name: str
    function: Callable[..., Tensor]  # kept here so that no other function gets its `id`
    rows: tuple[Tensor, ...]
    marked: list[bool]  # which of these tensors require a gradient
    scale: float  # of the residuals; the weight, until all processes have told their numbers of rows
    intercepted: bool = False  # whether calls run under `Intercepted`
    columns: int = 0  # the number of residuals of a row
    row_bytes: int = 1  # the memory of one row
    by_layers: bool = False  # whether the Jacobian comes from `row_gradients`, and not from `torch.func.vmap`


Known = dict[tuple, PreparedTerm]  # by the function, and the shapes of rows and parameters


class Intercepted(ExactNorms):
    """Keeps the graphs of derivatives that a residual function takes, which lead to the parameters.

    Attributes:
        is_needed: Whether the function called something that must be intercepted. Calls with `create_graph=True` need
            nothing, and operations are then spared the way through Python.
    """

    is_needed = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.backward:
            raise ValueError(
                "`backward` in a residual function returns no derivatives. Replace `u.sum().backward()` and `x.grad` "
                "by `(u_x,) = torch.autograd.grad(u.sum(), x)`, or all of it by `u, du, d2u = jet(model, x)`."
            )
        kwargs = kwargs or {}
        if func is torch.autograd.grad and not kwargs.get("create_graph"):
            kwargs = {**kwargs, "create_graph": True}
            self.is_needed = True
        self.is_needed |= func in (F.layer_norm, torch.layer_norm)
        return super().__torch_function__(func, types, args, kwargs)


def check_terms(terms: Iterable[Any], least: int = 1) -> list[Term]:
    """Return residual terms with their rows as a tuple, and a weight.

    Raises:
        ValueError: A term is malformed, or has fewer rows than `least`.
    """
    checked: list[Term] = []
    if not isinstance(terms, Iterable):
        raise TypeError(f"`terms` is {terms!r:.100}, but must be a list of residual terms.")
    for index, term in enumerate(terms):
        if not isinstance(term, Sequence) or len(term) not in (2, 3) or not callable(term[0]):
            raise ValueError(
                f"Residual term {index} is {type(term).__name__}, but must be (function, rows), or with a weight "
                "behind: (function, rows, weight). `terms` is a list of these."
            )
        function, rows, weight, *_ = (*term, 1.0)
        name = name_term(index, function)
        rows = tuple(rows) if isinstance(rows, Sequence) else (rows,)
        if not rows or not all(isinstance(row, Tensor) and row.dim() and not row.is_meta for row in rows):
            raise ValueError(f"The rows of {name} must be tensors with values, at least one.")
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1 or lengths[0] < least:
            raise ValueError(
                f"The rows of {name} have lengths {lengths}, but must be equally many{', at least one' * least}."
            )
        if not as_number(weight) > 0:
            raise ValueError(f"The weight of {name} is {weight!r:.100}, but must be above 0.")
        checked.append((function, rows, float(weight)))
    if not checked:
        raise ValueError("There are no residual terms.")
    return checked


def name_term(index: int, function: Callable) -> str:
    """The name of a term in messages."""
    return f"residual term {index} ({getattr(function, '__name__', type(function).__name__)})"


def check_residuals(values: Any, name: str, count: int) -> Tensor:
    """Return the residuals of rows as (count, m) in float64; a `ValueError` if they are malformed."""
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or not values.is_floating_point() or values.shape[:1] != (count,) or not values.numel():
        given = f"{values.dtype} of shape {tuple(values.shape)}" if is_tensor else type(values).__name__
        raise ValueError(
            f"The {name} returns {given} for {count} rows, but must return floating point numbers of shape "
            f"({count},) or ({count}, m): the residuals of each row, without a mean over rows."
        )
    return values.reshape(count, -1).double()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name; raise a `ValueError` if there are none."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "No parameter of the model requires a gradient. Load the adapter with `is_trainable=True`, or activate it "
            "with `model.set_adapter(name)`."
        )
    return trainable


def check_trainable(model: nn.Module) -> None:
    """Raise a `ValueError` unless the model can be trained."""
    if any(parameter.is_inference() for parameter in trainable_parameters(model).values()):
        raise ValueError("The model was made under `torch.inference_mode()`, and cannot be trained: make it outside.")


def in_double(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of lower precision, in float64."""
    state = (*model.named_parameters(), *model.named_buffers())
    return {name: t.detach().double() for name, t in state if t.is_floating_point() and t.dtype != torch.float64}


class LeastSquares:
    """The residuals as a function of the flat vector of the trainable parameters, in float64.

    Each residual is multiplied by sqrt(weight / rows) of its term, so that the loss is the sum of their squares. Only
    `write` changes the model. Terms that are `known` from the step before are spared another trial. Rows, residuals
    and Jacobians are those of this process, losses those of all `shards`.
    """

    def __init__(
        self, model: nn.Module, terms: list[Term], memory: int, known: Known, shards: Shards | None = None
    ) -> None:
        self.model = model
        self.memory = memory
        self.shards = shards or Shards()
        self.trainable = trainable_parameters(model)
        self.fixed = in_double(model)  # the trainable ones are always replaced
        self.sizes = [parameter.numel() for parameter in self.trainable.values()]
        self.start = torch.cat([parameter.detach().double().flatten() for parameter in self.trainable.values()])
        self.num_parameters = len(self.start)
        self.terms: list[PreparedTerm] = []
        self.known: Known = {}
        for index, (function, rows, weight) in enumerate(terms):
            marked = [row.requires_grad for row in rows]
            rows = tuple(row.detach().double() if row.is_floating_point() else row for row in rows)
            self.terms.append(PreparedTerm(name_term(index, function), function, rows, marked, weight))
        sizes = [(term.name, term.scale, len(term.rows[0])) for term in self.terms]
        self.shards.run(self._prepare, self.shards.count_rows(sizes, self.start), known)

    def _prepare(self, counts: list[int], known: Known) -> None:
        """Scale the terms by their numbers of rows, and try those that are not known."""
        setting = [(name, parameter.shape) for name, parameter in self.trainable.items()]
        setting += [module.training for module in self.model.modules()]
        for term, count in zip(self.terms, counts, strict=True):
            term.scale = math.sqrt(term.scale / count)
            if not len(term.rows[0]):
                continue
            # bound methods are new at each access
            function = term.function if isinstance(term.function, Hashable) else id(term.function)
            key = function, *setting, *((row.shape[1:], row.dtype) for row in term.rows)
            before = self.known.get(key) or known.get(key)
            if before is None:
                self._check(term)
                self._measure(term)
            else:
                term.intercepted, term.columns = before.intercepted, before.columns
                term.row_bytes, term.by_layers = before.row_bytes, before.by_layers
            self.known[key] = term

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parameters = zip(self.trainable.items(), flat.split(self.sizes), strict=True)
        return {name: values.view_as(parameter) for (name, parameter), values in parameters}

    def _leaves(self) -> dict[str, Tensor]:
        return {name: values.detach().requires_grad_() for name, values in self._named(self.start).items()}

    def round(self, flat: Tensor) -> Tensor:
        """Return the values as the parameters store them, with fewer digits in a float32 model."""
        named = self._named(flat)
        return torch.cat([named[name].to(p.dtype).double().flatten() for name, p in self.trainable.items()])

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Put the values into the model."""
        for name, values in self._named(flat).items():
            self.trainable[name].copy_(values)

    def _call(self, term: PreparedTerm, rows: Sequence[Tensor], named: dict[str, Tensor]) -> Tensor:
        """Return the scaled residuals (n, m) of n rows, with these tensors for the trainable parameters."""
        with torch.enable_grad(), Intercepted() if term.intercepted else nullcontext():
            # copies, which the function may mark, and write into
            copies = tuple(row.detach().clone().requires_grad_(m) for row, m in zip(rows, term.marked, strict=True))
            evaluate = partial(term.function, self.model)
            values = call_with_parameters(self.model, {**self.fixed, **named}, evaluate, copies, {})
        return term.scale * check_residuals(values, term.name, len(rows[0]))

    @torch.no_grad()
    def _check(self, term: PreparedTerm) -> None:
        """Raise a `ValueError` unless the residuals of a row depend on that row alone.

        They must not be random, and their number must not depend on the number of rows.
        """
        # copies, since batch normalization writes into them
        buffers = {name: it.clone() for name, it in self.model.named_buffers() if name not in self.fixed}
        named = {**buffers, **self._named(self.start)}

        def evaluate(*places: int) -> Tensor:
            return self._call(term, [row[list(places)] for row in term.rows], named).detach()

        def differ(values: Tensor, others: Tensor) -> bool:
            tolerance = 1e-7 * values.nan_to_num(0, 0, 0).abs().max().item() + 1e-10
            return values.shape != others.shape or not torch.allclose(values, others, 1e-7, tolerance, equal_nan=True)

        with Intercepted() as mode:
            pair = evaluate(0, -1)
        term.intercepted = mode.is_needed
        # module dropout often draws the same twice
        if any(differ(pair, evaluate(0, -1)) for _ in range(3)):
            raise ValueError(
                f"The {term.name} is random, so that two evaluations differ. Draw before the step and pass the draws "
                "as rows, and turn dropout off by `model.eval()`."
            )
        # (n, n) of two rows has two columns, of one row one
        if pair.shape[1] % 2 == 0 and evaluate(0).shape[1] != pair.shape[1]:
            n = len(term.rows[0])
            raise ValueError(
                f"The {term.name} returns {(n, pair.shape[1] * n // 2)} for {n} rows, but must return ({n},) or "
                f"({n}, m) with a fixed m. Shapes ({n},) and ({n}, 1) make such a square: squeeze one of them."
            )
        if differ(pair[:1], evaluate(0, 0)[:1]):
            raise ValueError(
                f"The {term.name} returns residuals of a row that depend on other rows. Give all that a residual "
                "needs in its row, and put batch normalization into evaluation mode by `model.eval()`."
            )

    def _measure(self, term: PreparedTerm) -> None:
        """Find the memory of a row, and whether `row_gradients` computes the Jacobian."""
        leaves = self._leaves()
        rows = [row[torch.arange(TRIAL_ROWS, device=row.device) % len(row)] for row in term.rows]
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor.detach()  # the tensor itself would hold the graph that holds it

        def evaluate() -> Tensor:
            """Return the residuals, and put the bytes of each tensor saved for the backward pass into `sizes`."""
            sizes.clear()
            try:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    return self._call(term, rows, leaves)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):  # transforms of torch.func do not take them
                    raise
                return self._call(term, rows, leaves)

        def row_bytes() -> int:
            """Return the bytes that a row saves, without the parameters, and those of its gradients."""
            of_rows = sum(size for size in sizes if size % TRIAL_ROWS == 0)
            return 3 * of_rows // TRIAL_ROWS + 2 * term.columns * self.num_parameters * 8

        term.columns = evaluate().shape[1]
        term.row_bytes = row_bytes()
        if TRIAL_ROWS * term.row_bytes > self.memory:
            return
        with suppress(RuntimeError):  # of a function that writes into the output of a layer, which is a leaf here
            jacobian = row_gradients(evaluate, list(leaves.values()), TRIAL_ROWS)
            if jacobian is None:
                return
            # a function that reorders its rows on the way is not differentiated row by row
            weights = jacobian.new_ones(len(jacobian)).cumsum(0).cos()
            expected = self._pull_back(term, rows, weights)
            error = jacobian.T @ weights - expected
            if error.abs().max() <= 1e-6 * expected.abs().max():  # not if one is NaN
                term.by_layers = True
                term.row_bytes = row_bytes()

    def chunks(self) -> Iterator[tuple[PreparedTerm, list[Tensor]]]:
        """Yield each term with its rows, in chunks of as many rows as fit."""
        for term in self.terms:
            size = max(1, min(self.memory // 2, CHUNK) // term.row_bytes)
            for first in range(0, len(term.rows[0]), size):
                yield term, [row[first : first + size] for row in term.rows]

    @torch.no_grad()
    def residuals(self, flat: Tensor) -> Tensor:
        """Return all residuals, (M,)."""
        named = self._named(flat)
        residuals = [self.start.new_empty(0)]
        for term, rows in self.chunks():
            residuals.append(self._call(term, rows, named).detach().flatten())
        return torch.cat(residuals)

    def find_not_finite(self, residuals: Tensor) -> str:
        """Return a message that names the terms whose residuals are NaN or infinite; empty if there are none."""
        words = []
        for term, of_term in zip(self.terms, self._split(residuals), strict=True):
            wrong = ~of_term.isfinite()
            if wrong.any():
                row = int(wrong.nonzero()[0]) // term.columns
                values = ", ".join(str([round(v, 6) for v in rows[row].flatten()[:8].tolist()]) for rows in term.rows)
                words.append(f"{int(wrong.sum())} of {len(wrong)} in {term.name}, first in row {row}: {values}")
        if not words:
            return ""
        return f"residuals are NaN or infinite: {'; '.join(words)}. The parameters are unchanged."

    def _split(self, residuals: Tensor) -> Sequence[Tensor]:
        """Return the residuals of each term."""
        return residuals.split([len(term.rows[0]) * term.columns for term in self.terms])

    def losses(self, residuals: Tensor) -> tuple[float, ...]:
        """Return the part of the loss of each term."""
        squares = [of_term.square().sum() for of_term in self._split(residuals)]
        return tuple(self.shards.sum(torch.stack(squares)).tolist())

    def jacobian(self, term: PreparedTerm, rows: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Return the derivatives of the residuals of some rows, (n m, P), in the first rows of `out` if it is given.

        They come from `row_gradients` if only KAN layers depend on the parameters, from `torch.func.vmap` otherwise.
        """
        if term.by_layers:
            leaves = self._leaves()
            evaluate = partial(self._call, term, rows, leaves)
            jacobian = row_gradients(evaluate, list(leaves.values()), len(rows[0]), out)
            if jacobian is not None:
                return jacobian
        jacobian = self._jacobian_by_rows(term, rows)
        return jacobian if out is None else out[: len(jacobian)].copy_(jacobian)

    def _jacobian_by_rows(self, term: PreparedTerm, rows: Sequence[Tensor]) -> Tensor:
        def of_one_row(flat: Tensor, *row: Tensor) -> Tensor:
            batch = [tensor.unsqueeze(0) for tensor in row]
            values, pull, *_ = torch.func.vjp(lambda p: self._call(term, batch, self._named(p))[0], flat)
            return torch.stack([pull(unit)[0] for unit in torch.eye(len(values), device=values.device).to(values)])

        try:
            with enable_inplace_requires_grad(True):  # for functions that call `x.requires_grad_()`
                of_rows = torch.func.vmap(of_one_row, (None, *[0] * len(rows)), randomness="different")
                return of_rows(self.start, *rows).flatten(0, 1)
        except RuntimeError as error:
            raise ValueError(
                f"The {term.name} cannot be evaluated row by row, as it must for a model that is no chain of KAN "
                f"layers: {error} Replace `if` of tensors by `torch.where`, and `.item()` by the tensor."
            ) from error

    def pull_back(self, vector: Tensor) -> Tensor:
        """Return J^T vector, (M,) to (P,), by one backward pass."""
        total = torch.zeros_like(self.start)
        chunks = list(self.chunks())
        parts = vector.split([len(rows[0]) * term.columns for term, rows in chunks])
        for chunk, part in zip(chunks, parts, strict=True):
            total += self._pull_back(*chunk, part)
        return total

    def _pull_back(self, term: PreparedTerm, rows: Sequence[Tensor], vector: Tensor) -> Tensor:
        leaves = self._leaves()
        values = self._call(term, rows, leaves)
        if not values.requires_grad:
            return torch.zeros_like(self.start)
        gradients = torch.autograd.grad(values.flatten(), list(leaves.values()), vector, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])
