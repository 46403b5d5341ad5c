# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A learning rate for each component of a LoTRA adapter: one rate then serves networks of any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ..kan.slim_kan import SlimKANLinear
from ..modules.calls import unwrap
from ..modules.checks import as_number, check_function, check_number
from ..tucker import Tucker
from .gradients import OPTIMIZERS
from .layer import LoTRALayer
from .linear_path import linear_paths


Policy = Literal["width", "uniform"] | Mapping[str, float]

REFERENCE_WIDTH, REFERENCE_RANK = 16, 4  # up to which policy "width" is policy "uniform"
_RATE_OF_SHAPES = 0.3  # of components with a full out mode, which are best at a third of the lr of others


def component_multipliers(
    policy: Policy,
    widths: Mapping[str, int],
    ranks: tuple[int, ...] = (),
    from_gradient: bool = False,
) -> Mapping[str, float]:
    """Return the multipliers of the components of an adapter in a layer, 1 for others.

    Raises:
        ValueError: `policy` is unknown, or has a component or a multiplier that cannot be.
    """
    by_component = {} if policy in ("width", "uniform") else policy
    is_mapping = isinstance(by_component, Mapping) and by_component.keys() <= set(Tucker._fields)
    if not is_mapping or not all(as_number(multiplier) >= 0 for multiplier in by_component.values()):
        raise ValueError(
            f'`policy` is {policy!r:.100}, but must be "width", "uniform", or multipliers of at least 0 for some of '
            f"{Tucker._fields}."
        )
    if policy != "width":
        return by_component

    multipliers = {side: _width_multiplier(width) for side, width in widths.items()}
    has_shapes = False
    if ranks and ranks[0] == widths["factor_out"]:
        # a low rank reaches few outputs, too: such a layer trains at the rates of the others
        is_low_rank = ranks[0] <= REFERENCE_RANK and ranks[1] < widths["factor_in"]
        has_shapes = from_gradient or not is_low_rank
    if has_shapes:
        # without factor_out, the core is the component that starts at zero
        multipliers["core"] = _RATE_OF_SHAPES * _width_multiplier(ranks[1])
        multipliers["factor_basis"] = _RATE_OF_SHAPES
    elif from_gradient:
        multipliers["factor_out"] *= 0.5
        multipliers["core"] = 0.1
    elif ranks:
        multipliers["factor_out"] *= REFERENCE_RANK / max(ranks[0], REFERENCE_RANK)
        multipliers["core"] = REFERENCE_RANK**2 / max(ranks[1] * ranks[2], REFERENCE_RANK**2)
    return multipliers


def _width_multiplier(width: int) -> float:
    """Return the multiplier of a side; one narrower than the reference keeps lr."""
    return math.sqrt(REFERENCE_WIDTH / max(width, REFERENCE_WIDTH))


def _trained_components(
    model: nn.Module,
    policy: Policy,
) -> Iterator[tuple[str, float, Tensor]]:
    """Yield the group, the multiplier and the parameter of each component that requires a gradient."""
    network = unwrap(model)
    starts = {}
    for owner in network.modules():
        for adapter, config in vars(owner).get("peft_config", {}).items():
            for layer in owner.modules():
                starts[layer, adapter] = getattr(config, "init_weights", None)

    scale = _scale_of_path(network) or 1.0
    layers = [layer for layer in network.modules() if isinstance(layer, (LoTRALayer, SlimKANLinear))]
    for layer in layers:
        if isinstance(layer, LoTRALayer):
            adapters = {adapter: layer.get_components(adapter) for adapter in layer.lotra_core}
        else:
            adapters = {"": layer.components}
        widths = {"factor_out": layer.out_features, "factor_in": layer.in_features}
        for adapter, parameters in adapters.items():
            # a Slim layer has nothing to start from: its factors are the layer
            ranks = parameters.ranks if adapter else ()
            from_gradient = starts.get((layer, adapter)) == "gradient"
            multipliers = dict(component_multipliers(policy, widths, ranks, from_gradient))
            if layer is layers[-1]:
                first = "core" if parameters.factor_out is None else "factor_out"  # which is zero at the start
                multipliers[first] = multipliers.get(first, 1.0) / scale
            for component, parameter in parameters._asdict().items():
                if not parameter.requires_grad:
                    continue
                group = component
                if component in widths:
                    group = f"{component}/{widths[component]}"
                yield group, multipliers.get(component, 1.0), parameter


def _scale_of_path(network: nn.Module) -> float | None:
    """Return the scale of a network next to a fitted path, None without one."""
    for path in linear_paths(network):
        if not path.path.scale.requires_grad:
            return path.path.scale.item()
    return None


