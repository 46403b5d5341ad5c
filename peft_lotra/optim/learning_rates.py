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

"""A learning rate for each component of a LoTRA adapter, so that one rate serves networks of any width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from ..families.slim import SlimLayer
from ..kan.slim_kan import SlimKANLinear
from ..tuner.layer import LoTRALayer


TUCKER_LAYERS = (LoTRALayer, SlimKANLinear, SlimLayer)

COMPONENTS = LoTRALayer.adapter_layer_names

# The width at which policy "width" is policy "uniform".
REFERENCE_WIDTH = 16

RULES = ("adaptive", "sgd")


@dataclass(frozen=True)
class LoTRALearningRate:
    """One line of the table: a component of one adapter in one layer.

    Attributes:
        module (`str`): The name of the adapted layer.
        adapter (`str`): The name of the adapter.
        component (`str`): "core", "factor_out", "factor_in" or "factor_basis".
        shape (`tuple[int, ...]`): The shape of the component.
        width (`int`): The layer's width on the component's side; 0 for core and factor_basis, which have none.
        multiplier (`float`): What its learning rate is multiplied by.
        parameter (`nn.Parameter`): The component itself.
    """

    module: str
    adapter: str
    component: str
    shape: tuple[int, ...]
    width: int
    multiplier: float
    parameter: nn.Parameter = field(repr=False, compare=False)

    @property
    def group(self) -> str:
        """The name of the parameter group that the component is in, e.g. "factor_in/64"."""
        return f"{self.component}/{self.width}" if self.width else self.component


class LoTRALearningRates(list[LoTRALearningRate]):
    """The lines of the table; `print` shows them in columns."""

    def __str__(self) -> str:
        lines = [("module", "adapter", "component", "shape", "multiplier")]
        lines += [(x.module, x.adapter, x.component, str(x.shape), f"{x.multiplier:.4g}") for x in self]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def lotra_lr_multipliers(
    model: nn.Module,
    policy: Literal["width", "uniform"] | Mapping[str, float] = "width",
    optimizer_cls: type[Optimizer] | None = None,
    *,
    rule: Literal["adaptive", "sgd"] | None = None,
) -> LoTRALearningRates:
    """The factor that `create_lotra_optimizer` multiplies the learning rate of each trainable component with.

    Args:
        model (`nn.Module`): A model with LoTRA layers.
        policy, optimizer_cls, rule: As for [`create_lotra_optimizer`]; without an optimizer class, and without a
            rule, the one of Adam counts.

    Returns:
        `LoTRALearningRates`: A list of lines (module, adapter, component, shape, width, multiplier, parameter), which
        prints as a table.

    Raises:
        ValueError: `policy` or `rule` is unknown, or no LoTRA component of the model can be trained.

    Example:

    ```py
    >>> print(lotra_lr_multipliers(model))
    ```
    """
    multipliers = _check_policy(policy)
    if rule is None:
        rule = "sgd" if optimizer_cls is not None and _steps_with_gradient(optimizer_cls) else "adaptive"
    if rule not in RULES:
        raise ValueError(f"`rule` is {rule!r}, but must be one of {RULES}, or None.")

    layers = {name: module for name, module in model.named_modules() if isinstance(module, TUCKER_LAYERS)}
    if not layers:
        raise ValueError(
            f"The {type(model).__name__} has no LoTRA layer, and no Slim one. Adapt it first: "
            "`model = get_peft_model(model, LoTRAConfig(...))`."
        )
    narrowest = min(layer.out_features for layer in layers.values())
    table = LoTRALearningRates()
    for name, layer in layers.items():
        widths = {"lotra_factor_out": layer.out_features, "lotra_factor_in": layer.in_features}
        for adapter, parameters in _components(layer).items():
            for component, parameter in zip(COMPONENTS, parameters, strict=True):
                if not parameter.requires_grad:
                    continue
                width = widths.get(component, 0)
                if policy == "width":
                    multiplier = _width_multiplier(component, width, narrowest, rule)
                else:
                    multiplier = multipliers.get(component, 1.0)
                short, shape = component.removeprefix("lotra_"), tuple(parameter.shape)
                table.append(LoTRALearningRate(name, adapter, short, shape, width, multiplier, parameter))
    if not table:
        raise ValueError(
            "No LoTRA component requires a gradient, and no Slim one. Load the adapter with `is_trainable=True`, or "
            "activate it with `model.set_adapter(name)`."
        )
    return table


def _components(layer: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """core, factor_out, factor_in and factor_basis of each adapter, or of the Slim layer itself."""
    if isinstance(layer, LoTRALayer):
        return {adapter: layer.get_components(adapter) for adapter in layer.lotra_core}
    return {"": layer.components}


def create_lotra_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    policy: Literal["width", "uniform"] | Mapping[str, float] = "width",
    rule: Literal["adaptive", "sgd"] | None = None,
    **kwargs: Any,
) -> Optimizer:
    """
    Creates an optimizer with a learning rate for each component of the LoTRA adapters.

    Tucker components differ in what a step does, and identical rates train them inefficiently (arXiv 2502.06153). With
    policy "width", a layer of n_in inputs and n_out outputs trains at lr times

    | component          | Adam and the like         | SGD                   |
    |--------------------|---------------------------|-----------------------|
    | core, factor_basis | 1                         | 1                     |
    | factor_out         | sqrt(16 / max(n_out, 16)) | sqrt(max(m, 16) / 16) |
    | factor_in          | sqrt(16 / max(n_in, 16))  | 1                     |

    where m is the smallest n_out of the adapted layers. An lr that is good at one width is then good at the others.
    The choices below were made by `examples/learning_rates.py` (three-layer KANs of width 16 to 512, ranks 4), where
    3e-2 is best for Adam. Parameters that are no LoTRA component (`modules_to_save`, biases) train at lr, and so does
    everything in layers of width 16 or less.

    *Adam.* A step is the sign of the gradient, of size lr in every entry, so only a side as wide as the network
    matters; core and factor_basis have none. With random factors a column of factor_in has norm 1, so its entries, and
    those of the column to be found, are of size 1/sqrt(n_in): to arrive in a number of steps that does not depend on
    n_in, lr must not fall faster than 1/sqrt(n_in). Nor slower: a step moves what is projected on the column by n_in
    terms of size lr, which add up to lr sqrt(n_in) if the inputs are independent, and to lr n_in if they move
    together. (1/n_in, the stable rate in the second case, leaves seven times the loss at width 256, each at its best
    lr.) A step on factor_out moves each of n_out outputs by lr, and the next layer sums them with weights of size
    1/sqrt(n_out), whose signs the step follows: lr sqrt(n_out).

    *SGD.* A step is the gradient. A loss that is a mean over m outputs has gradients of 1/m of its size behind each,
    so factor_out, which each output trains by itself, would need a rate that grows with m. Core, factor_in and
    factor_basis gather their gradients over all outputs and need none. m is not known, but no larger than the
    narrowest layer. Measured: a rate with m itself diverges at width 256 at the lr that is best elsewhere, sqrt(m)
    does not, and with few outputs (m = 1, widths 64 and 256) any growth with n_out makes the best lr fall. For
    factor_in, whose effect is a sum over n_in inputs, 1/n_in was tried too; it learns more slowly and is no more
    stable. All in all, SGD's best lr changes little with the width even by one rate for all; the rule learns faster.

    Args:
        model (`nn.Module`): A model with LoTRA layers. Only parameters that require a gradient are trained, i.e. the
            active adapters.
        optimizer_cls (`type[torch.optim.Optimizer]`): A class that takes parameter groups.
        lr (`float`): The learning rate that the table multiplies.
        policy (`"width"`, `"uniform"` or `dict[str, float]`): The rule above; lr for every component; or a multiplier
            for each component named ("core", "factor_out", "factor_in", "factor_basis"), 1 for the others.
        rule (`"adaptive"` or `"sgd"`, *optional*): Which column of the table counts. By default "sgd" for an optimizer
            class that is, or derives from, one called SGD or ASGD, and "adaptive" for all others.
        kwargs: Passed to the optimizer, e.g. `weight_decay`, which every group then has, and may change.

    Returns:
        `torch.optim.Optimizer`: One group per component and width, named in its key "name" ("core", "factor_in/64"),
        and a last one, "other", for trainable parameters that are no component. Schedulers that scale the rates
        keep their ratios; one that is given rates of its own (`OneCycleLR(max_lr=...)`) must be given
        `[group["lr"] for group in optimizer.param_groups]`.

    Raises:
        ValueError: `lr` is not a finite number above 0, `policy` or `rule` is unknown, or no LoTRA component of the
            model can be trained.

    Example:

    ```py
    >>> optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=3e-2, weight_decay=0.0)
    >>> trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    ```
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not math.isfinite(lr) or lr <= 0:
        raise ValueError(f"`lr` is {lr!r}, but must be a finite number above 0.")
    table = lotra_lr_multipliers(model, policy, optimizer_cls, rule=rule)
    groups: dict[str, dict[str, Any]] = {}
    for line in table:
        group = groups.setdefault(line.group, {"name": line.group, "params": [], "lr": lr * line.multiplier})
        group["params"].append(line.parameter)
    components = {id(line.parameter) for line in table}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in components]
    if others:
        groups["other"] = {"name": "other", "params": others, "lr": lr}
    return optimizer_cls(list(groups.values()), lr=lr, **kwargs)


