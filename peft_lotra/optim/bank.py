# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training of all adapters of a bank at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..bank.bank import AdapterBank
from ..modules.checks import as_number
from .learning_rates import COMPONENTS, Policy, component_multipliers


class BankAdamW(Optimizer):
    r"""
    AdamW for the adapters of a bank, each by itself: a step changes those that have rows in the batch.

    The others keep their values, moments and numbers of steps. If the loss is the sum of the mean errors of the
    adapters, each is trained as it would be alone on its rows by `create_lotra_optimizer(model, torch.optim.AdamW)`.
    An `alpha` of the configuration is in the cores, whose steps are those of `alpha=1`.

    Args:
        bank (`AdapterBank`): The bank, attached or not.
        lr (`float`): The learning rate that the rates of the components are multiples of.
        names (`list[str]`, *optional*): The adapters to train, by default all. Rows of others are an error.
        policy: As in `create_lotra_optimizer`; a multiplier of 0 leaves a component as it is.
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
        if not as_number(lr) > 0 or not all(0 <= as_number(it) < 1 for it in betas):
            raise ValueError(f"`lr` and `betas` are {lr!r:.50} and {betas!r:.50}, but must be above 0, and in [0, 1).")
        multipliers = []
        for form in bank.store.forms.values():
            widths = {"factor_out": form.shape[0], "factor_in": form.shape[1]}
            of_layer = component_multipliers(policy, widths)
            for name, shape in zip(COMPONENTS, form.component_shapes(), strict=False):
                rate = torch.tensor(of_layer.get(name, 1.0), dtype=torch.float64)
                multipliers.append(rate.expand(shape).flatten())
        self.bank = bank
        packed, self._entries = bank.start_training(names)
        self._multipliers = torch.cat(multipliers).to(packed)
        self._is_active = self._entries.any(1)
        super().__init__([packed], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Changes the adapters that have rows in the batch, but those that `keep_best` has stopped."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        (group,) = self.param_groups
        (packed,) = group["params"]
        if packed.grad is None:
            return loss
        gradient, state = packed.grad.coalesce(), self.state[packed]
        if "step" not in state:
            state["step"] = packed.new_zeros(len(packed), 1)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(packed), torch.zeros_like(packed)
        is_active = self._is_active[gradient.indices()[0]]
        rows = gradient.indices()[0][is_active]
        values = gradient.values()[is_active] * self._entries[rows]
        (beta1, beta2), lr = group["betas"], group["lr"] * self._multipliers
        step = state["step"][rows] + 1
        average = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        size = (square.sqrt() / (1 - beta2**step).sqrt()).add_(group["eps"])
        decayed = packed[rows] * (1 - group["weight_decay"] * lr)
        packed[rows] = decayed - lr / (1 - beta1**step) * average / size
        for name, value in (("step", step), ("exp_avg", average), ("exp_avg_sq", square)):
            state[name][rows] = value
        return loss

    @torch.no_grad()
    def keep_best(self, losses: Tensor, patience: int | None = None) -> Tensor:
        """Keeps the values of each adapter whose loss is the least so far, for `finish`.

        Args:
            losses (`torch.Tensor`): The losses of the present values, of held-out rows for instance, as
                `AdapterBank.mean_by_adapter` returns them: (room,), NaN for no news.
            patience (`int`, *optional*): An adapter without a new least loss in so many calls is trained no more.

        Returns:
            `torch.Tensor`: Whether each adapter is still trained, (room,), by number.
        """
        (packed,) = self.param_groups[0]["params"]
        state = self.state[packed]
        if "best" not in state:
            state["best"], state["least"] = packed.detach().clone(), packed.new_full((len(packed),), torch.inf)
            state["waited"] = torch.zeros_like(state["least"])
        losses = torch.cat([losses.new_full((1,), torch.nan), losses]).to(packed)
        is_less = self._is_active & (losses < state["least"])
        state["best"][is_less], state["least"][is_less] = packed[is_less], losses[is_less]
        state["waited"] = torch.where(is_less, 0, state["waited"] + ~losses.isnan())
        if patience is not None:
            self._is_active &= state["waited"] < patience
        return self._is_active[1:].clone()

    def finish(self) -> None:
        """Gives the adapters their best values, if `keep_best` kept them, and ends the training of the bank."""
        (packed,) = self.param_groups[0]["params"]
        if "best" in (state := self.state[packed]):
            is_kept = state["least"] < torch.inf
            packed.data[is_kept] = state["best"][is_kept]
        self.bank.stop_training()
