# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training of all adapters of a bank at once, by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ..kan.row_updates import PackedTucker
from ..tuner.learning_rates import Policy, component_multipliers
from .bank import AdapterBank
from .snapshot import Form


BETA1, BETA2 = 0.9, 0.999  # of AdamW


class BankAdamW(Optimizer):
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
            leaves a component unchanged. State dicts, which say nothing of their start, have the rates
            of a random one.
        weight_decay: As in `torch.optim.AdamW`.

    Raises:
        ValueError: A name or `policy` is unknown, or the bank cannot be trained, see
            `AdapterBank.start_training`.

    Source: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
        >>> import torch
        >>> from peft_lotra import AdapterBank, LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra import BankAdamW
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
        self.bank = bank
        self.packed, is_component = bank.start_training(names)
        self._is_active = is_component.any(1)
        # by id, the row after the last one without an adapter; adapters come and go only after the training
        capacity = len(self.packed)
        rows = bank.snapshot.row_of[1:-1]
        self._row_of = rows.clamp(max=capacity)
        super().__init__([self.packed], {"lr": lr, "weight_decay": weight_decay})

        def multipliers_of(form: Form, layer: PackedTucker) -> Mapping[str, float]:
            widths = {"factor_out": layer.shape[0], "factor_in": layer.shape[1]}
            return component_multipliers(policy, widths, layer.ranks(), form.start == "gradient")

        # zero for entries that fill up, which so keep their values
        self._multipliers = bank.snapshot.fill_components(multipliers_of)
        state = self.state[self.packed]
        state["best"] = self.packed.detach().clone()
        state["least"] = self.packed.new_full((capacity,), torch.inf)
        state["waited"] = torch.zeros_like(state["least"])
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
        is_active = F.pad(self._is_active, (0, 1), value=False)
        return is_active[self._row_of]

    def finish(self) -> None:
        """Give the adapters their best values, if `keep_best` kept them, and end the training of the bank."""
        state = self.state[self.packed]
        is_kept = state["least"] < torch.inf
        self.packed.data[is_kept] = state["best"][is_kept]
        self.bank.stop_training()
