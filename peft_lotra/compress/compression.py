# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Slim KANs out of trained ones: `slim` brings the coefficient tensors of any KAN into Tucker form."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from ..kan.layer import KANLinear
from ..kan.slim_kan import SlimKANLinear, warn_capped
from ..layers.registry import find_kan_layers, known_kinds
from ..layers.slim import SlimLayer
from ..modules.calls import check_module, share_hooks
from ..report import Report, TextTable
from ..tucker import Ranks, cap_ranks, check_ranks, tucker
from ..tuner.config import pattern_key
from ..tuner.targets import locate_target
from .features import gather_features, relative_error
from .inputs import Inputs, check_inputs, model_outputs
from .reach import check_copy, check_exchange, outputs_by
from .spectra import Spectrum, check_energy, suggest_ranks, weighted_spectrum
from .updates import read_coefficients


_BISECTIONS = 8  # for the smallest budget up to 2 %, if the dense tensors are up to 300 times ranks 1


@dataclass(eq=False)
class SlimReport(Report):
    """The result of `slim`; prints as a table. Errors are of the factors as stored.

    Attributes:
        errors: By layer, ||coefficients - factors|| / ||coefficients||, with the residual weights.
        ranks: By layer, (ro, ri, rb).
        dense: The layers that stay dense, since factors would take more parameters.
        parameters: The number of coefficients of the KAN layers, before and after.
        output_errors: With `inputs`, by layer, the error of the outputs as a share of the deviations from their mean.
        model_error: With `inputs`, the same of the whole model, its square at most 1 - `energy`.
    """

    errors: dict[str, float]
    ranks: dict[str, tuple[int, ...]]
    dense: list[str]
    parameters: tuple[int, int]
    output_errors: dict[str, float] = field(default_factory=dict)
    model_error: float | None = None

    def _table(self) -> TextTable:
        rows = [
            [name, str(self.ranks[name]), f"error {error:.2%}"]
            + ([f"of outputs {self.output_errors[name]:.2%}"] if self.output_errors else [])
            for name, error in self.errors.items()
        ]
        notes = [f"{name}  left dense: its factors would take more parameters" for name in self.dense]
        if self.model_error is not None:
            notes.append(f"error of the model's outputs {self.model_error:.2%}")
        before, after = self.parameters
        notes.append(f"{after:,} parameters, {before:,} before ({before / after:.1f}x)")
        return TextTable(["", "", ">", ">"] if self.output_errors else ["", "", ">"], rows, notes)


