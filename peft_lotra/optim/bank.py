# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training of all adapters of a bank at once: by AdamW, and by Levenberg-Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..bank.bank import AdapterBank
from ..bank.layer import ROWS, BankModel, BankPass
from ..bank.snapshot import Form
from ..kan.row_product import PackedTucker, RowGroups, group_rows
from ..least_squares.levenberg_marquardt import LARGEST_DAMPING, SMALLEST_DAMPING, damping_factor
from ..least_squares.problem import Intercepted, check_residuals, check_terms, in_double, name_term
from ..modules.calls import call_with_parameters
from ..modules.checks import check_number
from .learning_rates import Policy, component_multipliers


class _BankOptimizer(Optimizer):
    """Trains the adapters of a bank, and keeps the best values of each."""

    def __init__(self, bank: AdapterBank, names: Sequence[str] | None, defaults: dict[str, Any]) -> None:
        self.bank = bank
        self.packed, self._entries = bank.start_training(names)
        self._is_active = self._entries.any(1)
        # by id, the row after the last one where there is none; adapters come and go only after the training
        self._row_of = bank.snapshot.row_of[1:-1].clamp(max=len(self.packed))
        super().__init__([self.packed], defaults)

    def _by_id(self, values: Tensor, default: float) -> Tensor:
        """Return values (capacity,) of the rows of the matrix by the id of the adapter, (room,)."""
        return torch.cat([values, values.new_tensor([default])])[self._row_of]

    @torch.no_grad()
    def keep_best(self, losses: Tensor, patience: int | None = None) -> Tensor:
        """Keep the values of each adapter whose loss is the least so far, for `finish`.

        Args:
            losses (`torch.Tensor`): The losses of the present values, of held-out rows for instance, as
                `AdapterBank.mean_by_adapter` returns them: (room,), NaN for no news.
            patience (`int`, *optional*): An adapter without a new least loss in so many calls is trained no more.

        Returns:
            `torch.Tensor`: Whether each adapter is still trained, (room,), by number.
        """
        packed, state = self.packed, self.state[self.packed]
        if "best" not in state:
            state["best"] = packed.detach().clone()
            state["least"] = packed.new_full((len(packed),), torch.inf)
            state["waited"] = torch.zeros_like(state["least"])
        by_row = packed.new_full((len(packed) + 1,), torch.nan)
        by_row[self._row_of[: len(losses)]] = losses.to(packed)
        losses = by_row[:-1]
        is_less = self._is_active & (losses < state["least"])
        state["best"][is_less], state["least"][is_less] = packed[is_less], losses[is_less]
        state["waited"] = torch.where(is_less, 0, state["waited"] + ~losses.isnan())
        if patience is not None:
            self._is_active &= state["waited"] < patience
        return self._by_id(self._is_active, False)

    def finish(self) -> None:
        """Give the adapters their best values, if `keep_best` kept them, and end the training of the bank."""
        if "best" in (state := self.state[self.packed]):
            is_kept = state["least"] < torch.inf
            self.packed.data[is_kept] = state["best"][is_kept]
        self.bank.stop_training()


