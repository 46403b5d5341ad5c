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

"""A LoTRA adapter out of two checkpoints: a base model, and what full fine-tuning made of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import nn

from ..families.registry import KANLayerSpec, find_kan_layers, same_grid
from ..functional import call_with_parameters, unwrap
from ..report import Report, TextTable
from ..tucker import Tucker, cap_ranks, tucker, tucker_scaled
from ..tuner.config import LoTRAConfig
from ..tuner.layer import LoTRALayer
from ..tuner.targets import exact_targets, locate_target, pattern_key
from .features import Features, gather_features
from .spectra import Spectrum, spectrum_of, suggest_ranks
from .updates import CoefficientUpdate, coefficient_updates


@dataclass(frozen=True)
class ExtractionReport(Report):
    """What `extract_lotra` kept; prints as a table.

    Attributes:
        errors (`dict[str, float]`): By layer, the norm of what the adapter misses of the update, as a share of the
            norm of the update; measured on the adapter as it is stored.
        ranks (`dict[str, tuple[int, int, int]]`): By layer.
        parameters (`int`): Of the adapter, `modules_to_save` not counted.
        modules_to_save (`list[str]`): Modules that are saved whole, since they changed and are no KAN layers.
        not_saved (`list[str]`): Parameters and buffers that changed, and that no adapter can hold.
    """

    errors: dict[str, float]
    ranks: dict[str, tuple[int, int, int]]
    parameters: int
    modules_to_save: list[str]
    not_saved: list[str]
    output_errors: dict[str, float] | None = None

    def _table(self) -> TextTable:
        outputs = self.output_errors
        rows = [
            [name, str(self.ranks[name]), f"error {error:.2%}"]
            + ([] if outputs is None else [f"of its outputs {outputs[name]:.2%}"])
            for name, error in self.errors.items()
        ]
        notes = [
            f"{self.parameters:,} parameters",
            *(f"saved whole: {name}" for name in self.modules_to_save),
            *(f"changed, but not saved: {name}" for name in self.not_saved),
        ]
        return TextTable(["", "", ">"] if outputs is None else ["", "", ">", ">"], rows, notes)


def extract_lotra(
    base: nn.Module,
    tuned: nn.Module,
    r: int | tuple[int, int, int] | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    rank_pattern: dict[str, int | tuple[int, int, int]] | None = None,
    inputs: torch.Tensor | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Makes the LoTRA adapter that comes closest to a full fine-tuning: to its coefficients, by higher-order
    orthogonal iteration (HOOI), or, with `inputs`, to what its layers return for data.

    Like `get_peft_model`, it adapts `base` in place and makes no copy of it: copy it before if the bare one is still
    needed. If an error is raised `base` is unchanged. Beside the models, the memory for the coefficients of all
    layers in float64 is needed once.

    Layers that did not change get no adapter. Other modules that changed go into `modules_to_save`; parameters for
    which that cannot be done (of the KAN layers besides their coefficients, of modules that contain KAN layers) are
    named in a warning.

    **Pass `inputs` where you can**: a few hundred samples of what the tuned model is for, without labels. Most of what
    fine-tuning did to the coefficients hardly shows in what a layer returns, since its inputs are correlated, and
    ranks and factors are spent on what does. On digits and MNIST, for KANs of three libraries, an adapter of a fifth
    of the parameters kept 98.7 % or more of the accuracy that fine-tuning gained; without inputs 96 to 99 %, and 71
    to 80 % for efficient-kan with its scales (`examples/low_rank_evidence.py`).

    Where a family multiplies the splines of each edge by a trainable scale (efficient-kan, pykan), the adapter, which
    changes the coefficients alone, is fitted to coefficient times scale (by L-BFGS). Where these have random signs, as
    efficient-kan's, the change of the coefficients has no low rank, and `inputs` are needed.

    Example:

    ```py
    >>> model = extract_lotra(base, tuned, budget=5000)
    >>> print(model.extraction_report)
    >>> model.save_pretrained("adapter")
    ```

    Args:
        base (`nn.Module`): The base model, without adapters.
        tuned (`nn.Module`): The fine-tuned model of the same architecture; adapters that are active count.
        r (`int` or `tuple[int, int, int]`, *optional*): The ranks of each layer,
        energy (`float`, *optional*): or the share of the energy to keep in each, above 0 and up to 1,
        budget (`int`, *optional*): or the number of parameters of the adapter, see `suggest_ranks`.
        rank_pattern (`dict`, *optional*): Ranks by layer, as in [`LoTRAConfig`]; alone, or with `r` for the others.
        inputs (`torch.Tensor`, *optional*): What the model takes; the energy is then that of the layers' outputs, and
            the memory for the basis functions of each sample in float64 is needed.
        adapter_name (`str`): The name of the adapter.

    Returns:
        `PeftModel`: The adapted base. Its attribute `extraction_report` is an [`ExtractionReport`].

    Raises:
        ValueError: Not one of `r`, `energy`, `budget` and `rank_pattern` is given, or one that cannot be; the models
            have different architectures or grids, are the same, or are not finite; `base` has adapters; `inputs`
            are empty or not finite, or do not reach a layer.
        TypeError: With `inputs`, the model returns no tensor, tuple or dict that begins with one.
    """
    if [energy, budget, r if rank_pattern is None else rank_pattern].count(None) != 2:
        raise ValueError(
            "Pass one of `r`, `energy`, `budget` and `rank_pattern` (with or without `r`), got "
            f"`r`={r}, `energy`={energy}, `budget`={budget}, `rank_pattern`={rank_pattern}."
        )
    if isinstance(base, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("`base` has adapters already: pass the bare model, or what `merge_and_unload` returns.")
    modules_to_save, not_saved = _compare(base, unwrap(tuned))
    updates = coefficient_updates(base, tuned, scaled=inputs is not None)
    updates = {name: update for name, update in updates.items() if update.tensor.any()}
    if not updates:
        raise ValueError("The KAN layers have the same coefficients in both models: there is nothing to extract.")

    if inputs is not None and not (isinstance(inputs, torch.Tensor) and inputs.numel() and inputs.isfinite().all()):
        raise ValueError(
            f"`inputs` must be a tensor of samples that are finite, as the model takes them, got {_describe(inputs)}."
        )
    features = None if inputs is None else _gather(tuned, list(updates), inputs)
    if energy is not None or budget is not None:
        seen = {
            name: features[name].weigh(update.tensor) if features else update.tensor
            for name, update in updates.items()
        }
        spectrum = Spectrum({name: spectrum_of(tensor) for name, tensor in seen.items()})
        rank_pattern = suggest_ranks(spectrum, energy=energy, budget=budget)
    ranks = _resolve_ranks(r, rank_pattern or {}, updates)
    decompositions = {
        name: _decompose(update, ranks[name], features[name] if features else None) for name, update in updates.items()
    }

    config = LoTRAConfig(
        target_modules=exact_targets(updates, base),
        rank_pattern={pattern_key(name): triple for name, triple in ranks.items()},
        modules_to_save=modules_to_save or None,
    )
    model = get_peft_model(base, config, adapter_name=adapter_name)
    errors, output_errors = {}, {}
    with torch.no_grad():
        for name, decomposition in decompositions.items():
            layer = base.get_submodule(name)
            layer.set_components(adapter_name, decomposition.balanced())
            missed = _missed(layer, adapter_name, updates[name])
            errors[name] = (missed.norm() / updates[name].tensor.norm()).item()
            if features is not None:
                change = features[name].outputs(updates[name].tensor)
                output_errors[name] = (features[name].outputs(missed).norm() / change.norm()).item()
        tensors = dict(_tensors(unwrap(tuned)))
        for name in modules_to_save:
            module = base.get_submodule(name).modules_to_save[adapter_name]
            module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    parameters = sum(base.get_submodule(name).get_components(adapter_name).numel() for name in updates)
    model.extraction_report = ExtractionReport(
        errors, ranks, parameters, modules_to_save, not_saved, None if features is None else output_errors
    )
    if not_saved:
        warnings.warn(
            f"The fine-tuning also changed {', '.join(not_saved)}, which a LoTRA adapter cannot hold: the adapted "
            "model has them as in the base model.",
            stacklevel=2,
        )
    return model


def _resolve_ranks(
    r: int | tuple[int, int, int] | None,
    rank_pattern: dict[str, int | tuple[int, int, int]],
    updates: dict[str, CoefficientUpdate],
) -> dict[str, tuple[int, int, int]]:
    """The ranks of each layer, as LoTRAModel would take them from a configuration."""
    config = LoTRAConfig(rank_pattern=rank_pattern, **({} if r is None else {"r": r}))
    ranks = {}
    for name, update in updates.items():
        key = get_pattern_key(config.rank_pattern.keys(), name)
        if key not in config.rank_pattern and r is None:
            raise ValueError(f"`rank_pattern` has no ranks for `{name}`, and `r` is not given: {list(rank_pattern)}.")
        ranks[name] = cap_ranks(config.rank_pattern.get(key, config.r), tuple(update.tensor.shape))
    return ranks


def _describe(inputs: object) -> str:
    """What was given, for a message."""
    if not isinstance(inputs, torch.Tensor):
        return f"a {type(inputs).__name__}"
    return f"shape {tuple(inputs.shape)}" + (" with NaN or infinite values" if inputs.numel() else "")


def _gather(tuned: nn.Module, names: list[str], inputs: torch.Tensor) -> dict[str, Features]:
    """What reaches the layers of the tuned model, as a copy in which no adapter stands in for one of them."""
    if isinstance(tuned, PeftModel):
        tuned = copy.deepcopy(tuned).merge_and_unload()
    layers = {name: locate_target(name, tuned.get_submodule(name))[:2] for name in names}
    return gather_features(tuned, layers, inputs)


def _decompose(update: CoefficientUpdate, ranks: tuple[int, int, int], features: Features | None) -> Tucker:
    if update.scale is None:
        return tucker(update.tensor, ranks) if features is None else features.fit(update.tensor, ranks)
    if features is None:
        return tucker_scaled(update.tensor, update.scale, ranks)
    return tucker_scaled(
        update.tensor, update.scale, ranks, measure=lambda tensor: features.outputs(tensor) @ features.metric_out
    )


def _missed(layer: LoTRALayer, adapter_name: str, update: CoefficientUpdate) -> torch.Tensor:
    """What the adapter, as stored, lacks of the update of what multiplies the basis functions."""
    delta = layer.get_delta_weight(adapter_name).to(update.tensor)
    return update.tensor - (delta if update.scale is None else update.scale * delta)


def _compare(base: nn.Module, tuned: nn.Module) -> tuple[list[str], list[str]]:
    """Finds what changed besides the coefficients.

    Returns:
        The modules that can be saved whole, and the tensors that cannot be saved.

    Raises:
        ValueError: The architectures or the grids differ, or a value is not finite.
    """
    before, after = dict(_tensors(base)), dict(_tensors(tuned))
    for name in [*before, *after]:
        shapes = [tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (before, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The models have different architectures. Their first difference is `{name}`: {shapes[0]} in the "
                f"base model, {shapes[1]} in the tuned one."
            )
    for which, tensors in (("base", before), ("tuned", after)):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"`{name}` of the {which} model is not finite: NaN or infinite values were found.")

    layers = {layer.name: locate_target(layer.name, base.get_submodule(layer.name)) for layer in find_kan_layers(base)}
    for name, (layer, spec, _) in layers.items():
        _check_same_basis(name, layer, locate_target(name, tuned.get_submodule(name))[0], spec)
    # the scales of the edges are part of the update
    explained = {
        f"{name}.{parameter}"
        for name, (_, spec, tensor) in layers.items()
        for parameter in [*tensor.parameters, (spec.edge_scale or ("",))[0]]
    }
    modules, not_saved = dict.fromkeys([]), []
    for name in before:
        if name in explained or torch.equal(before[name], after[name].to(before[name])):
            continue
        owner = name.rpartition(".")[0]
        related = any(f"{layer}.".startswith(f"{owner}.") or owner.startswith(f"{layer}.") for layer in layers)
        containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # PEFT cannot wrap these
        if owner and not related and not isinstance(base.get_submodule(owner), containers):
            modules[owner] = None
        else:
            not_saved.append(name)
    inside = tuple(f"{owner}." for owner in modules)
    return [owner for owner in modules if not owner.startswith(inside)], not_saved


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers in force, LoTRA's updates apart, under the names that the bare model has for them."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, LoTRALayer):
        module = module.base_layer
    if isinstance(module, BaseTunerLayer):
        raise ValueError(
            f"`{prefix[:-1]}` of the tuned model has an adapter of another method ({type(module).__module__}): merge "
            "it first (`merge_and_unload`)."
        )
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}{name}.")


def _check_same_basis(name: str, layer: nn.Module, other: nn.Module, spec: KANLayerSpec) -> None:
    """Raises a ValueError if the coefficients of the two layers do not multiply the same functions."""
    grids, others = spec.read_grid(layer), spec.read_grid(other)
    differ = [state for state in grids if not same_grid({state: grids[state]}, {state: others.get(state)})]
    if not differ and spec.basis is not None:
        _, in_features, _ = spec.locate(layer).shape
        x = torch.linspace(-1, 1, 9).to(next(layer.parameters()))[:, None].expand(-1, in_features)
        # with the same parameters: those that a basis has (FastKAN's normalisation) are reported as what else changed
        same = {parameter: value.detach() for parameter, value in layer.named_parameters()}
        first, second = spec.basis(layer, x), call_with_parameters(other, same, partial(spec.basis, other), (x,), {})
        if first.shape != second.shape or not torch.equal(first, second):
            differ = ["basis"]
    if differ:
        raise ValueError(
            f"The {differ[0]} of `{name}` differs between the models: their coefficients multiply different "
            "functions, and the difference of the coefficients means nothing. Fine-tune without moving the grids "
            "(no `update_grid`), or move those of the base model first, and fine-tune from there."
        )