def create_lotra_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float | None = None,
    other_lr: float | None = None,
    policy: Policy = "width",
    **kwargs: Any,
) -> Optimizer:
    """Create an optimizer with a learning rate for each component of the LoTRA adapters.

    With policy "width", a layer of n_in inputs and n_out outputs trains by Adam and the like at lr times the entries
    of this table, where s(n) = sqrt(16 / max(n, 16)):

    | component     | random start, HOSVD      | start from the gradient | any start, full out mode |
    |---------------|--------------------------|-------------------------|--------------------------|
    | core          | 16 / max(r2 r3, 16)      | 0.1                     | 0.3 s(r2)                |
    | factor_out    | 4 / max(r1, 4) s(n_out)  | 0.5 s(n_out)            | -                        |
    | factor_in     | s(n_in)                  | s(n_in)                 | s(n_in)                  |
    | factor_basis  | 1                        | 1                       | 0.3                      |
    | factor_kernel | 1                        | 1                       | 1                        |

    With at most 4 outputs and r2 < n_in, a full out mode keeps the rates of the first column, unless the start is from
    the gradient: most ranks are full there.
    An lr that is good at one width and rank is then good at the others. Slim layers have the rates of rank 4. SGD
    trains all at lr: no rule that was tried beats it.
    Next to a path that [`fit_path`] has fitted, whose scale multiplies the network, the update of the last layer is
    trained at the rate divided by the scale: the scale is of the base.
    Parameters that are no LoTRA component (LoRA on other layers, `modules_to_save`, biases) train at `other_lr`.
    docs/method.md derives the table.

    Args:
        model: A model with LoTRA or Slim layers. Parameters that require a gradient (active adapters) are trained.
        optimizer_cls: A class that takes parameter groups.
        lr: The learning rate that the table multiplies. By default 3e-2, or 3e-3 next to a path that [`fit_path`] has
            fitted.
        other_lr: The learning rate of trained parameters that are no LoTRA component. The default `None` means `lr`,
            a rate for Tucker components. LoRA on attention often needs a lower one.
        policy: "width" for the table above; "uniform" for lr everywhere; or a dict of multipliers by component
            ("core", "factor_out", "factor_in", "factor_basis", "factor_kernel"), 1 for the others. An optimizer counts
            as SGD if its class is, or derives from, one called SGD or ASGD.
        kwargs: Passed to the optimizer, e.g. `weight_decay` for every group.

    Returns:
        One group per component and width, with the key "name" ("core", "factor_in/64"), and a last group "other" for
        trained parameters that are no component. Schedulers that scale the rates keep their ratios. Give one that
        sets the rates `OneCycleLR(max_lr=[group["lr"] for group in optimizer.param_groups])`.

    Raises:
        TypeError: `optimizer_cls` is an optimizer instead of its class.
        ValueError: `lr` or `other_lr` is not a finite number above 0, `policy` is unknown, or no LoTRA component of
            the model can be trained.

    Source: Gao, Ng and Tan, arXiv 2502.06153: identical rates train Tucker components inefficiently.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([64, 4]), LoTRAConfig(r=2))
        >>> optimizer = create_lotra_optimizer(
        ...     model, torch.optim.AdamW, lr=3e-2, weight_decay=0.0
        ... )
        >>> {group["name"]: group["lr"] for group in optimizer.param_groups}
        {'core': 0.03, 'factor_out/4': 0.03, 'factor_in/64': 0.015, 'factor_basis': 0.03}
    """
    check_function(optimizer_cls, "optimizer_cls")
    if lr is None:
        lr = 3e-2 if _scale_of_path(model) is None else 3e-3
    check_number(lr, "lr", "(0, inf)")
    if other_lr is None:
        other_lr = lr
    check_number(other_lr, "other_lr", "(0, inf)")
    # the name counts, also of classes that follow torch.optim.SGD without deriving from it
    cls = getattr(optimizer_cls, "func", optimizer_cls)  # of a `partial`
    bases = {base.__name__ for base in getattr(cls, "__mro__", ())}
    if policy == "width" and bases & {"SGD", "ASGD"}:
        policy = "uniform"

    groups = {}
    components = set()
    for name, multiplier, parameter in _trained_components(model, policy):
        empty = {"name": name, "params": [], "lr": lr * multiplier}
        group = groups.setdefault((name, multiplier), empty)
        group["params"].append(parameter)
        components.add(parameter)

    if not groups:
        raise ValueError(
            f"No component of a LoTRA or Slim layer of the {type(model).__name__} requires a gradient. Adapt it by "
            "`get_peft_model(model, LoTRAConfig(...))`, load the adapter with `is_trainable=True`, or activate it by "
            "`model.set_adapter(name)`."
        )

    other_parameters = [p for p in model.parameters() if p.requires_grad and p not in components]
    if other_parameters:
        groups["other", 1.0] = {"name": "other", "params": other_parameters, "lr": other_lr}
    optimizer = optimizer_cls(list(groups.values()), lr=lr, **kwargs)
    if policy == "width" and isinstance(optimizer, Optimizer):
        OPTIMIZERS.add(optimizer)
    return optimizer
