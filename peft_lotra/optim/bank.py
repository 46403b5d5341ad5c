# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training of all adapters of a bank at once: by AdamW, and by Levenberg-Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ..bank.bank import AdapterBank
from ..bank.layer import ROWS, BankModel, BankPass
from ..bank.snapshot import Form
from ..kan.row_product import PackedTucker, RowGroups, group_rows
from ..least_squares.levenberg_marquardt import LARGEST_DAMPING, SMALLEST_DAMPING, damping_factor
from ..least_squares.problem import Intercepted, Term, check_residuals, check_rows, check_terms, in_double, name_term
from ..modules.calls import buffers_kept, call_with_parameters
from ..modules.checks import check_number
from .learning_rates import Policy, component_multipliers


BETA1, BETA2 = 0.9, 0.999  # of AdamW
MEMORY = 2**26  # about the bytes of a Levenberg-Marquardt step: so many adapters are solved at once


class _BankOptimizer(Optimizer):
    """Train the adapters of a bank, and keep the best values of each."""

    def __init__(
        self,
        bank: AdapterBank,
        names: Sequence[str] | None,
        defaults: dict[str, Any],
    ) -> None:
        self.bank = bank
        self.packed, self._is_component = bank.start_training(names)
        self._is_active = self._is_component.any(1)
        # by id, the row after the last one without an adapter; adapters come and go only after the training
        capacity = len(self.packed)
        rows = bank.snapshot.row_of[1:-1]
        self._row_of = rows.clamp(max=capacity)
        super().__init__([self.packed], defaults)
        state = self.state[self.packed]
        state["best"] = self.packed.detach().clone()
        state["least"] = self.packed.new_full((capacity,), torch.inf)
        state["waited"] = torch.zeros_like(state["least"])

    def _by_id(self, values: Tensor, default: float) -> Tensor:
        """Return values (capacity,) of the rows of the matrix by the id of the adapter, (room,)."""
        padded = F.pad(values, (0, 1), value=default)
        return padded[self._row_of]

    @torch.no_grad()
    def keep_best(self, losses: Tensor, patience: int | None = None) -> Tensor:
        """Keep the values of each adapter whose loss is the least so far, for `finish`.

        Args:
            losses (`torch.Tensor`): The losses of the present values, of held-out rows for instance, as
                `AdapterBank.mean_by_adapter` returns them: (room,), NaN for no news.
            patience (`int`, *optional*): An adapter without a new least loss in so many calls is trained no more.

        Returns:
            `torch.Tensor`: Whether each adapter is still trained, (room,), by id.
        """
        packed = self.packed
        state = self.state[packed]
        rows = self._row_of[: len(losses)]
        losses_by_row = packed.new_full((len(packed) + 1,), torch.nan)
        losses_by_row[rows] = losses.to(packed)
        losses = losses_by_row[:-1]  # the last one is for ids without an adapter

        is_less = self._is_active & (losses < state["least"])
        state["best"][is_less] = packed[is_less]
        state["least"][is_less] = losses[is_less]
        state["waited"] += ~losses.isnan()
        state["waited"][is_less] = 0
        if patience is not None:
            self._is_active &= state["waited"] < patience
        return self._by_id(self._is_active, False)

    def finish(self) -> None:
        """Give the adapters their best values, if `keep_best` kept them, and end the training of the bank."""
        state = self.state[self.packed]
        is_kept = state["least"] < torch.inf
        self.packed.data[is_kept] = state["best"][is_kept]
        self.bank.stop_training()


