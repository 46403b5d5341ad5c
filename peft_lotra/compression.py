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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from .functional import call_with_parameters
from .kan.layer import KANLinear
from .kan.slim import SlimKANLinear, warn_capped
from .kan_layers import KANLayerSpec, find_kan_layers, known_families
from .ranks import LayerSpectrum, Spectrum, cheapest, pattern_key, read_coefficients, spectrum_of, suggest_ranks
from .slim_layer import SlimLayer, edge_scale
from .targets import locate_target
from .tucker import balance, cap_ranks, check_ranks, reconstruct, tucker


Ranks = int | tuple[int, int, int]

# With `inputs`: how much a direction that they do not show counts, as a share of the mean over all directions.
_RIDGE = 1e-3


@dataclass(frozen=True)
class SlimReport:
    """What `slim` did; prints as a table.

    Attributes:
        errors (`dict[str, float]`): By layer, the norm of what the factors miss of the coefficient tensor (with the
            residual weights), as a share of its norm; measured on the factors as they are stored.
        output_errors (`dict[str, float]`): With `inputs`, what they miss of the layer's outputs on what reaches
            it, as a share of the outputs' deviations from their mean; else empty.
        ranks (`dict[str, tuple[int, int, int]]`): By layer.
        dense (`list[str]`): The layers that were left as they were, since factors would take more parameters.
        parameters (`tuple[int, int]`): Of the KAN layers' coefficients, before and after.
    """

    errors: dict[str, float]
    ranks: dict[str, tuple[int, int, int]]
    dense: list[str]
    parameters: tuple[int, int]
    output_errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, [*self.errors, *self.dense]))
        lines = [f"{name:{width}}  {str(self.ranks[name]):14}  error {e:.2%}" for name, e in self.errors.items()]
        lines = [
            line + (f", of outputs {self.output_errors[name]:.2%}" if self.output_errors else "")
            for line, name in zip(lines, self.errors, strict=True)
        ]
        lines += [f"{name:{width}}  left dense: its factors would take more parameters" for name in self.dense]
        before, after = self.parameters
        return "\n".join([*lines, f"{after:,} parameters, {before:,} before ({before / after:.1f}x)"])