def _check_policy(policy: str | Mapping[str, float]) -> dict[str, float]:
    """The multipliers that the policy names, by component's full name; none for "width" and "uniform"."""
    known = [component.removeprefix("lotra_") for component in COMPONENTS]
    if isinstance(policy, Mapping):
        for component, multiplier in policy.items():
            if component not in known:
                raise ValueError(f"`policy` names the component {component!r}, but the components are {known}.")
            number = isinstance(multiplier, (int, float)) and not isinstance(multiplier, bool)
            if not number or not math.isfinite(multiplier) or multiplier < 0:
                raise ValueError(
                    f"`policy` has the multiplier {multiplier!r} for {component!r}, but it must be a finite number of "
                    "at least 0."
                )
        return {f"lotra_{component}": float(multiplier) for component, multiplier in policy.items()}
    if policy not in ("width", "uniform"):
        raise ValueError(
            f'`policy` is {policy!r}, but must be "width", "uniform", or a dict with a multiplier for some of the '
            f"components {known}."
        )
    return {}


def _width_multiplier(component: str, width: int, narrowest: int, rule: str) -> float:
    """Policy "width", as derived in `create_lotra_optimizer`; `narrowest` is the smallest n_out of all layers."""
    # A side narrower than the reference keeps lr: a network of few inputs or outputs is not a narrow one.
    if rule == "adaptive":
        return math.sqrt(REFERENCE_WIDTH / max(width, REFERENCE_WIDTH))
    if component == "lotra_factor_out":
        return math.sqrt(max(narrowest, REFERENCE_WIDTH) / REFERENCE_WIDTH)
    return 1.0


def _steps_with_gradient(optimizer_cls: type[Optimizer]) -> bool:
    """Whether the optimizer's step is proportional to the gradient. Known by its name, which also finds the classes
    that follow torch.optim.SGD's without deriving from it."""
    return any(cls.__name__ in ("SGD", "ASGD") for cls in getattr(optimizer_cls, "__mro__", ()))