class BankAdamW(_BankOptimizer):
    r"""
    Train the adapters of a bank by AdamW, each separately: a step changes adapters that have rows in the batch.

    The others keep their values, moments and numbers of steps. If the loss is the sum of the mean errors of the
    adapters, each is trained as `create_lotra_optimizer(model, torch.optim.AdamW)` would train it on its rows.
    An `alpha` of the configuration is in the cores, which take the steps of `alpha=1`.

    Args:
        bank (`AdapterBank`): The bank, attached or not.
        lr (`float`): The learning rate that the rates of the components are multiples of.
        names (`list[str]`, *optional*): The adapters to train, by default all. Rows of others change nothing.
        policy: As in `create_lotra_optimizer`, also for adapters that started from the gradient; a multiplier of 0
            leaves a component unchanged. Adapters that started from training, and state dicts, which say nothing of
            their start, have the rates of a random one.
        weight_decay: As in `torch.optim.AdamW`.

    Raises:
        ValueError: A name or `policy` is unknown, or the bank cannot be trained, see
            `AdapterBank.start_training`.

    Source: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
        >>> import torch
        >>> from peft_lotra import AdapterBank, LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.optim import BankAdamW
        >>> bank = AdapterBank(KAN([2, 4, 1]))
        >>> for name in ("anna", "ben"):
        ...     bank.add(name, LoTRAConfig(r=2))
        >>> model, ids = bank.attach(), bank.ids(["anna", "ben"]).repeat_interleave(16)
        >>> x = torch.rand(32, 2)
        >>> optimizer = BankAdamW(bank, lr=1e-2)
        >>> for _ in range(3):
        ...     errors = (model(x, ids=ids) - x.prod(1, keepdim=True)).square().mean(1)
        ...     losses = bank.mean_by_adapter(errors, ids)
        ...     _ = optimizer.keep_best(losses, patience=5)
        ...     optimizer.zero_grad()
        ...     losses.nansum().backward()
        ...     optimizer.step()
        >>> optimizer.finish()
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: float = 1e-3,
        names: Sequence[str] | None = None,
        *,
        policy: Policy = "width",
        weight_decay: float = 1e-2,
    ) -> None:
        component_multipliers(policy, {})  # refuses a wrong policy before the training starts
        super().__init__(bank, names, {"lr": lr, "weight_decay": weight_decay})

        def multipliers_of(form: Form, layer: PackedTucker) -> Mapping[str, float]:
            widths = {"factor_out": layer.shape[0], "factor_in": layer.shape[1]}
            return component_multipliers(policy, widths, layer.ranks(), form.start == "gradient")

        # zero for entries that fill up, which so keep their values
        self._multipliers = bank.snapshot.fill_components(multipliers_of)
        state = self.state[self.packed]
        state["step"] = self.packed.new_zeros(len(self.packed), 1)
        state["exp_avg"] = torch.zeros_like(self.packed)
        state["exp_avg_sq"] = torch.zeros_like(self.packed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change the adapters that have rows in the batch, but those that `keep_best` has stopped."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        packed = self.packed
        if packed.grad is None:
            return loss
        (group,) = self.param_groups
        state = self.state[packed]
        gradient = packed.grad.coalesce()
        rows = gradient.indices()[0]
        is_active = self._is_active[rows]
        rows = rows[is_active]
        values = gradient.values()[is_active]

        step = state["step"][rows] + 1
        average = state["exp_avg"][rows].lerp_(values, 1 - BETA1)
        square = state["exp_avg_sq"][rows].lerp_(values.square(), 1 - BETA2)
        state["step"][rows] = step
        state["exp_avg"][rows] = average
        state["exp_avg_sq"][rows] = square

        lr = group["lr"] * self._multipliers[rows]
        mean = average / (1 - BETA1**step)
        deviation = square.sqrt() / (1 - BETA2**step).sqrt()
        update = mean / (deviation + 1e-8)
        decayed = packed[rows] * (1 - group["weight_decay"] * lr)
        packed[rows] = decayed - lr * update
        return loss


class BankStep(NamedTuple):
    """The record of a step of all adapters, by their ids: (room,) each.

    Attributes:
        losses: The loss of the values that each adapter now has; NaN without rows, or if it is not finite.
        accepted: Whether its values changed.
        damping: The damping that its next step starts with.
    """

    losses: Tensor
    accepted: Tensor
    damping: Tensor


class BankLevenbergMarquardt(_BankOptimizer):
    r"""
    Train the adapters of a bank by Levenberg-Marquardt, each separately: a step solves all normal equations at once.

    Adapter a has the loss sum_t weight_t mean_n |r_t(row_n)|^2 over its own rows. With its residuals r_a, each times
    sqrt(weight_t / rows), and their Jacobian J_a in its components, a step solves

        (J_a^T J_a + damping_a S_a) step_a = -J_a^T r_a,

    S_a the diagonal of J_a^T J_a, bounded from below, for many adapters by one batched Cholesky factorization; in the
    space of residuals where they are fewer. Damping and acceptance are as in `LevenbergMarquardt` on a single adapter
    without `forgetting`. Everything is in float64. Adapters without rows keep values and damping.

    Args:
        model: The model with the bank, as `AdapterBank.attach` returns it.
        damping (`float`): The damping that the first step tries.
        names (`list[str]`, *optional*): The adapters to train, by default all. Rows of others change nothing.
        floor (`float`): The lower bound of S_a, as a share of its largest entry.

    Raises:
        TypeError: `model` has no bank.
        ValueError: A name is unknown, `damping` is not above 0, or the bank cannot be trained, see
            `AdapterBank.start_training`.

    Example:
        >>> import torch
        >>> from peft_lotra import AdapterBank, LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.optim import BankLevenbergMarquardt
        >>> bank = AdapterBank(KAN([2, 4, 1]))
        >>> for name in ("anna", "ben"):
        ...     bank.add(name, LoTRAConfig(r=2))
        >>> optimizer = BankLevenbergMarquardt(bank.attach())
        >>> x, ids = torch.rand(32, 2), bank.ids(["anna", "ben"]).repeat_interleave(16)
        >>> def error(model, x):
        ...     return model(x) - x.prod(1, keepdim=True)
        >>> losses = [optimizer.step([(error, x, ids)]).losses for _ in range(3)]
        >>> optimizer.finish()
        >>> bool((losses[2][:2] < losses[0][:2]).all())
        True
    """

    def __init__(
        self,
        model: BankModel,
        damping: float = 1e-2,
        names: Sequence[str] | None = None,
        *,
        floor: float = 1e-3,
    ) -> None:
        if not isinstance(model, BankModel):
            raise TypeError(f"`model` is a {type(model).__name__}, but must be what `bank.attach()` returns.")
        check_number(damping, "damping", "(0, inf)")
        super().__init__(model.bank, names, {"damping": damping, "floor": floor})
        self.model = model
        self._checked: list[Callable[..., Tensor]] = []  # the functions of the last step
        capacity = len(self.packed)
        dampings = self.packed.new_full((capacity,), damping, dtype=torch.float64)
        self.state[self.packed]["damping"] = dampings

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, terms: Iterable[Any]) -> BankStep:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step of each adapter that has rows, but those that `keep_best` has stopped.

        Args:
            terms: Residual terms (function, rows, ids) or (function, rows, ids, weight), as for
                `LevenbergMarquardt.step`, with the id of the adapter of each row, (n,) int64. `function(model,
                *rows)` is called with any rows; `model(x)` needs no `ids=` there.

        Returns:
            The record. An adapter whose residuals are not finite, or whose loss no damping makes fall, is unchanged.

        Raises:
            ValueError: A term is malformed, or `finish` has ended the training.
        """
        snapshot = self.bank.snapshot
        if snapshot.packed is not self.packed:
            raise ValueError("`finish()` has ended the training. Make another optimizer.")
        indexed = []
        for function, rows, ids, *weight in terms:
            if not isinstance(rows, Sequence):
                rows = (rows,)
            index = snapshot.rows_of(ids)
            indexed.append((function, (index, *rows), *weight))
        checked = check_terms(indexed)
        self._check_rows(checked)

        counts = torch.zeros_like(self._is_active, dtype=torch.int64)
        for _, (index, *_), _ in checked:
            counts += index.bincount(minlength=len(counts))
        counts *= self._is_active
        by_count = counts.argsort(descending=True)
        pending = by_count[: counts.count_nonzero()]
        losses = torch.full_like(counts, torch.nan, dtype=torch.float64)
        accepted = torch.zeros_like(self._is_active)
        width = self.packed.shape[1]
        while len(pending):
            rows = int(counts[pending[0]])
            columns = 16 * rows + min(rows, width)
            bytes_of_adapter = 8 * width * columns
            size = max(1, MEMORY // bytes_of_adapter)
            adapters = pending[:size]
            pending = pending[size:]
            losses[adapters], accepted[adapters] = self._step_of(adapters, checked)
        dampings = self.state[self.packed]["damping"]
        return BankStep(
            losses=self._by_id(losses, torch.nan),
            accepted=self._by_id(accepted, False),
            damping=self._by_id(dampings, self.defaults["damping"]),
        )

    def _check_rows(self, terms: list[Term]) -> None:
        """Raise a ValueError if the residuals of a new function are random, or a row depends on other rows."""
        checked = []
        for number, term in enumerate(terms):
            function, (index, *_), _ = term
            code = getattr(function, "__code__", function)  # a lambda in a loop is new at each step
            trained = self._is_active[index].nonzero().squeeze(1)
            is_known = code in self._checked
            if len(trained) and not is_known:
                with buffers_kept(self.model):
                    check_rows(name_term(number, function), partial(self._evaluate_rows, number, term, trained))
            if len(trained) or is_known:  # without trained rows, it is still to be checked
                checked.append(code)
        self._checked = checked

    @torch.enable_grad()
    def _evaluate_rows(
        self,
        number: int,
        term: Term,
        trained: Tensor,
        *indices: int,
    ) -> Tensor:
        """Compute the residuals of the `indices` of the `trained` rows of a term."""
        function, (index, *rows), _ = term
        chosen = trained[list(indices)]
        packed = self.packed[index[chosen]].double()
        chosen_rows = [row[chosen.to(row.device)] for row in rows]
        groups = RowGroups(torch.arange(len(chosen), device=chosen.device))
        return self._call(name_term(number, function), function, chosen_rows, packed, groups).detach()

    def _step_of(
        self,
        adapters: Tensor,
        terms: list[Term],
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of some adapters after a step, and whether it was accepted."""
        packed = self.packed
        start = packed[adapters].double()
        residuals, jacobian = self._evaluate(adapters, terms, start, differentiates=True)
        loss = residuals.square().sum(1)

        # in coordinates whose damping is the identity: sqrt(S) step
        squares = jacobian.square().sum(1)
        least = self.defaults["floor"] * squares.amax(1, keepdim=True)
        bounded = squares.maximum(least).clamp(min=1e-300)
        lengths = bounded.sqrt()
        jacobian /= lengths.unsqueeze(1)
        gradient = (jacobian.mT @ residuals.unsqueeze(2)).squeeze(2)

        is_dual = jacobian.shape[1] < jacobian.shape[2]
        if is_dual:
            right = residuals
            matrix = jacobian @ jacobian.mT
        else:
            right = gradient
            matrix = jacobian.mT @ jacobian

        dampings = self.state[packed]["damping"]
        damping = dampings[adapters]
        factor = 2.0
        accepted = torch.zeros_like(loss, dtype=torch.bool)
        is_finite = loss.isfinite() & squares.isfinite().all(1)
        is_solvable = is_finite & gradient.any(1)
        pending = is_solvable.nonzero().squeeze(1)
        while len(pending):
            shift = damping[pending].unsqueeze(1)
            damped = matrix[pending]
            damped.diagonal(dim1=1, dim2=2).add_(shift)
            triangle, failed = torch.linalg.cholesky_ex(damped)
            step = -torch.cholesky_solve(right[pending].unsqueeze(2), triangle)
            if is_dual:
                step = jacobian[pending].mT @ step
            step = step.squeeze(2)
            step[failed > 0] = torch.nan

            candidate = start[pending] + step / lengths[pending]
            candidate = candidate.to(packed.dtype)
            (new_residuals,) = self._evaluate(adapters[pending], terms, candidate.double(), differentiates=False)
            decrease = loss[pending] - new_residuals.square().sum(1)
            is_less = decrease > 0  # not if one is NaN

            slopes = shift * step - gradient[pending]
            predicted = (step * slopes).sum(1)
            agreement = decrease / predicted
            factors = [damping_factor(ratio, raised=factor > 2) for ratio in agreement[is_less].tolist()]

            done = pending[is_less]
            packed[adapters[done]] = candidate[is_less]
            factors = damping.new_tensor(factors)
            lowered = damping[done] * factors
            dampings[adapters[done]] = lowered.clamp(min=SMALLEST_DAMPING)
            loss[done] -= decrease[is_less]
            accepted[done] = True

            pending = pending[~is_less]
            damping[pending] *= factor
            factor *= 2
            pending = pending[damping[pending] <= LARGEST_DAMPING]
        return loss, accepted

    @torch.enable_grad()
    def _evaluate(
        self,
        adapters: Tensor,
        terms: list[Term],
        values: Tensor,
        differentiates: bool,
    ) -> list[Tensor]:
        """Compute the residuals (adapters, M) of adapters with these values (adapters, width).

        They are zero where an adapter has fewer rows. Their Jacobian (adapters, M, width) follows on demand.
        """
        slot_of = torch.full_like(self._is_active, -1, dtype=torch.int64)
        slot_of[adapters] = torch.arange(len(adapters), device=slot_of.device)
        all_residuals = []
        jacobian = []
        for number, (function, (index, *rows), weight) in enumerate(terms):
            slots, order = slot_of[index].sort(stable=True)
            is_chosen = slots >= 0
            slots = slots[is_chosen]
            order = order[is_chosen]
            if not len(slots):
                continue
            counts = slots.bincount(minlength=len(adapters))
            starts = counts.cumsum(0) - counts
            numbers = torch.arange(len(slots), device=slots.device)
            entries = slots, numbers - starts[slots]

            if differentiates:
                # a copy of the adapter for each row: one backward pass has the gradients of all rows
                packed = values[slots].requires_grad_()
                groups = RowGroups(numbers)
            else:
                distinct, groups = group_rows(slots)
                packed = values[distinct]
            rows = [row[order.to(row.device)] for row in rows]
            name = name_term(number, function)
            residuals = self._call(name, function, rows, packed, groups)
            weights = weight / counts[slots].double()
            residuals = residuals * weights.sqrt().unsqueeze(1)
            all_residuals.append(_pad(residuals, entries, counts))
            if not differentiates:
                continue
            is_component = self._is_component[adapters[slots]]
            gradients = []
            for column in residuals.T:
                (gradient,) = torch.autograd.grad(column.sum(), packed, retain_graph=True)
                gradients.append(gradient * is_component)
            derivatives = torch.stack(gradients, 1)
            jacobian.append(_pad(derivatives, entries, counts))
        return [torch.cat(blocks, 1) for blocks in (all_residuals, jacobian) if blocks]

    def _call(
        self,
        name: str,
        function: Any,
        rows: list[Tensor],
        packed: Tensor,
        groups: RowGroups,
    ) -> Tensor:
        """Compute the values (n, m) of a residual function for n rows, whose adapters are rows of `packed`."""
        model = self.model
        args = tuple(row.double() if row.is_floating_point() else row for row in rows)
        updates = self.bank.snapshot.updates_of_samples(packed, groups)
        with ROWS.set(BankPass(self.bank, updates, set())), Intercepted():
            values = call_with_parameters(model, in_double(model), partial(function, model), args, {})
        return check_residuals(values, name, len(rows[0])).to(packed)


def _pad(values: Tensor, entries: tuple[Tensor, Tensor], counts: Tensor) -> Tensor:
    """Put values (n, m, ...) of rows at the entries (adapter, row) of zeros, and return (adapters, M, ...)."""
    most = int(counts.max())
    zeros = values.new_zeros(len(counts), most, *values.shape[1:])
    padded = zeros.index_put(entries, values.detach())
    return padded.flatten(1, 2)