def slim(
    model: nn.Module,
    ranks: Ranks | Mapping[str, Ranks] | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    inputs: torch.Tensor | None = None,
) -> nn.Module:
    """Compresses a trained KAN: the coefficient tensor of each layer, with its residual weights, becomes a core and
    three factors, by higher-order orthogonal iteration (HOOI).

    A `KANLinear` becomes a `SlimKANLinear`, the layer of another family a `SlimLayer` around what is left of it. The
    result trains on like any network.

    Pass `inputs`, some of the training data, wherever there are any: what counts is then what the factors miss of each
    layer's outputs on these inputs, not of its coefficients. Trained coefficient tensors are far from low rank (99 %
    of their energy takes nearly full ranks), but the functions that they compute on data mostly are not. The factors
    of the modes in and basis are then those of the tensor weighted by the second moments of the features in each mode,
    and the core and factor_out the best ones beside them (reduced rank regression).

    Where a family multiplies the splines of each edge by a scale (efficient-kan, pykan), coefficient times scale is
    what is compressed, and the scale is 1 from then on.

    Example:

    ```py
    >>> small = slim(model, energy=0.99, inputs=x_train[:1000])
    >>> print(small.slim_report)
    >>> # ... train it ...
    >>> model = small.to_dense()
    ```

    Args:
        model (`nn.Module`): A network with KAN layers, or one layer, without adapters. It is left as it is.
        ranks (`int`, `tuple[int, int, int]` or `dict`, *optional*): (ro, ri, rb) for each layer, capped by the sizes
            of its modes with a warning; or by layer, as `suggest_ranks` returns them, others being left dense;
        energy (`float`, *optional*): or the share of the squared norm to keep in each layer, above 0 and up to 1: of
            its coefficients, or with `inputs` of its outputs;
        budget (`int`, *optional*): or the number of parameters for the coefficients of all layers together.
        inputs (`torch.Tensor`, *optional*): Samples of the model's input, a thousand or so. All basis functions of
            each layer in turn are held in memory for them.

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
    features = {}
    if inputs is not None:
        features = {name: Features(*layers[name], x) for name, x in _reaching(model, layers, inputs).items()}
    chosen = _choose(tensors, features, ranks, energy, budget)

    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    after = sum(sizes.values())
    errors, output_errors, dense = {}, {}, []
    for name, tensor in tensors.items():
        if name not in chosen or _cost(chosen[name], tensor.shape) >= sizes[name]:
            dense.append(name)
            continue
        fitted = features[name].fit(tensor, chosen[name]) if features else tucker(tensor, chosen[name])
        slim_layer = _make(*layers[name], *balance(*fitted))
        with torch.no_grad():
            stored = reconstruct(*(component.double() for component in slim_layer.components))
        errors[name] = ((tensor - stored).norm() / tensor.norm().clamp(min=1e-300)).item()
        if features:
            output_errors[name] = features[name].error(tensor, stored)
        after += sum(component.numel() for component in slim_layer.components) - sizes[name]
        model = _replace(model, name, slim_layer)
    grown = [name for name in dense if name in chosen]
    if grown:
        warnings.warn(f"Left dense, since their factors would take more parameters: {', '.join(grown)}.", stacklevel=2)
    report = SlimReport(
        errors, {name: chosen[name] for name in errors}, dense, (sum(sizes.values()), after), output_errors
    )
    model.slim_report = report
    if not isinstance(model, (SlimKANLinear, SlimLayer)):  # which have the method
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
    tensors: dict[str, torch.Tensor],
    features: dict[str, Features],
    ranks: Ranks | Mapping[str, Ranks] | None,
    energy: float | None,
    budget: int | None,
) -> dict[str, tuple[int, int, int]]:
    """The ranks of each layer; a layer that a mapping does not name is left out."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if ranks is None:
        weighted = {name: features[name].weigh(tensor) for name, tensor in tensors.items()} if features else tensors
        spectrum = Spectrum({name: spectrum_of(tensor) for name, tensor in weighted.items()})
        suggested = suggest_ranks(spectrum, energy=energy, budget=budget)
        chosen = {name: suggested[pattern_key(name)] for name in tensors}
        for name in features if energy is not None else ():
            chosen[name] = features[name].enough(tensors[name], energy, spectrum.layers[name], chosen[name])
        return chosen
    asked = dict.fromkeys(tensors, ranks)
    if isinstance(ranks, Mapping):
        keys = {name: get_pattern_key(ranks.keys(), name) for name in tensors}
        asked = {name: ranks[key] for name, key in keys.items() if key in ranks}
        if not asked:
            raise ValueError(f"`ranks` names none of the KAN layers {list(tensors)}: {list(ranks)}.")
    chosen = {name: cap_ranks(r, shapes[name]) for name, r in asked.items()}
    warn_capped({name: (r, shapes[name], chosen[name]) for name, r in asked.items()})
    return chosen


