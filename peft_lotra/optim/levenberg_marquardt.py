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

"""Levenberg-Marquardt for adapters, and for any model whose trainable parameters are few enough."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .least_squares import LeastSquares, LinearModel, Term, check_terms


# Damping never falls below this: less is lost in the rounding of the normal equations.
SMALLEST_DAMPING = 1e-16


@dataclass(frozen=True)
class LevenbergMarquardtStep:
    """What one step did.

    Attributes:
        loss (`float`): The loss of the parameters that the model now has; NaN if it is not finite.
        damping (`float`): The damping that the next step starts with.
        accepted (`bool`): Whether the parameters changed.
        attempts (`int`): How many damped systems were solved.
        decrease (`float`): By what share of itself the loss fell.
        reason (`str`): Why the parameters did not change; empty if they did.
    """

    loss: float
    damping: float
    accepted: bool
    attempts: int = 0
    decrease: float = 0.0
    reason: str = ""


class LevenbergMarquardt:
    r"""
    Trains a model on sums of squares by damped Gauss-Newton steps.

    The loss is  sum_t weight_t * mean_n |r_t(row_n)|^2  over residual terms t, each a function of the model and of
    rows of data: the equation at collocation points, a boundary condition, plain data. With all residuals, times the
    root of weight_t / n_t, in one vector r and their Jacobian J in the trainable parameters, a step solves

        (J^T J + damping * S) step = -J^T r,

    in the space of the parameters (P x P), or, where there are fewer residuals M than parameters, in that of the
    residuals by the Woodbury identity, step = -S^-1 J^T (J S^-1 J^T + damping)^-1 r (M x M). It is taken if the loss
    falls; how far, beside what the linear model promised, moves the damping. S is the diagonal of J^T J (J. J. More
    1978), bounded from below by `floor` times its largest entry, since the components of a Tucker update act on very
    different scales. Measured on four PDE families at two targets each (`examples/pde`, one seed, 16 steps of an
    adapter): after 8 steps `floor` 1e-6 has a half to a twentieth of the error of S = 1 on seven of the eight, and
    more on the other; beside 1e-3 it is up to twice better near the base, and mostly worse farther away. Where an
    adapter starts at zero on little data, 1e-6 hardly moved it, and 1e-3 did.

    Jacobians are computed a chunk of rows at a time. Where a term depends on the parameters by nothing but KANs of
    this package, dense, Slim or with LoTRA, that it evaluates on its n rows by [`peft_lotra.kan.jet`] or by a forward
    pass, they are put together of the inputs and the output gradients of the layers, which one backward pass gives
    for all rows. That is found out by itself; any other term (other models, LoRA, parameters outside of the KAN,
    trained normalisations, dropout) takes `torch.func.vmap`, at two to three times the time. (PEFT's LoRA on
    `target_parameters` works in terms by `jet` alone: its forward pass does not run under `torch.func`.) In both ways
    a row's gradient is as large as the adapter: none of the size of a coefficient tensor is formed. Everything is
    computed in float64 whatever the model's dtype; the loss that decides is that of the parameters as stored.

    *Where an adapter may start.* Random factors must turn first. One step of all parameters, kept as an adapter by
    [`extract_lotra`] with `inputs` (see the second example), has the directions at once, for the time of two to three
    steps of the adapter, or more on a wide network. On the elliptic family of `examples/pde` (three seeds) it left
    0.55 to 0.73 times the error at equal seconds; on three families of evolution equations 0.7 to 1.3 times, and far
    from the base up to 2.1 times.

    Why not torch-levenberg-marquardt 1.2 from PyPI: it takes one function of (inputs, targets) through
    `functional_call(model, ...)`, so neither several weighted terms nor residuals that look inside the model (`jet`);
    it computes in the model's dtype, takes the last attempt even if the loss rose, does not notice residuals that are
    not finite, and needs pytorch-lightning and torchmetrics.

    Args:
        model (`nn.Module`): Any model. Those of its parameters that require a gradient are trained.
        damping (`float`): What the first step tries.
        geodesic (`bool`): Whether each step gets a second-order correction (M. K. Transtrum and J. P. Sethna,
            arXiv 1201.5885), for one more evaluation of the residuals where J is kept, and two more and a backward
            pass where it is not. It pays for an adapter near its solution: on the elliptic family of `examples/pde`,
            near target, two seeds, it has 0.3 to 0.6 of the error after 4 to 8 steps, each 1.15 times as long; at
            the middle target it makes no difference. A KAN trained from scratch with it stopped short, at 50 times
            the error: the correction is large beside the step, which keeps the damping high. Off by default.
        floor (`float`): The lower bound of the scaling S, as a share of its largest entry; 1 gives S = 1 times that
            entry, i.e. Levenberg's own damping.
        memory (`int`): Bytes that matrices and chunks may take, 1 GiB by default. Chunks get smaller to fit; J is kept
            where it takes half of it at most, and otherwise, in the space of residuals, recomputed chunk by chunk.
        max_damping (`float`): Where a step gives up.

    Raises:
        ValueError: No parameter requires a gradient, or an argument is out of range.

    Example:

    ```py
    >>> def equation(model, x, f):  # x (n, 2), f (n, 1); returns (n,) or (n, m)
    ...     u, _, laplacian = jet(model, x, collapse=True)
    ...     return -laplacian + u**3 - f
    >>> def boundary(model, x):
    ...     return model(x)
    >>> optimizer = LevenbergMarquardt(model)
    >>> history = optimizer.fit([(equation, (x, f), 1.0), (boundary, (edge,), 100.0)], steps=50)
    ```

    ```py
    >>> stepped = copy.deepcopy(kan)  # an adapter that starts with what one step of all parameters does
    >>> LevenbergMarquardt(stepped, floor=1e-6).step(terms)
    >>> model = extract_lotra(kan, stepped, r=(8, 8, 5), inputs=x[:300])
    >>> history = LevenbergMarquardt(model, floor=1e-6, geodesic=True).fit(terms, steps=20)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        damping: float = 1e-2,
        *,
        geodesic: bool = False,
        floor: float = 1e-3,
        memory: int = 2**30,
        max_damping: float = 1e12,
    ) -> None:
        for name, value, low in (("damping", damping, 0), ("floor", floor, 0), ("max_damping", max_damping, damping)):
            if not (math.isfinite(value) and value > low):
                raise ValueError(f"`{name}` is {value!r}, but must be a finite number above {low}.")
        if floor > 1:
            raise ValueError(f"`floor` is {floor!r}, but must be at most 1.")
        if memory < 2**20:
            raise ValueError(f"`memory` is {memory!r} bytes, but must be at least {2**20} (1 MiB).")
        self.model = model
        self.damping = damping
        self.geodesic = geodesic
        self.floor = floor
        self.memory = memory
        self.max_damping = max_damping
        self._notes: dict = {}  # of the last step's terms
        self._trainable()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_notes": {}}  # which hold functions by their `id`

    def step(self, terms: Iterable[Term]) -> LevenbergMarquardtStep:
        """
        One step. On anything but success the parameters are what they were, bit for bit.

        Args:
            terms: Residual terms (function, rows, weight). `function(model, *rows)` is called with any number n of
                rows and returns n residuals, or (n, m) for m in each row; a row's must not depend on the others.
                `rows` are tensors of equal length; `weight` is a positive number and may be left out (1).

        Returns:
            `LevenbergMarquardtStep`: Not accepted where the residuals are not finite (`reason`, also a warning, names
            the term; the damping stays), or no damping up to `max_damping` makes the loss fall.

        Raises:
            ValueError: A term is malformed, or the matrices do not fit into `memory`.
        """
        problem = LeastSquares(self.model, self._trainable(), check_terms(terms), self.memory, self._notes)
        self._notes = problem.notes
        residuals = problem.residuals(problem.start)
        if complaint := problem.find_not_finite(residuals):
            warnings.warn(f"Step refused: {complaint}", RuntimeWarning, stacklevel=2)
            return LevenbergMarquardtStep(math.nan, self.damping, False, reason=complaint)
        loss = residuals.square().sum().item()
        linear = problem.linearize(residuals, self.floor)
        if complaint := linear.complaint:
            warnings.warn(f"Step refused: {complaint}", RuntimeWarning, stacklevel=2)
            return LevenbergMarquardtStep(loss, self.damping, False, reason=complaint)

        damping, factor, attempts = self.damping, 2.0, 0
        while damping <= self.max_damping:
            attempts += 1
            step = linear.solve(damping, residuals)
            promised = math.nan if step is None else linear.promised(damping, step)
            if step is not None and self.geodesic:
                step = self._accelerate(linear, damping, step)
            if step is not None:
                candidate = problem.round(problem.start + step)
                new_loss = problem.residuals(candidate).square().sum().item()
                if new_loss < loss:  # not if it is NaN
                    damping *= _damping_factor((loss - new_loss) / promised, raised=attempts > 1)
                    self.damping = max(damping, SMALLEST_DAMPING)
                    problem.write(candidate)
                    return LevenbergMarquardtStep(new_loss, self.damping, True, attempts, 1 - new_loss / loss)
            damping *= factor
            factor *= 2
        reason = (
            f"No damping up to {self.max_damping:g} makes the loss fall below {loss:.6g}: the parameters are at a "
            "minimum to rounding, or the normal equations are singular."
        )
        return LevenbergMarquardtStep(loss, self.damping, False, attempts, reason=reason)

    def fit(
        self,
        terms: Iterable[Term] | Callable[[int], Iterable[Term]],
        steps: int = 100,
        *,
        target_loss: float = 0.0,
        tolerance: float = 0.0,
        patience: int = 5,
        max_seconds: float = math.inf,
        callback: Callable[[int, LevenbergMarquardtStep], Any] | None = None,
        progress: bool = True,
    ) -> list[LevenbergMarquardtStep]:
        """
        Steps until a rule says stop: `steps` are done, the loss reaches `target_loss`, it fell by a share below
        `tolerance` in `patience` steps in a row, `max_seconds` have passed, the callback returns True, or a step was
        not accepted.

        Args:
            terms: As for `step`, or a function of the step's number that returns them (new points for each step).
            callback: Called with the step's number and its record.
            progress: Whether to show a bar.

        Returns:
            `list[LevenbergMarquardtStep]`: One record for each step; the last one's `reason` says why it stopped, if
            the step was not accepted.
        """
        from tqdm import tqdm

        history: list[LevenbergMarquardtStep] = []
        slow, end = 0, time.monotonic() + max_seconds
        terms = terms if callable(terms) else list(terms)
        with tqdm(total=steps, unit="step", desc="Levenberg-Marquardt", disable=not progress) as bar:
            for number in range(steps):
                record = self.step(terms(number) if callable(terms) else terms)
                history.append(record)
                bar.update()
                bar.set_postfix(loss=f"{record.loss:.3e}", damping=f"{record.damping:.0e}")
                slow = slow + 1 if record.decrease < tolerance else 0
                stop = callback is not None and callback(number, record) is True
                if stop or not record.accepted or record.loss <= target_loss or slow >= patience:
                    break
                if time.monotonic() > end:
                    break
        return history

    def _trainable(self) -> dict[str, nn.Parameter]:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "No parameter of the model requires a gradient. Load the adapter with `is_trainable=True`, or "
                "activate it with `model.set_adapter(name)`."
            )
        return trainable

    def _accelerate(self, linear: LinearModel, damping: float, step: Tensor) -> Tensor | None:
        """The step with half of the second-order correction, if that is small beside it (the series then converges);
        None otherwise."""
        bend = linear.bend(step)
        correction = linear.solve(damping, bend) if bend.isfinite().all() else None
        if correction is None or linear.norm(correction) > 0.75 * linear.norm(step):
            return None
        return step + correction / 2


def _damping_factor(agreement: float, raised: bool) -> float:
    """
    What multiplies the damping after a step that brought `agreement` times what the linear model promised.

    It must fall fast: by 5 at most, and smoothly (H. B. Nielsen, IMM-REP-1999-05), a KAN trained from scratch on a PDE
    ended with ten times the loss or more. But where it was just `raised`, less has just failed, and would again.
    """
    if agreement > 0.75:
        return 0.5 if raised else 0.1
    return 0.5 if agreement > 0.25 else 2.0
