# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A sum of squared residuals as a function of the trainable parameters, and the Jacobian of the residuals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.nn.utils import parameters_to_vector

from ..derivatives.torch_fallback import ExactNorms
from ..modules.calls import call_with_parameters, check_loaded
from ..modules.checks import as_number
from .jacobian import row_gradients
from .shards import Shards


CHUNK = 2**27  # bytes of a chunk of rows: enough for a small overhead, and no more, since fresh memory is slow

# Rows of a trial. From 65 rows on, KAN layers use their own backward pass. The prime tells which tensors have rows.
TRIAL_ROWS = 67

Term = tuple[Callable[..., Tensor], Sequence[Tensor], float]


@dataclass
class Trial:
    """How a residual function is evaluated, as its first evaluation showed.

    Attributes:
        function: The function. While it exists, no other function has its `id`.
        intercepted: Whether calls must run under `Intercepted`.
        columns: The number of residuals of a row.
        row_bytes: The memory of one row.
        by_layers: Whether `row_gradients` computes the Jacobian, and not `torch.func.vmap`.
        by_rows: Whether `vmap` refuses the function, so that each row is differentiated separately.
    """

    function: Callable[..., Tensor] | None = None
    intercepted: bool = False
    columns: int = 0
    row_bytes: int = 1
    by_layers: bool = False
    by_rows: bool = False


Trials = dict[tuple, Trial]


@dataclass
class PreparedTerm:
    """A term with its rows in float64.

    Attributes:
        requires_grad: Whether each tensor of `rows` requires a gradient.
        scale: The factor of the residuals, sqrt(weight / number of rows in all processes).
    """

    name: str
    function: Callable[..., Tensor]
    rows: tuple[Tensor, ...]
    requires_grad: list[bool]
    scale: float
    trial: Trial = field(default_factory=Trial)

    @property
    def columns(self) -> int:
        """The number of residuals of a row."""
        return self.trial.columns


class Intercepted(ExactNorms):
    """Keeps the graphs of derivatives that a residual function computes, which lead to the parameters.

    Attributes:
        is_needed: Whether the function called something that must be intercepted. Other functions run without this
            mode, which costs a call of Python for each operation.
    """

    is_needed = False

    def __torch_function__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        kwargs = kwargs or {}
        if func is torch.autograd.grad and not kwargs.get("create_graph"):
            kwargs = {**kwargs, "create_graph": True}
            self.is_needed = True
        self.is_needed |= func in (F.layer_norm, torch.layer_norm)
        return super().__torch_function__(func, types, args, kwargs)


def check_terms(terms: Iterable[Any]) -> list[Term]:
    """Return residual terms with their rows as a tuple, and a weight.

    Raises:
        ValueError: A term is malformed, or there is none.
    """
    checked = []
    for index, term in enumerate(terms):
        try:
            function, rows, weight, *rest = (*term, 1.0)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`terms[{index}]` is {term!r:.100}, but must be (function, rows) or (function, rows, weight)."
            ) from error
        if not isinstance(rows, Sequence):
            rows = (rows,)
        lengths = [len(row) if isinstance(row, Tensor) and row.dim() else None for row in rows]
        has_rows = len(set(lengths)) == 1 and None not in lengths
        if not (callable(function) and has_rows and as_number(weight) > 0 and len(rest) < 2):
            raise ValueError(
                f"A residual term must be (function, rows) or (function, rows, weight), with tensors of one length as "
                f"rows and a weight above 0. But {name_term(index, function)} has rows of lengths {lengths} and the "
                f"weight {weight!r:.100}."
            )
        checked.append((function, tuple(rows), float(weight)))
    if not checked:
        raise ValueError("There are no residual terms.")
    return checked


def name_term(index: int, function: Callable) -> str:
    """Return the name of a term in messages."""
    function_name = getattr(function, "__name__", type(function).__name__)
    return f"residual term {index} ({function_name})"