class Features:
    """What a layer's coefficients multiply, for samples of its input.

    Args:
        layer, spec: The layer and its family.
        x (`torch.Tensor`): (..., in), what reaches it.
    """

    def __init__(self, layer: nn.Module, spec: KANLayerSpec, x: torch.Tensor) -> None:
        location = spec.locate(layer)
        out, in_features, basis = location.shape
        basis += location.has_residual
        x = x.reshape(-1, in_features)
        scale = edge_scale(layer, spec)

        def run(tensor: torch.Tensor) -> torch.Tensor:
            parameters = location.split(tensor.view(out, in_features, basis))
            if scale is not None:
                parameters[scale] = torch.ones_like(getattr(layer, scale))
            y = call_with_parameters(layer, parameters, layer, (x,), {})
            return y[0] if isinstance(y, tuple) else y

        # A layer is linear in its coefficients, whatever its basis: unit tensors bring the features out, one for each
        # output at a time.
        columns = []
        zeros = location.get_parameter(layer).new_zeros(out, in_features * basis)
        constant = run(zeros)
        for start in range(0, in_features * basis, out):
            unit = zeros.clone()
            index = torch.arange(min(out, in_features * basis - start), device=unit.device)
            unit[index, start + index] = 1
            columns.append((run(unit) - constant)[:, : len(index)])
        self.values = torch.cat(columns, dim=1).double().unflatten(1, (in_features, basis))  # (samples, in, basis)
        self.roots = [_root(torch.tensordot(self.values, self.values, ([0, 3 - m], [0, 3 - m]))) for m in (1, 2)]

    def weigh(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, its modes in and basis weighted by the second moments of the features in each. Of norm 1, so
        that all layers count alike whatever the size of their outputs."""
        weighted = torch.einsum("oik,ij,kl->ojl", tensor, *self.roots)
        return weighted / weighted.norm().clamp(min=1e-300)

    def fit(self, tensor: torch.Tensor, ranks: tuple[int, int, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """core and factors, which have orthonormal columns, that come close to the layer's outputs."""
        _, (_, *factors) = tucker(self.weigh(tensor), ranks)
        factors = [
            torch.linalg.qr(torch.linalg.solve(root, factor)).Q
            for root, factor in zip(self.roots, factors, strict=True)
        ]
        z = torch.einsum("nik,ib,kc->nbc", self.values, *factors).flatten(1)
        target = self.outputs(tensor)
        # As if each of the features had been seen a little on its own: their number may exceed that of the samples.
        start = torch.einsum("oik,ib,kc->obc", tensor, *factors).flatten(1).T
        gram = z.T @ z
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram + ridge, z.T @ target + ridge @ start)  # (ri rb, out)
        factor_out = torch.linalg.svd(z @ weights, full_matrices=False).Vh[: ranks[0]].T
        core = (weights @ factor_out).T.reshape(-1, *ranks[1:])
        return core, [factor_out.contiguous(), *factors]

    def outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """(samples, out), what the layer makes of the samples with these coefficients, without its bias."""
        return self.values.flatten(1) @ tensor.flatten(1).T

    def error(self, tensor: torch.Tensor, other: torch.Tensor) -> float:
        """The norm of the difference of the outputs by two tensors, as a share of how far those by the first vary
        about their mean. A large mean carries nothing, and would make any error look small (MNIST's background)."""
        y, difference = self.outputs(tensor), self.outputs(tensor - other)
        return (difference.norm() / (y - y.mean(0)).norm().clamp(min=1e-300)).item()

    def enough(
        self, tensor: torch.Tensor, energy: float, spectrum: LayerSpectrum, ranks: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        """Ranks that keep the energy of the outputs, found from those that keep that of the weighted tensor: with a
        core of its own the fit is mostly better, and needs fewer."""
        full = tuple(spectrum.energies.shape)
        low, high = 0.0, 1.0
        best = full
        for _ in range(7):
            middle = (low + high) / 2
            ranks = cheapest(spectrum, middle)
            if 1 - self.error(tensor, reconstruct(*_flat(self.fit(tensor, ranks)))) ** 2 >= energy:
                high, best = middle, ranks
            else:
                low = middle
        return best


def _flat(decomposition: tuple[torch.Tensor, list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    core, factors = decomposition
    return core, *factors


def _root(moments: torch.Tensor) -> torch.Tensor:
    """The symmetric square root, of moments that no direction is quite without."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0) + _RIDGE * values.clamp(min=0).mean().clamp(min=1e-300)
    return vectors * values.sqrt() @ vectors.T


@torch.no_grad()
def _reaching(
    model: nn.Module, layers: dict[str, tuple[nn.Module, KANLayerSpec]], inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What reaches each layer for these inputs of the model.

    Raises:
        ValueError: Nothing reaches one of them.
    """
    reached: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: reached[name].append(args[0].detach()))
        for name, (layer, _) in layers.items()
    ]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    missed = [name for name, xs in reached.items() if not xs]
    if missed:
        raise ValueError(f"None of `inputs` reaches {missed}: the model's forward pass does not call these layers.")
    return {name: torch.cat([x.flatten(0, -2) for x in xs]) for name, xs in reached.items()}


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
