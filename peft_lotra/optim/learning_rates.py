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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..families.slim import SlimLayer
from ..functional import unwrap
from ..kan.slim_kan import SlimKANLinear
from ..report import Report, TextTable
from ..tucker import Tucker
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
        module (`str`): The name of the adapted layer in the base model, as `find_kan_layers` gives it.
        adapter (`str`): The name of the adapter.
        component (`str`): "core", "factor_out", "factor_in" or "factor_basis".
        shape (`tuple[int, ...]`): The shape of the component.
        width (`int`): The layer's width on the component's side; 0 for core and factor_basis, which have none.
        multiplier (`float`): The factor of its learning rate.
        parameter (`torch.Tensor`): The component itself.
    """

    module: str
    adapter: str
    component: str
    shape: tuple[int, ...]
    width: int
    multiplier: float
    parameter: Tensor = field(repr=False, compare=False)

    @property
    def group(self) -> str:
        """The name of its parameter group, e.g. "factor_in/64"."""
        return f"{self.component}/{self.width}" if self.width else self.component


class LoTRALearningRates(Report, list[LoTRALearningRate]):
    """The lines of the table, a list."""

    def _table(self) -> TextTable:
        rows = [[x.module, x.adapter, x.component, str(x.shape), f"{x.multiplier:.4g}"] for x in self]
        return TextTable(["module", "adapter", "component", "shape", "multiplier"], rows)

    def as_dict(self) -> dict[str, Any]:
        """The lines in plain values, without the parameters, for JSON."""
        names = ("module", "adapter", "component", "shape", "width", "multiplier")
        return {"components": [{name: getattr(line, name) for name in names} for line in self]}


def lotra_lr_multipliers(
    model: nn.Module,
    policy: Literal["width", "uniform"] | Mapping[str, float] = "width",
    optimizer_cls: Callable[..., Optimizer] | None = None,
    *,
    rule: Literal["adaptive", "sgd"] | None = None,
) -> LoTRALearningRates:
    """The factors that `create_lotra_optimizer` multiplies the learning rate with, for each trainable component.

    Args:
        model (`nn.Module`): A model with LoTRA or Slim layers.
        policy, optimizer_cls, rule: As for [`create_lotra_optimizer`]. Without class and rule, that of Adam counts.

    Returns:
        `LoTRALearningRates`: A list of lines (module, adapter, component, shape, width, multiplier, parameter), which
        prints as a table.

    Raises:
        ValueError: `policy` or `rule` is unknown, or no LoTRA component of the model can be trained.

    Example:

    ```py
    >>> from peft_lotra import lotra_lr_multipliers
    >>> from peft_lotra.kan import SlimKAN
    >>> print(lotra_lr_multipliers(SlimKAN([64, 16], ranks=2)))
    module    adapter  component     shape      multiplier
    layers.0           core          (2, 2, 2)  1
    layers.0           factor_out    (16, 2)    1
    layers.0           factor_in     (64, 2)    0.5
    layers.0           factor_basis  (9, 2)     1

    ```
    """
    multipliers = _check_policy(policy)
    if rule is None:
        rule = "sgd" if optimizer_cls is not None and _steps_with_gradient(optimizer_cls) else "adaptive"
    if rule not in RULES:
        raise ValueError(f"`rule` is {rule!r}, but must be one of {RULES}, or None.")

    layers = {name: part for name, part in unwrap(model).named_modules() if isinstance(part, TUCKER_LAYERS)}
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


def _components(layer: LoTRALayer | SlimKANLinear | SlimLayer) -> dict[str, Tucker]:
    """The components of each adapter, or of the Slim layer itself."""
    if isinstance(layer, LoTRALayer):
        return {adapter: layer.get_components(adapter) for adapter in layer.lotra_core}
    return {"": layer.components}


def create_lotra_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    policy: Literal["width", "uniform"] | Mapping[str, float] = "width",
    rule: Literal["adaptive", "sgd"] | None = None,
    **kwargs: Any,
) -> Optimizer:
    """Creates an optimizer with a learning rate for each component of the LoTRA adapters.

    With policy "width", a layer of n_in inputs and n_out outputs trains at lr times

    | component          | Adam and the like         | SGD                   |
    |--------------------|---------------------------|-----------------------|
    | core, factor_basis | 1                         | 1                     |
    | factor_out         | sqrt(16 / max(n_out, 16)) | sqrt(max(m, 16) / 16) |
    | factor_in          | sqrt(16 / max(n_in, 16))  | 1                     |

    where m is the smallest n_out of the adapted layers. An lr that is good at one width is then good at the others.
    Parameters that are no LoTRA component (`modules_to_save`, biases) train at lr. docs/notes/optim.md derives the
    table.

    Args:
        model (`nn.Module`): A model with LoTRA or Slim layers. Only parameters that require a gradient are trained,
            i.e. the active adapters.
        optimizer_cls (`type[torch.optim.Optimizer]`): A class that takes parameter groups.
        lr (`float`): The learning rate that the table multiplies.
        policy (`"width"`, `"uniform"` or `dict[str, float]`): The table above; lr for every component; or a multiplier
            for each component named ("core", "factor_out", "factor_in", "factor_basis"), 1 for the others.
        rule (`"adaptive"` or `"sgd"`, *optional*): Which column of the table counts. By default "sgd" for an optimizer
            class that is, or derives from, one called SGD or ASGD, and "adaptive" for all others.
        kwargs: Passed to the optimizer, e.g. `weight_decay`, which every group then has, and may change.

    Returns:
        `torch.optim.Optimizer`: One group per component and width, named in its key "name" ("core", "factor_in/64"),
        and a last one, "other", for trainable parameters that are no component. Schedulers that scale the rates keep
        their ratios. Give one that sets rates itself `OneCycleLR(max_lr=[group["lr"] for group in
        optimizer.param_groups])`.

    Raises:
        ValueError: `lr` is not a finite number above 0, `policy` or `rule` is unknown, or no LoTRA component of the
            model can be trained.

    Source: Gao, Ng and Tan, arXiv 2502.06153: identical rates train Tucker components inefficiently.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from peft_lotra import LoTRAConfig, create_lotra_optimizer
    >>> from peft_lotra.kan import KAN
    >>> model = get_peft_model(KAN([64, 4]), LoTRAConfig(r=2))
    >>> optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=3e-2, weight_decay=0.0)
    >>> {group["name"]: group["lr"] for group in optimizer.param_groups}
    {'core': 0.03, 'factor_out/4': 0.03, 'factor_in/64': 0.015, 'factor_basis': 0.03}

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
    """The multipliers that the policy names, by the components' full names; none for "width" and "uniform"."""
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
    """The table of `create_lotra_optimizer`; `narrowest` is the smallest n_out of all layers."""
    # A side narrower than the reference keeps lr: a network of few inputs or outputs is not a narrow one.
    if rule == "adaptive":
        return math.sqrt(REFERENCE_WIDTH / max(width, REFERENCE_WIDTH))
    if component == "lotra_factor_out":
        return math.sqrt(max(narrowest, REFERENCE_WIDTH) / REFERENCE_WIDTH)
    return 1.0


def _steps_with_gradient(optimizer_cls: Callable[..., Optimizer]) -> bool:
    """Whether the optimizer's step is proportional to the gradient. The name tells, also of classes that follow
    torch.optim.SGD without deriving from it."""
    return any(cls.__name__ in ("SGD", "ASGD") for cls in getattr(optimizer_cls, "__mro__", ()))