def check_residuals(values: Any, name: str, count: int) -> Tensor:
    """Return the residuals of `count` rows as (count, m) in float64.

    Raises:
        ValueError: The values are no floating point tensor (count,) or (count, ...), or empty.
    """
    is_tensor = isinstance(values, Tensor)
    has_shape = is_tensor and values.shape[:1] == (count,) and values.numel() > 0
    if not (has_shape and values.is_floating_point()):
        returned = f"{values.dtype} of shape {tuple(values.shape)}" if is_tensor else type(values).__name__
        raise ValueError(
            f"The {name} returns {returned} for {count} rows, but must return floating point numbers of shape "
            f"({count},) or ({count}, m): the residuals of each row, without a mean over rows."
        )
    return values.reshape(count, -1).double()


def check_rows(name: str, evaluate: Callable[..., Tensor]) -> None:
    """Raise a `ValueError` if residuals are random, or a row depends on other rows.

    Args:
        name: The name of the residual term.
        evaluate: Returns the residuals (n, m) of the rows with the n indices that are its arguments.
    """

    def differ(values: Tensor, expected: Tensor) -> bool:
        if values.shape != expected.shape:
            return True
        largest = values.nan_to_num(0, 0, 0).abs().max().item()
        tolerance = 1e-7 * largest + 1e-10
        return not torch.allclose(values, expected, 1e-7, tolerance, equal_nan=True)

    residuals = evaluate(0, -1)
    # dropout often draws the same twice
    if any(differ(residuals, evaluate(0, -1)) for _ in range(3)):
        raise ValueError(
            f"The {name} is random. Draw before the step and pass the draws as rows. Turn dropout off by "
            "`model.eval()`."
        )
    of_three_rows = evaluate(0, -1, 0)
    if differ(residuals, of_three_rows[:2]):
        raise ValueError(
            f"The {name} returns residuals of a row that depend on other rows. Pass all that a residual needs in its "
            "row, and put batch normalization into evaluation mode by `model.eval()`. Shapes (n,) and (n, 1) subtract "
            "to (n, n): squeeze one of them."
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name.

    Raises:
        ValueError: No parameter requires a gradient.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "No parameter of the model requires a gradient. Load the adapter with `is_trainable=True`, or activate it "
            "with `model.set_adapter(name)`."
        )
    return trainable


def check_trainable(model: nn.Module) -> None:
    """Raise a `ValueError` unless the model can be trained."""
    check_loaded(model, "model")
    for name, parameter in trainable_parameters(model).items():
        if parameter.is_inference():
            raise ValueError(
                "The model was made under `torch.inference_mode()`, and cannot be trained: make it outside."
            )
        if parameter.is_complex():
            raise ValueError(
                f"`{name}` is complex, but trained parameters must be real. Train its real and imaginary parts, see "
                "`torch.view_as_real`."
            )


def split_vector(parameters: Mapping[str, Tensor], vector: Tensor) -> dict[str, Tensor]:
    """Split a vector into tensors of the shapes of these parameters, by name."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    pairs = zip(parameters.items(), vector.split(sizes), strict=True)
    return {name: values.view_as(parameter) for (name, parameter), values in pairs}


@torch.no_grad()
def write_vector(parameters: Mapping[str, Tensor], vector: Tensor) -> None:
    """Put the values of a vector into these parameters."""
    for name, values in split_vector(parameters, vector).items():
        parameters[name].copy_(values)


def in_double(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of lower precision, in float64."""
    converted = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            converted[name] = tensor.detach().double()
    return converted