def slim(
    model: nn.Module,
    ranks: Ranks | Mapping[str, Ranks] | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    inputs: Inputs | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Compresses a trained KAN: the coefficient tensor of each layer becomes a core and three factors.

    The factors come from higher-order orthogonal iteration (HOOI); residual weights are a part of the tensor. A
    `KANLinear` becomes a `SlimKANLinear`, the layer of another family a `SlimLayer` around the rest of the layer.

    Pass `inputs`, some of the training data, wherever you can. The error that counts is then that of the model's
    outputs on these inputs: trained coefficient tensors are far from low rank, but the functions that they compute on
    data mostly are not. The coefficients are then weighted by the second moments of the features, and by J^T J of the
    outputs as in the Gauss-Newton matrix.

    Where a family multiplies the splines of each edge by a scale (efficient-kan, pykan), coefficient times scale is
    compressed, and the scale is 1 from then on.

    Args:
        model: A network with KAN layers, or one layer, without adapters; it stays unchanged if not `inplace`.
        ranks: (ro, ri, rb) for each layer, capped by the sizes of its modes with a warning; or by layer, as
            `suggest_ranks` returns them, others being left dense;
        energy: Or the share of the squared norm to keep, above 0 and up to 1: of each layer's coefficients, or with
            `inputs` of the deviations of the model's outputs from their mean;
        budget: Or the number of parameters for the coefficients of all layers together.
        inputs: Samples of the model's input, a thousand or so: a tensor, a tuple of arguments, a dict of named ones,
            or a function of the model that runs it and returns its output. All basis functions of each layer are held
            in memory for them, in float64.
        inplace: Whether the layers of the model itself are exchanged. A model that calls its layers through a closure
            cannot be copied. After an error the model is as it was.

    Returns:
        The model, or a copy of it, of the same class, with Slim layers, a [`SlimReport`] as `slim_report`, and
        `to_dense()`, which returns a copy of the original class. A layer whose factors would take more parameters
        than the tensor is left dense; the report and a warning name the layer.

    Raises:
        ValueError: Not one of `ranks`, `energy` and `budget` is given, or one that cannot be; the model has adapters
            (merge them first), no KAN layer, coefficients that are not finite, layers that no input reaches, or that
            a closure calls in the place of those exchanged; or `inputs` are empty, not finite or all the same.
        TypeError: `model` is no module; or, with `inputs`, it returns no tensor, nor a tuple or dict that begins with
            one.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> small = slim(KAN([20, 16]), (4, 4, 3), inputs=torch.rand(100, 20))
        >>> small.slim_report.parameters
        (2880, 219)
        >>> dense = small.to_dense()
    """
    check_module(model)
    if [ranks, energy, budget].count(None) != 2:
        raise ValueError(
            f"Pass one of `ranks`, `energy` and `budget`, got `ranks`={ranks}, `energy`={energy}, `budget`={budget}."
        )
    if energy is not None:
        check_energy(energy)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"The model is in a {type(model).__name__}: pass the network inside, `model.module`.")
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted or isinstance(model, PeftModel):
        raise ValueError(
            f"The model has adapters ({', '.join(adapted[:3]) or type(model).__name__}): merge them first, "
            "`model = model.merge_and_unload()`."
        )
    if inputs is not None:
        check_inputs(inputs)
    compression = _Compression(model, inputs, inplace)
    if ranks is not None:
        chosen = _resolve_ranks(compression.tensors, ranks)
    elif energy is not None and inputs is not None:
        chosen = compression.enough(energy)
    else:
        chosen = compression.suggest(energy, budget)
    small, report = compression.run(chosen, final=True)
    if grown := [name for name in report.dense if name in chosen]:
        hint = " Pass `inputs`: on data there is mostly less to keep." if inputs is None and energy is not None else ""
        warnings.warn(
            f"Left dense, since their factors would take more parameters: {', '.join(grown)}.{hint}", stacklevel=2
        )
    small.__dict__["slim_report"] = report
    if not isinstance(small, (SlimKANLinear, SlimLayer)):  # which have the method
        small.__dict__["to_dense"] = partial(to_dense, small)
    return small


@torch.inference_mode(False)  # parameters made in that mode could not be trained
def to_dense(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replaces every Slim layer by a dense one of its original class that computes the same, up to rounding.

    Args:
        model: A model with Slim layers, without adapters.
        inplace: Whether to exchange the layers of the model itself, and not of a copy.

    Returns:
        The model with dense layers.

    Raises:
        ValueError: The model has adapters, or a copy would call layers of the original through a closure.

    Example:
        >>> from peft_lotra.kan import SlimKAN
        >>> type(to_dense(SlimKAN([8, 4], ranks=2)).layers[0]).__name__
        'KANLinear'
    """
    check_module(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model has adapters: merge them first, `model = model.merge_and_unload()`.")
    model = model if inplace else _copy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (SlimKANLinear, SlimLayer)):
            model = _replace(model, name, module.to_dense())
    for attribute in ("slim_report", "to_dense"):
        model.__dict__.pop(attribute, None)
    return model


def _resolve_ranks(
    tensors: Mapping[str, torch.Tensor], ranks: Ranks | Mapping[str, Ranks]
) -> dict[str, tuple[int, ...]]:
    """The ranks of each layer; a layer that a mapping does not name is left out."""
    if isinstance(ranks, Mapping):
        keys = {name: get_pattern_key(list(ranks), name) for name in tensors}
        asked = {name: ranks[key] for name, key in keys.items() if key in ranks}
        if not asked:
            raise ValueError(f"`ranks` names none of the KAN layers {list(tensors)}: {list(ranks)}.")
    else:
        asked = dict.fromkeys(tensors, ranks)
    asked = {name: check_ranks(r, "ranks", kernel=False) for name, r in asked.items()}
    chosen = {name: cap_ranks(r, tensors[name].shape) for name, r in asked.items()}
    warn_capped({name: (r, tuple(tensors[name].shape), chosen[name]) for name, r in asked.items()})
    return chosen


class _Compression:
    """A model, its coefficient tensors (out, in, basis [+ 1]) by layer, and with `inputs` the features of each."""

    def __init__(self, model: nn.Module, inputs: Inputs | None, inplace: bool) -> None:
        self.model, self.inputs, self.inplace = model if inplace else _copy(model), inputs, inplace
        layers = {}
        for found in find_kan_layers(self.model):
            layer = self.model.get_submodule(found.name)
            if not isinstance(layer, (SlimKANLinear, SlimLayer)):
                layers[found.name] = locate_target(found.name, layer)[:2]
        if convolutions := [name for name, (layer, spec) in layers.items() if len(spec.locate(layer).shape) > 3]:
            raise ValueError(
                f"`slim` does not compress convolutions, and `{convolutions[0]}` is a convolution. Compress the part "
                "of the model without them."
            )
        if not layers:
            raise ValueError(
                "No KAN layer that could be compressed was found in the model. The known families are "
                f"{', '.join(known_kinds())}; describe another one with `peft_lotra.register_kan_layer`."
            )
        # those that nothing may call any more; in place, the layers themselves
        self.originals = {name: model.get_submodule(name) for name in layers}
        if inplace:
            check_exchange(model, self.originals)
            if "" in layers:
                raise ValueError("The model is itself a KAN layer, which cannot be exchanged in place.")
        self.tensors = {name: _read_product(name, layer) for name, (layer, _) in layers.items()}
        self.features = {} if inputs is None else gather_features(self.model, layers, inputs)
        if inputs is not None:
            with torch.no_grad():
                self.outputs = model_outputs(self.model, inputs)

    @cached_property
    def spectrum(self) -> Spectrum:
        return weighted_spectrum(self.tensors, self.features)

    def suggest(self, energy: float | None = None, budget: int | None = None) -> dict[str, tuple[int, ...]]:
        """The ranks for an energy or a budget by the spectrum."""
        suggested = suggest_ranks(self.spectrum, energy=energy, budget=budget)
        return {name: suggested[pattern_key(name)] for name in self.tensors}

    def enough(self, energy: float) -> dict[str, tuple[int, ...]]:
        """The ranks for the smallest budget that keeps this share of the model's outputs, found by bisection."""
        best = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}  # which leaves all layers dense
        low = sum(1 + sum(tensor.shape) for tensor in self.tensors.values())
        high = sum(tensor.numel() for tensor in self.tensors.values())
        for _ in range(_BISECTIONS if low < high else 0):  # of the smallest layers no ranks save anything
            middle = round(math.sqrt(low * high))
            chosen = self.suggest(budget=middle)
            _, report = self.run(chosen)
            if 1 - min(report.model_error or 0.0, 2.0) ** 2 >= energy:  # the square of any error may overflow
                high, best = middle, chosen
            else:
                low = middle
        return best

    def run(self, chosen: Mapping[str, tuple[int, ...]], final: bool = False) -> tuple[nn.Module, SlimReport]:
        """The model, or a copy, in which these layers are Slim, where that saves parameters, and its report.

        In place, the layers are put back after an error, and if this is not the `final` run.
        """
        if not self.inplace:
            return self._exchange(_copy(self.model), chosen)
        places = [(module._modules, dict(module._modules)) for module in self.model.modules()]
        is_done = False
        try:
            result = self._exchange(self.model, chosen)
            is_done = final
            return result
        finally:
            for modules, own in () if is_done else places:
                modules.clear()
                modules.update(own)

    def _exchange(self, model: nn.Module, chosen: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, SlimReport]:
        before = after = sum(tensor.numel() for tensor in self.tensors.values())
        errors, output_errors, dense = {}, {}, []
        exchanged: dict[str, nn.Module] = {}
        for name, tensor in self.tensors.items():
            if name not in chosen or _cost(chosen[name], tensor.shape) >= tensor.numel():
                dense.append(name)
                continue
            features = self.features.get(name)
            fitted = tucker(tensor, chosen[name]) if features is None else features.fit(tensor, chosen[name])
            layer, spec, _ = locate_target(name, model.get_submodule(name))
            if isinstance(layer, KANLinear):
                slim_layer = SlimKANLinear.from_components(layer, fitted.balanced())
            else:  # which takes the parameters out of a layer, here of one that shares them with the original
                layer = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
                slim_layer = SlimLayer(layer, spec, fitted.balanced())
            exchanged[name] = slim_layer
            with torch.no_grad():
                stored = slim_layer.components.map(torch.Tensor.double).dense()
            errors[name] = ((tensor - stored).norm() / tensor.norm().clamp(min=1e-300)).item()
            if features is not None:
                output_errors[name] = relative_error(features.outputs(tensor), features.outputs(stored))
            after += slim_layer.components.numel() - tensor.numel()
            model = _replace(model, name, slim_layer)
        ranks, model_error = {name: chosen[name] for name in errors}, None
        if self.inputs is not None:
            with torch.no_grad():
                y = outputs_by(model, self.inputs, exchanged, self.originals)
                model_error = relative_error(self.outputs, y)
        return model, SlimReport(errors, ranks, dense, (before, after), output_errors, model_error)


def _read_product(name: str, layer: nn.Module) -> torch.Tensor:
    """Coefficient times scale of the edge: (out, in, basis [+ 1]) in float64."""
    tensor, scale = read_coefficients(name, layer)
    tensor = tensor if scale is None else tensor * scale
    if tensor.is_meta:
        raise ValueError(f"`{name}` is on the meta device, and has no coefficients to compress: load them first.")
    if not tensor.isfinite().all():
        raise ValueError(f"The coefficients of `{name}` are not finite.")
    return tensor.detach()


def _cost(ranks: tuple[int, ...], shape: torch.Size) -> int:
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module, which gets the hooks, in all places of the one under a name.

    The module itself if the name is that of the model.
    """
    old = model.get_submodule(name)
    if getattr(module, "layer", None) is not old:  # a `SlimLayer` calls the old layer, with the hooks
        share_hooks(old, module)
    if not name:
        return module
    for owner in list(model.modules()):
        for attribute, part in owner._modules.items():
            if part is old:
                owner._modules[attribute] = module
    return model


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of networks that keep the activations of their last pass (pykan), which deepcopy refuses."""
    check_copy(model)
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
