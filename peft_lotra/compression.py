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

"""Slim KANs out of trained ones: `slim` brings the coefficient tensors of any KAN into Tucker form."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from .kan.layer import KANLinear
from .kan.slim import SlimKANLinear, warn_capped
from .kan_layers import KANLayerSpec, find_kan_layers, known_families
from .ranks import Spectrum, pattern_key, read_coefficients, spectrum_of, suggest_ranks
from .slim_layer import SlimLayer
from .targets import locate_target
from .tucker import balance, cap_ranks, check_ranks, reconstruct, tucker


Ranks = int | tuple[int, int, int]


@dataclass(frozen=True)
class SlimReport:
    """What `slim` did; prints as a table.

    Attributes:
        errors (`dict[str, float]`): By layer, the norm of what the factors miss of the coefficient tensor (with the
            residual weights), as a share of its norm; measured on the factors as they are stored.
        ranks (`dict[str, tuple[int, int, int]]`): By layer.
        dense (`list[str]`): The layers that were left as they were, since factors would take more parameters.
        parameters (`tuple[int, int]`): Of the KAN layers' coefficients, before and after.
    """

    errors: dict[str, float]
    ranks: dict[str, tuple[int, int, int]]
    dense: list[str]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        width = max(map(len, [*self.errors, *self.dense]))
        lines = [f"{name:{width}}  {str(self.ranks[name]):14}  error {e:.2%}" for name, e in self.errors.items()]
        lines += [f"{name:{width}}  left dense: its factors would take more parameters" for name in self.dense]
        before, after = self.parameters
        return "\n".join([*lines, f"{after:,} parameters, {before:,} before ({before / after:.1f}x)"])


def slim(
    model: nn.Module,
    ranks: Ranks | Mapping[str, Ranks] | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
) -> nn.Module:
    """Compresses a trained KAN: the coefficient tensor of each layer, with its residual weights, becomes a core and
    three factors, by higher-order orthogonal iteration (HOOI).

    A `KANLinear` becomes a `SlimKANLinear`, the layer of another family a `SlimLayer` around what is left of it. The
    result trains on like any network; a few epochs of fine-tuning win back most of what the truncation cost. Trained
    coefficient tensors are far from low rank (99 % of the energy takes nearly full ranks), so that few ranks and some
    fine-tuning serve better than much energy: see `examples/slim_images.py`.

    Where a family multiplies the splines of each edge by a scale (efficient-kan, pykan), coefficient times scale is
    what is compressed, and the scale is 1 from then on.

    Example:

    ```py
    >>> small = slim(model, budget=5000)
    >>> print(small.slim_report)
    >>> # ... train it ...
    >>> model = small.to_dense()
    ```

    Args:
        model (`nn.Module`): A network with KAN layers, or one layer, without adapters. It is left as it is.
        ranks (`int`, `tuple[int, int, int]` or `dict`, *optional*): (ro, ri, rb) for each layer, capped by the sizes
            of its modes with a warning; or by layer, as `suggest_ranks` returns them, others being left dense;
        energy (`float`, *optional*): or the share of the squared norm to keep in each layer, above 0 and up to 1;
        budget (`int`, *optional*): or the number of parameters for the coefficients of all layers together.

    Returns:
        `nn.Module`: A copy of the model, of the same class, with Slim layers. It has a [`SlimReport`] as
        `slim_report`, and `to_dense()`, which returns a copy of the original class. A layer whose factors would take
        more parameters than its tensor is left dense; the report and a warning name it.

    Raises:
        ValueError: Not one of `ranks`, `energy` and `budget` is given, or one that cannot be; the model has adapters
            (merge them first), no KAN layer, or coefficients that are not finite.
    """
    if [ranks, energy, budget].count(None) != 2:
        raise ValueError(
            f"Pass one of `ranks`, `energy` and `budget`, got `ranks`={ranks}, `energy`={energy}, `budget`={budget}."
        )
    if isinstance(ranks, Mapping):
        ranks = {key: check_ranks(r, "ranks") for key, r in ranks.items()}
    elif ranks is not None:
        ranks = check_ranks(ranks, "ranks")
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted or isinstance(model, PeftModel):
        raise ValueError(
            f"The model has adapters ({', '.join(adapted[:3]) or type(model).__name__}): merge them first, "
            "`model = model.merge_and_unload()`."
        )
    model = _copy(model)
    layers = {
        found.name: locate_target(found.name, model.get_submodule(found.name))[:2]
        for found in find_kan_layers(model)
        if not isinstance(model.get_submodule(found.name), (SlimKANLinear, SlimLayer))
    }
    if not layers:
        raise ValueError(
            "No KAN layer that could be compressed was found in the model. The known families are "
            f"{', '.join(known_families())}; describe another one with `peft_lotra.register_kan_layer`."
        )
    tensors = {name: _tensor(name, layer) for name, (layer, _) in layers.items()}
    chosen = _choose(tensors, ranks, energy, budget)

    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    after = sum(sizes.values())
    errors, dense = {}, []
    for name, tensor in tensors.items():
        if name not in chosen or _cost(chosen[name], tensor.shape) >= sizes[name]:
            dense.append(name)
            continue
        core, factors = balance(*tucker(tensor, chosen[name]))
        slim_layer = _make(*layers[name], core, factors)
        with torch.no_grad():
            stored = reconstruct(*(component.double() for component in slim_layer.components))
        errors[name] = ((tensor - stored).norm() / tensor.norm().clamp(min=1e-300)).item()
        after += sum(component.numel() for component in slim_layer.components) - sizes[name]
        model = _replace(model, name, slim_layer)
    grown = [name for name in dense if name in chosen]
    if grown:
        warnings.warn(f"Left dense, since their factors would take more parameters: {', '.join(grown)}.", stacklevel=2)
    report = SlimReport(errors, {name: chosen[name] for name in errors}, dense, (sum(sizes.values()), after))
    model.slim_report = report
    if not isinstance(model, SlimKANLinear):  # which has the method
        model.__dict__["to_dense"] = partial(to_dense, model)
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of the model in which every Slim layer is one of its original class again, and computes the same.

    Args:
        model (`nn.Module`): What `slim` made of a model, trained further or not, or any network with Slim layers.

    Raises:
        ValueError: The model has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has adapters: merge them first, `model = model.merge_and_unload()`.")
    model = _copy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (SlimKANLinear, SlimLayer)):
            model = _replace(model, name, module.to_dense())
    for attribute in ("slim_report", "to_dense"):
        model.__dict__.pop(attribute, None)
    return model


def _tensor(name: str, layer: nn.Module) -> torch.Tensor:
    """What multiplies the basis functions: (out, in, basis [+ 1]) in float64."""
    tensor, scale = read_coefficients(name, layer)
    tensor = tensor if scale is None else tensor * scale
    if not tensor.isfinite().all():
        raise ValueError(f"The coefficients of `{name}` are not finite.")
    return tensor.detach()


def _choose(
    tensors: dict[str, torch.Tensor], ranks: Ranks | Mapping[str, Ranks] | None, energy: float | None, budget: Any
) -> dict[str, tuple[int, int, int]]:
    """The ranks of each layer; a layer that a mapping does not name is left out."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if ranks is None:
        spectrum = Spectrum({name: spectrum_of(tensor) for name, tensor in tensors.items()})
        suggested = suggest_ranks(spectrum, energy=energy, budget=budget)
        return {name: suggested[pattern_key(name)] for name in tensors}
    asked = dict.fromkeys(tensors, ranks)
    if isinstance(ranks, Mapping):
        keys = {name: get_pattern_key(ranks.keys(), name) for name in tensors}
        asked = {name: ranks[key] for name, key in keys.items() if key in ranks}
        if not asked:
            raise ValueError(f"`ranks` names none of the KAN layers {list(tensors)}: {list(ranks)}.")
    chosen = {name: cap_ranks(r, shapes[name]) for name, r in asked.items()}
    warn_capped({name: (r, shapes[name], chosen[name]) for name, r in asked.items()})
    return chosen


def _cost(ranks: tuple[int, int, int], shape: torch.Size) -> int:
    ro, ri, rb = ranks
    return ro * ri * rb + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def _make(
    layer: nn.Module, spec: KANLayerSpec, core: torch.Tensor, factors: list[torch.Tensor]
) -> SlimKANLinear | SlimLayer:
    if isinstance(layer, KANLinear):
        return SlimKANLinear.from_components(layer, core, factors)
    return SlimLayer(layer, spec, core, factors)


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module under a name; the module itself if the name is that of the model."""
    if not name:
        return module
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
    return model


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of networks that keep the activations of their last pass (pykan), which deepcopy refuses."""
    memo: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    for module in model.modules():
        for value in vars(module).values():
            visit(value)
    return copy.deepcopy(model, memo)