class LeastSquares:
    """The residuals r as a function of the vector of the trainable parameters, in float64.

    Each residual is multiplied by sqrt(weight / rows) of its term, so that the loss is |r|^2. Only
    `write_vector` changes the model. Rows, residuals and Jacobians belong to this process. Losses are sums over all
    `shards`.

    Args:
        model: The model.
        terms: Residual terms from `check_terms`.
        memory: Bytes for chunks of rows.
        trials: The `trials` of a former problem, which are not repeated.
        shards: The processes that share the rows.

    Attributes:
        start: The parameters of the model, (P,).
        terms: The prepared terms.
        trials: The trials of these terms.

    Raises:
        ValueError: A term has no rows, or is random, or its rows depend on each other, or the processes have
            different terms.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: list[Term],
        memory: int,
        trials: Trials,
        shards: Shards | None = None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.shards = shards or Shards()
        self.trainable = trainable_parameters(model)
        self.fixed = in_double(model)  # the trainable ones are always replaced
        # torch's `parameters_to_vector` refuses those that are not contiguous
        flat = [parameter.detach().double().flatten() for parameter in self.trainable.values()]
        self.start = torch.cat(flat)
        self.num_parameters = len(self.start)
        self.trials: Trials = {}
        self.terms = self._prepare(terms)
        for term in self.terms:
            if len(term.rows[0]) == 0:
                continue
            key = self._key(term)
            term.trial = self.trials.get(key) or trials.get(key) or self._try(term)
            self.trials[key] = term.trial

    def _prepare(self, terms: list[Term]) -> list[PreparedTerm]:
        """Convert the rows to float64, and count them in all processes."""
        names = [name_term(index, function) for index, (function, _, _) in enumerate(terms)]
        weights = {name: weight for name, (_, _, weight) in zip(names, terms, strict=True)}
        if any(weights_of_process != weights for weights_of_process in self.shards.gather(weights)):
            raise ValueError(f"The processes have different residual terms or weights. This one has {weights}.")

        lengths = [len(rows[0]) for _, rows, _ in terms]
        counts = torch.tensor(lengths, device=self.start.device)
        counts = self.shards.sum(counts).tolist()
        prepared = []
        for name, count, (function, rows, weight) in zip(names, counts, terms, strict=True):
            if count == 0:
                raise ValueError(f"The {name} has no rows.")
            requires_grad = [row.requires_grad for row in rows]
            converted = [row.detach().double() if row.is_floating_point() else row for row in rows]
            scale = math.sqrt(weight / count)
            prepared.append(PreparedTerm(name, function, tuple(converted), requires_grad, scale))
        return prepared

    def _key(self, term: PreparedTerm) -> tuple:
        """Return what a trial depends on: the function, the trainable parameters, the modes, the kinds of rows."""
        # bound methods are new at each access, but equal
        function = term.function if isinstance(term.function, Hashable) else id(term.function)
        shapes = [(name, parameter.shape) for name, parameter in self.trainable.items()]
        modes = [module.training for module in self.model.modules()]
        rows = [(row.shape[1:], row.dtype) for row in term.rows]
        return function, *shapes, *modes, *rows

    def _leaves(self) -> dict[str, Tensor]:
        tensors = split_vector(self.trainable, self.start)
        return {name: values.detach().requires_grad_() for name, values in tensors.items()}

    def round(self, flat: Tensor) -> Tensor:
        """Return the values as the parameters store them, with fewer digits in a float32 model."""
        tensors = split_vector(self.trainable, flat)
        stored = [values.to(self.trainable[name].dtype) for name, values in tensors.items()]
        return parameters_to_vector(stored).double()

    def _call(
        self,
        term: PreparedTerm,
        rows: Sequence[Tensor],
        tensors: dict[str, Tensor],
    ) -> Tensor:
        """Return the scaled residuals (n, m) of n rows, with tensors in place of parameters."""
        mode = Intercepted() if term.trial.intercepted else nullcontext()
        with torch.enable_grad(), mode:
            # the function may write into its rows
            copies = [row.detach().clone() for row in rows]
            for copy, requires_grad in zip(copies, term.requires_grad, strict=True):
                copy.requires_grad_(requires_grad)
            evaluate = partial(term.function, self.model)
            parameters = {**self.fixed, **tensors}
            values = call_with_parameters(self.model, parameters, evaluate, tuple(copies), {})
        residuals = check_residuals(values, term.name, len(rows[0]))
        return term.scale * residuals

    # How a function is evaluated

    def _try(self, term: PreparedTerm) -> Trial:
        """Evaluate a term on a few rows: check that rows are independent, and choose how to differentiate it."""
        term.trial = Trial(term.function)
        self._check(term)
        self._measure(term)
        return term.trial

    @torch.no_grad()
    def _check(self, term: PreparedTerm) -> None:
        """Raise a `ValueError` if the residuals are random, or a row depends on other rows."""
        # copies, since batch normalization writes into them
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        tensors = {**buffers, **self.fixed, **split_vector(self.trainable, self.start)}

        def evaluate(*indices: int) -> Tensor:
            rows = [row[list(indices)] for row in term.rows]
            return self._call(term, rows, tensors).detach()

        with Intercepted() as mode:
            evaluate(0, -1)
        term.trial.intercepted = mode.is_needed
        check_rows(term.name, evaluate)

    def _measure(self, term: PreparedTerm) -> None:
        """Find the number of columns, the memory of a row, and whether `row_gradients` computes the Jacobian."""
        trial = term.trial
        leaves = self._leaves()
        indices = [index % len(term.rows[0]) for index in range(TRIAL_ROWS)]
        rows = [row[indices] for row in term.rows]
        saved_bytes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved_bytes.append(tensor.nbytes)
            return tensor.detach()  # the tensor would hold the graph that holds it

        def evaluate() -> Tensor:
            saved_bytes.clear()
            try:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    return self._call(term, rows, leaves)
            except RuntimeError:  # transforms of `torch.func` refuse the hooks
                return self._call(term, rows, leaves)

        def measure_row() -> int:
            """Return the memory of a row in the last evaluation."""
            # tensors of parameters are left out
            bytes_of_rows = sum(size for size in saved_bytes if size % TRIAL_ROWS == 0)
            bytes_of_gradients = 2 * trial.columns * self.num_parameters * 8
            return 3 * bytes_of_rows // TRIAL_ROWS + bytes_of_gradients

        trial.columns = evaluate().shape[1]
        trial.row_bytes = measure_row()
        with suppress(RuntimeError):  # the function writes into the output of a layer, which is a leaf
            jacobian = row_gradients(evaluate, list(leaves.values()), TRIAL_ROWS)
            if jacobian is None:
                return
            # a function that reorders its rows is not differentiated row by row
            weights = torch.cos(jacobian.new_ones(len(jacobian)).cumsum(0))
            expected = self._pull_back(term, rows, weights)
            error = (jacobian.T @ weights - expected).abs().max()
            if error <= 1e-6 * expected.abs().max():  # not if it is NaN
                trial.by_layers = True
                trial.row_bytes = measure_row()

    # Residuals

    def chunks(self) -> Iterator[tuple[PreparedTerm, list[Tensor]]]:
        """Yield each term with its rows, in chunks of as many rows as fit."""
        bytes_of_chunk = min(self.memory // 2, CHUNK)
        for term in self.terms:
            size = max(1, bytes_of_chunk // term.trial.row_bytes)
            for first in range(0, len(term.rows[0]), size):
                chunk = slice(first, first + size)
                yield term, [row[chunk] for row in term.rows]

    @torch.no_grad()
    def residuals(self, flat: Tensor) -> Tensor:
        """Return all residuals, (M,)."""
        tensors = split_vector(self.trainable, flat)
        residuals = [self.start.new_empty(0)]
        for term, rows in self.chunks():
            residuals_of_rows = self._call(term, rows, tensors)
            residuals.append(residuals_of_rows.detach().flatten())
        return torch.cat(residuals)

    def split(self, residuals: Tensor) -> Sequence[Tensor]:
        """Return the residuals of each term."""
        counts = [len(term.rows[0]) * term.columns for term in self.terms]
        return residuals.split(counts)

    def losses(self, residuals: Tensor) -> tuple[float, ...]:
        """Return the sum of squares of each term, in all processes."""
        squares = [residuals_of_term.square().sum() for residuals_of_term in self.split(residuals)]
        losses = self.shards.sum(torch.stack(squares))
        return tuple(losses.tolist())

    def find_not_finite(self, residuals: Tensor) -> str:
        """Return a message that names the terms whose residuals are NaN or infinite; empty without any."""
        names = []
        for term, residuals_of_term in zip(self.terms, self.split(residuals), strict=True):
            indices = (~residuals_of_term.isfinite()).nonzero()
            if len(indices):
                row = int(indices[0]) // term.columns
                values = ", ".join(str(rows[row].tolist()) for rows in term.rows)
                names.append(
                    f"{len(indices)} of {len(residuals_of_term)} in {term.name}, first in row {row}: {values}"
                )
        if not names:
            return ""
        return f"residuals are NaN or infinite: {'; '.join(names)}. The parameters are unchanged."

    # Derivatives

    def jacobian(
        self,
        term: PreparedTerm,
        rows: Sequence[Tensor],
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the derivatives of the residuals of some rows, (n m, P), in the first rows of `out` if it is passed.

        `row_gradients` computes them if only KAN layers depend on the parameters, else `torch.func.vmap`.
        """
        if term.trial.by_layers:
            leaves = self._leaves()
            evaluate = partial(self._call, term, rows, leaves)
            jacobian = row_gradients(evaluate, list(leaves.values()), len(rows[0]), out)
            if jacobian is not None:
                return jacobian
        try:
            differentiate = self._jacobian_by_rows if term.trial.by_rows else self._jacobian_by_vmap
            jacobian = differentiate(term, rows)
        except RuntimeError as error:
            # JacobiKAN, for instance, writes functions of its inputs into a tensor that it makes
            if "vmap: inplace" not in str(error):
                raise
            term.trial.by_rows = True
            warnings.warn(
                f"The {term.name} writes into a tensor, which `torch.func.vmap` does not allow. It is differentiated "
                "row by row, which is slow.",
                RuntimeWarning,
                stacklevel=2,
            )
            jacobian = self._jacobian_by_rows(term, rows)
        if out is None:
            return jacobian
        return out[: len(jacobian)].copy_(jacobian)

    def _jacobian_by_vmap(self, term: PreparedTerm, rows: Sequence[Tensor]) -> Tensor:
        def differentiate_row(flat: Tensor, *row: Tensor) -> Tensor:
            batch = [tensor.unsqueeze(0) for tensor in row]
            evaluate = lambda flat: self._call(term, batch, split_vector(self.trainable, flat))[0]  # noqa: E731
            values, pull_back, *_ = torch.func.vjp(evaluate, flat)
            units = torch.eye(len(values), dtype=values.dtype, device=values.device)
            gradients = [pull_back(unit)[0] for unit in units]
            return torch.stack(gradients)

        in_dims = (None, *[0] * len(rows))
        differentiate_rows = torch.func.vmap(differentiate_row, in_dims, randomness="different")
        with enable_inplace_requires_grad(True):  # for functions that call `x.requires_grad_()`
            return differentiate_rows(self.start, *rows).flatten(0, 1)

    def _jacobian_by_rows(self, term: PreparedTerm, rows: Sequence[Tensor]) -> Tensor:
        units = torch.eye(term.columns, dtype=self.start.dtype, device=self.start.device)
        gradients = []
        for number in range(len(rows[0])):
            row = [tensor[number : number + 1] for tensor in rows]
            gradients += [self._pull_back(term, row, unit) for unit in units]
        return torch.stack(gradients)

    def pull_back(self, vector: Tensor) -> Tensor:
        """Return J^T vector, (M,) to (P,), by one backward pass."""
        total = torch.zeros_like(self.start)
        first = 0
        for term, rows in self.chunks():
            last = first + len(rows[0]) * term.columns
            total += self._pull_back(term, rows, vector[first:last])
            first = last
        return total

    def _pull_back(
        self,
        term: PreparedTerm,
        rows: Sequence[Tensor],
        vector: Tensor,
    ) -> Tensor:
        leaves = self._leaves()
        values = self._call(term, rows, leaves)
        if not values.requires_grad:
            return torch.zeros_like(self.start)
        parameters = list(leaves.values())
        gradients = torch.autograd.grad(values.flatten(), parameters, vector, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])