class BankAdamW(_BankOptimizer):
    r"""
    AdamW for the adapters of a bank, each by itself: a step changes those that have rows in the batch.

    The others keep their values, moments and numbers of steps. If the loss is the sum of the mean errors of the
    adapters, each is trained as it would be alone on its rows by `create_lotra_optimizer(model, torch.optim.AdamW)`.
    An `alpha` of the configuration is in the cores, whose steps are those of `alpha=1`.

    Args:
        bank (`AdapterBank`): The bank, attached or not.
        lr (`float`): The learning rate that the rates of the components are multiples of.
        names (`list[str]`, *optional*): The adapters to train, by default all. Rows of others are an error.
        policy: As in `create_lotra_optimizer`, also for adapters that started from the gradient; a multiplier of 0
            leaves a component as it is. Adapters that started from training, and state dicts, which say nothing of
            their start, have the rates of a random one.
        betas, eps, weight_decay: As in `torch.optim.AdamW`.

    Raises:
        ValueError: A name is unknown, a number is out of range, or the bank cannot be trained, see
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        check_number(lr, "lr", "(0, inf)")
        for beta in betas:
            check_number(beta, "betas", "[0, 1)")

        def multipliers_of(form: Form, layer: PackedTucker) -> Mapping[str, float]:
            widths = {"factor_out": layer.shape[0], "factor_in": layer.shape[1]}
            return component_multipliers(policy, widths, layer.ranks(), form.from_gradient)

        # zero for entries that fill up, which so keep their values
        multipliers = bank.snapshot.pack_by_component(multipliers_of)
        super().__init__(bank, names, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._multipliers = multipliers[bank.snapshot.form_of].to(self.packed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change the adapters that have rows in the batch, but those that `keep_best` has stopped."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        (group,), packed = self.param_groups, self.packed
        if packed.grad is None:
            return loss
        gradient, state = packed.grad.coalesce(), self.state[packed]
        if "step" not in state:
            state["step"] = packed.new_zeros(len(packed), 1)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(packed), torch.zeros_like(packed)
        is_active = self._is_active[gradient.indices()[0]]
        rows = gradient.indices()[0][is_active]
        values = gradient.values()[is_active] * self._entries[rows]
        (beta1, beta2), lr = group["betas"], group["lr"] * self._multipliers[rows]
        step = state["step"][rows] + 1
        average = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        size = (square.sqrt() / (1 - beta2**step).sqrt()).add_(group["eps"])
        decayed = packed[rows] * (1 - group["weight_decay"] * lr)
        packed[rows] = decayed - lr / (1 - beta1**step) * average / size
        for name, value in (("step", step), ("exp_avg", average), ("exp_avg_sq", square)):
            state[name][rows] = value
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
    Levenberg-Marquardt for the adapters of a bank, each by itself: a step solves the normal equations of all at once.

    Adapter a has the loss sum_t weight_t mean_n |r_t(row_n)|^2 over its own rows. With its residuals r_a, each times
    sqrt(weight_t / rows), and their Jacobian J_a in its components, a step solves

        (J_a^T J_a + damping_a S_a) step_a = -J_a^T r_a,

    S_a the diagonal of J_a^T J_a, bounded from below, for many adapters by one batched Cholesky factorization; in the
    space of residuals where they are fewer. Damping and acceptance are those of `LevenbergMarquardt` on each adapter
    alone without `forgetting`. Everything is in float64. Adapters without rows keep values and damping.

    Args:
        model: The model with the bank, as `AdapterBank.attach` returns it.
        damping (`float`): The damping that the first step tries.
        names (`list[str]`, *optional*): The adapters to train, by default all. Rows of others are an error.
        floor (`float`): The lower bound of S_a, as a share of its largest entry.
        memory (`int`): About the bytes that a step may take: so many adapters are solved at once. All rows of an
            adapter are.

    Raises:
        TypeError: `model` has no bank.
        ValueError: A name is unknown, a number is out of range, or the bank cannot be trained, see
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
        memory: int = 2**26,
    ) -> None:
        if not isinstance(model, BankModel):
            raise TypeError(f"`model` is a {type(model).__name__}, but must be what `bank.attach()` returns.")
        check_number(damping, "damping", "(0, inf)")
        check_number(floor, "floor", "(0, 1]")
        super().__init__(model.bank, names, {"damping": damping, "floor": floor, "memory": memory})
        self.model = model
        state = self.state[self.packed]
        state["damping"] = torch.full((len(self.packed),), damping, dtype=torch.float64, device=self.packed.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, terms: Iterable[Any]) -> BankStep:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step of each adapter that has rows, but those that `keep_best` has stopped.

        Args:
            terms: Residual terms (function, rows, ids) or (function, rows, ids, weight), as for
                `LevenbergMarquardt.step`, with the number of the adapter of each row, (n,) int64. `function(model,
                *rows)` is called with any rows; `model(x)` needs no `ids=` there.

        Returns:
            The record. An adapter whose residuals are not finite, or whose loss no damping makes fall, is unchanged.

        Raises:
            ValueError: A term is malformed, or has rows of an adapter that is not in training.
        """
        snapshot, with_ids, checked = self.bank.snapshot, [], []
        if snapshot.trained is None:
            raise ValueError("`finish()` has ended the training. Make another optimizer.")
        for function, rows, ids, *weight in terms:
            rows = rows if isinstance(rows, Sequence) else (rows,)
            with_ids.append((function, (ids, *rows), *weight))
        for function, (ids, *rows), weight in check_terms(with_ids):
            index = snapshot.rows_of(ids)
            snapshot.check_trained(index)
            checked.append((function, rows, index, weight))
        counts = sum(index.bincount(minlength=len(self.packed)) for _, _, index, _ in checked) * self._is_active
        order = counts.argsort(descending=True)[: int((counts > 0).sum())]
        losses = torch.full_like(counts, torch.nan, dtype=torch.float64)
        accepted, first, width = torch.zeros_like(self._is_active), 0, self.packed.shape[1]
        while first < len(order):
            rows = int(counts[order[first]])
            size = self.defaults["memory"] // (8 * width * (16 * rows + min(rows, width)))
            adapters = order[first : first + max(1, size)]
            losses[adapters], accepted[adapters] = self._step_of(adapters, checked)
            first += len(adapters)
        damping = self._by_id(self.state[self.packed]["damping"], self.defaults["damping"])
        return BankStep(self._by_id(losses, torch.nan), self._by_id(accepted, False), damping)

    def _step_of(self, adapters: Tensor, terms: list[Any]) -> tuple[Tensor, Tensor]:
        """Return the losses of some adapters after a step, and whether it was accepted."""
        start, dampings = self.packed[adapters].double(), self.state[self.packed]["damping"]
        residuals, jacobian = self._evaluate(adapters, terms, start, differentiates=True)
        loss, squares = residuals.square().sum(1), jacobian.square().sum(1)
        least = self.defaults["floor"] * squares.amax(1, keepdim=True)
        lengths = squares.maximum(least).clamp(min=1e-300).sqrt()
        # in coordinates whose damping is the identity: sqrt(S) step
        jacobian /= lengths.unsqueeze(1)
        gradient = (jacobian.mT @ residuals.unsqueeze(2)).squeeze(2)
        is_dual = jacobian.shape[1] < jacobian.shape[2]
        matrix = jacobian @ jacobian.mT if is_dual else jacobian.mT @ jacobian
        identity = torch.eye(matrix.shape[1], device=matrix.device).to(matrix)

        damping, factor, accepted = dampings[adapters], 2.0, torch.zeros_like(loss, dtype=torch.bool)
        left = (loss.isfinite() & squares.isfinite().all(1) & gradient.any(1)).nonzero().squeeze(1)
        while len(left):
            triangle, failed = torch.linalg.cholesky_ex(matrix[left] + damping[left, None, None] * identity)
            step = -torch.cholesky_solve((residuals if is_dual else gradient)[left].unsqueeze(2), triangle)
            step = (jacobian[left].mT @ step if is_dual else step).squeeze(2)
            step[failed > 0] = torch.nan
            candidate = (start[left] + step / lengths[left]).to(self.packed.dtype)
            (new_residuals,) = self._evaluate(adapters[left], terms, candidate.double(), differentiates=False)
            decrease = loss[left] - new_residuals.square().sum(1)
            is_less = decrease > 0  # not if one is NaN
            predicted = (damping[left].unsqueeze(1) * step.square() - gradient[left] * step).sum(1)
            agreement = (decrease / predicted)[is_less].tolist()
            factors = [damping_factor(ratio, raised=factor > 2) for ratio in agreement]

            done, left = left[is_less], left[~is_less]
            self.packed[adapters[done]] = candidate[is_less]
            dampings[adapters[done]] = (damping[done] * damping.new_tensor(factors)).clamp(min=SMALLEST_DAMPING)
            loss[done], accepted[done] = loss[done] - decrease[is_less], True
            damping[left] *= factor
            left, factor = left[damping[left] <= LARGEST_DAMPING], 2 * factor
        return loss, accepted

    @torch.enable_grad()
    def _evaluate(self, adapters: Tensor, terms: list[Any], values: Tensor, differentiates: bool) -> list[Tensor]:
        """Compute the residuals (adapters, M) of adapters with these values (adapters, width).

        They are zero where an adapter has fewer rows. Their Jacobian (adapters, M, width) follows if it is asked for.
        """
        results: list[list[Tensor]] = [[], []]
        place = torch.full_like(self._is_active, -1, dtype=torch.int64)
        place[adapters] = torch.arange(len(adapters), device=place.device)
        for number, (function, rows, index, weight) in enumerate(terms):
            owner, order = place[index].sort(stable=True)
            owner, order = owner[owner >= 0], order[owner >= 0]
            if not len(owner):
                continue
            counts = owner.bincount(minlength=len(adapters))
            numbers = torch.arange(len(owner), device=owner.device)
            slots = owner, numbers - (counts.cumsum(0) - counts)[owner]
            if differentiates:  # a copy of the adapter for each row: one backward pass has the gradients of all rows
                packed, groups = values[owner].requires_grad_(), RowGroups(numbers)
            else:
                distinct, groups = group_rows(owner)
                packed = values[distinct]
            sorted_rows = [row[order.to(row.device)] for row in rows]
            residuals = self._call(name_term(number, function), function, sorted_rows, packed, groups)
            residuals = residuals * (weight / counts[owner].double()).sqrt().unsqueeze(1)
            parts = [residuals]
            if differentiates:
                columns = [torch.autograd.grad(column.sum(), packed, retain_graph=True)[0] for column in residuals.T]
                parts.append(torch.stack(columns, 1) * self._entries[adapters[owner]].unsqueeze(1))
            for of_terms, part in zip(results, parts, strict=False):
                padded = part.new_zeros(len(adapters), int(counts.max()), *part.shape[1:])
                of_terms.append(padded.index_put(slots, part.detach()).flatten(1, 2))
        return [torch.cat(of_terms, 1) for of_terms in results if of_terms]

    def _call(self, name: str, function: Any, rows: list[Tensor], packed: Tensor, groups: RowGroups) -> Tensor:
        """Compute the values (n, m) of a residual function for n rows, whose adapters are rows of `packed`."""
        args = tuple(row.double() if row.is_floating_point() else row for row in rows)
        current = BankPass(self.bank, self.bank.snapshot._replace(packed=packed), groups, set())
        with ROWS.set(current), Intercepted():
            values = call_with_parameters(self.model, in_double(self.model), partial(function, self.model), args, {})
        count = len(rows[0])
        values = check_residuals(values, name, count)
        if values.shape == (count, count) and count > 1:
            first = RowGroups(groups.of_rows()[:1])
            if self._call(name, function, [row[:1] for row in rows], packed, first).shape[1] != count:
                raise ValueError(
                    f"The {name} returns ({count}, {count}): values (n, 1) minus data (n,) are all pairs; squeeze one."
                )
        if packed.requires_grad and not values.requires_grad:
            raise ValueError(f"The {name} does not depend on the adapters: is the bank attached to its model?")
        return values.to(packed)
