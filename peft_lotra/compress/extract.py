# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A LoTRA adapter from two checkpoints: a base model and its full fine-tuning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..layers.kinds import same_grid
from ..layers.search import walk_kan_layers
from ..modules.calls import check_loaded, check_module, read_at_rest, unwrap
from ..modules.checks import check_number, list_first
from ..modules.report import Report, TextTable
from ..tucker import Ranks, Tucker, relative_energy, tucker, tucker_scaled
from ..tuner.config import LoTRAConfig, pattern_key
from ..tuner.layer import lotra_layers
from ..tuner.targets import exact_targets, locate_target
from .data_weights import DataWeights, Inputs, gather_weights
from .spectra import choose_ranks, ranks_by_layer, weighted_spectra
from .updates import CoefficientUpdate, LayerRanks, check_without_adapters, coefficient_updates


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # which PEFT cannot wrap


@dataclass(eq=False)
class ExtractionReport(Report):
    """Ranks and errors of an extraction; prints as a table.

    Attributes:
        errors: By layer, ||update - stored adapter|| / ||update||.
        ranks: By layer, (ro, ri, rb).
        parameters: The number of parameters of the adapter, without `modules_to_save`.
        modules_to_save: The modules that changed and are no KAN layers.
        not_saved: The parameters and buffers that changed and that no adapter can hold.
        output_errors: With `inputs`, by layer, ||change of the outputs - change by the adapter|| / ||change||; layers
            for which `inputs` do not count have none.
    """

    errors: dict[str, float]
    ranks: LayerRanks
    parameters: int
    modules_to_save: list[str]
    not_saved: list[str]
    output_errors: dict[str, float] = field(default_factory=dict)

    def _table(self) -> TextTable:
        notes = [f"the adapter has {self.parameters:,} parameters; without it the errors would be 100%"]
        notes += [f"copied as it is: {name}" for name in self.modules_to_save]
        notes += [f"not in the adapter, although it changed: {name}" for name in self.not_saved]
        rows = []
        for name, error in self.errors.items():
            output_error = f"{self.output_errors[name]:.2%}" if name in self.output_errors else "-"
            rows.append([name, str(self.ranks[name]), f"{error:.2%}", output_error])
        columns = ["layer", "ranks", ">error of the coefficients", ">error of the outputs"]
        return TextTable(columns, rows, notes)


def extract_lotra(
    base: nn.Module,
    tuned: nn.Module,
    r: Ranks | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    rank_pattern: dict[str, Ranks] | None = None,
    inputs: Inputs | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Make the LoTRA adapter that comes closest to a full fine-tuning.

    Closest means in the coefficients, by HOOI, or with `inputs` in the outputs of the layers. Pass `inputs` where you
    can, a few hundred samples without labels: most of the change of the coefficients hardly shows in the outputs,
    since the inputs of a layer are correlated.

    Like `get_peft_model`, the function adapts `base` in place. After an error `base` is unchanged. Layers that did not
    change get no adapter. Other modules that changed go into `modules_to_save`. A warning names parameters that no
    adapter can hold: of KAN layers besides their coefficients, of modules that contain KAN layers.

    Where a library multiplies the splines of each edge by a trainable scale (efficient-kan, pykan), the adapter is
    fitted to coefficient times scale (by L-BFGS). Scales of random signs, as those of efficient-kan, need `inputs`.

    Args:
        base: The base model, without adapters.
        tuned: The fine-tuned model of the same architecture; adapters that are active count.
        r: The ranks of each layer,
        energy: Or the share of the energy to keep in each, above 0 and up to 1,
        budget: Or the number of parameters of the adapter, spent greedily by the energy that each brings.
        rank_pattern: Ranks by layer, as in [`LoTRAConfig`]; alone, or with `r` for the others.
        inputs: Samples of the model's input: a tensor, a tuple of arguments, a dict of named ones, or a function of
            the model that runs it and returns its output. The basis functions of all layers at these samples are kept
            in memory in float64. The energy is then that of the layers' outputs. It stays that of the coefficients in
            convolutions, and in layers whose output is not linear in their coefficients, or whose outputs do not share
            the basis functions (by a gate for each output, or by masks of edges).
        adapter_name: The name of the adapter.

    Returns:
        The adapted base. Its attribute `extraction_report` is an [`ExtractionReport`].

    Raises:
        ValueError: Not one of `r`, `energy`, `budget` and `rank_pattern` is given, or one that cannot be; the models
            have different architectures or grids, the same coefficients, or coefficients that are not finite; `base`
            has adapters; `inputs` are not finite, or do not reach a layer.
        TypeError: A model is no module; or, with `inputs`, it returns no tensor, nor a tuple or dict with one.

    Example:
        >>> import copy
        >>> from peft_lotra.kan import KAN
        >>> base = KAN([3, 5, 4])
        >>> tuned = copy.deepcopy(base)
        >>> tuned.layers[0].spline_weight.data[2] += 0.1  # one of five outputs
        >>> model = extract_lotra(base, tuned, energy=0.99)
        >>> model.extraction_report.ranks  # the full basis needs no factor
        {'layers.0': (1, 1, 9)}
    """
    options = {"r": r if rank_pattern is None else rank_pattern, "energy": energy, "budget": budget}
    if list(options.values()).count(None) != 2:
        raise ValueError(f"Pass one of {', '.join(options)}; got {options}.")
    if energy is not None:
        check_number(energy, "energy", "(0, 1]")
    check_module(base, "base")
    check_without_adapters(base, "base")
    base = unwrap(base)
    tuned = getattr(tuned, "_orig_mod", tuned)  # torch.compile
    if isinstance(tuned, PeftModel):
        tuned = copy.deepcopy(tuned).merge_and_unload()
    else:
        tuned = unwrap(tuned)
    check_loaded(base, "base")
    check_loaded(tuned, "tuned")
    modules_to_save, not_saved = _find_other_changes(base, tuned)

    updates = coefficient_updates(base, tuned, scaled=inputs is not None)
    updates = {name: update for name, update in updates.items() if update.tensor.any()}
    if not updates:
        raise ValueError("The KAN layers have the same coefficients in both models: there is nothing to extract.")

    tensors = {name: update.tensor for name, update in updates.items()}
    weights = {} if inputs is None else gather_weights(tuned, tensors, inputs)
    if energy is None and budget is None:
        ranks = ranks_by_layer(tensors, rank_pattern or {}, r)
        missing = tensors.keys() - ranks.keys()
        if missing:
            raise ValueError(f"`rank_pattern` has no ranks for {sorted(missing)}, and `r` is not given.")
    else:
        ranks = choose_ranks(weighted_spectra(tensors, weights), energy, budget)
    components = decompose_updates(updates, weights, ranks)

    config = LoTRAConfig(
        target_modules=exact_targets(components, base),
        rank_pattern={pattern_key(name): tensor.form for name, tensor in components.items()},
        modules_to_save=modules_to_save or None,
    )
    model: Any = get_peft_model(base, config, adapter_name)
    for name in modules_to_save:
        wrapper: Any = base.get_submodule(name)
        state = tuned.get_submodule(name).state_dict()
        wrapper.modules_to_save[adapter_name].load_state_dict(state)
    parameters = sum(tensor.numel() for tensor in components.values())
    ranks = {name: tensor.ranks for name, tensor in components.items()}

    report = ExtractionReport({}, ranks, parameters, modules_to_save, not_saved)
    with torch.no_grad():
        for name, layer in lotra_layers(base):
            layer.set_components(adapter_name, components[name])
            update, scale = updates[name]
            stored = layer.get_delta_weight(adapter_name).to(update)
            if scale is not None:
                stored = scale * stored
            error = update - stored
            report.errors[name] = relative_energy(error, update).sqrt().item()
            if name in weights:
                outputs = weights[name].outputs
                energy_of_error = relative_energy(outputs(error), outputs(update))
                report.output_errors[name] = energy_of_error.sqrt().item()
    model.__dict__["extraction_report"] = report

    if not_saved:
        warnings.warn(
            f"The fine-tuning also changed {', '.join(not_saved)}, which a LoTRA adapter cannot hold: the adapted "
            "model has them as in the base model.",
            stacklevel=2,
        )
    return model


def decompose_updates(
    updates: Mapping[str, CoefficientUpdate],
    weights: Mapping[str, DataWeights],
    ranks: LayerRanks,
) -> dict[str, Tucker]:
    """Compute the components of each layer that come closest to its update; with weights, in its outputs."""
    components = {}
    for name, (tensor, scale) in updates.items():
        data_weights = weights.get(name)
        if scale is not None:
            measure = None if data_weights is None else data_weights.measure
            fitted = tucker_scaled(tensor, scale, ranks[name], measure)
        elif data_weights is not None:
            fitted = data_weights.fit(tensor, ranks[name])
        else:
            fitted = tucker(tensor, ranks[name])
        components[name] = fitted.balanced()
    return components


def _find_other_changes(
    base: nn.Module,
    tuned: nn.Module,
) -> tuple[list[str], list[str]]:
    """Return the modules that changed and can be copied, and the tensors that changed and that no adapter can hold.

    Raises:
        ValueError: The models have different architectures or grids.
    """
    base_state = base.state_dict()
    tuned_state = tuned.state_dict()
    different = base_state.keys() ^ tuned_state.keys()
    changed = {}
    for name, value in base_state.items():
        tuned_value = tuned_state.get(name, value)
        if value.shape != tuned_value.shape:
            different.add(name)
        elif not torch.equal(value, tuned_value.to(value)):
            changed[name] = tuned_value
    if different:
        raise ValueError(f"The models have different architectures. They differ in {list_first(sorted(different))}.")
    with read_at_rest(base):
        kan_layers = {layer for _, layer, _ in walk_kan_layers(base)}
    # a layer that a model calls twice has two names
    layers = [name for name, module in base.named_modules(remove_duplicate=False) if module in kan_layers]
    for name in layers:
        layer, spec, tensor = locate_target(name, base.get_submodule(name))
        tuned_grid = spec.read_grid(tuned.get_submodule(name))
        if not same_grid(spec.read_grid(layer), tuned_grid):
            raise ValueError(
                f"The grid of `{name}` differs between the models, so that their coefficients multiply different "
                "functions. Fine-tune without moving the grids (no `update_grid`), or move those of the base model "
                "first, and fine-tune from there."
            )
        # the scales of the edges are part of the update
        scales = (spec.edge_scale or ())[:1]
        for parameter in (*tensor.parameters, *scales):
            changed.pop(f"{name}.{parameter}".lstrip("."), None)

    # PEFT copies all modules whose names end with a name: not those that contain a KAN layer, or are inside of one
    related = []
    for name, _ in base.named_modules(remove_duplicate=False):
        if any(f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}.") for layer in layers):
            related.append(name)
    modules = []
    not_saved = []
    for name in changed:
        owner = name.rpartition(".")[0]
        # every name ends with "", the name of the model
        is_related = any(module.endswith(owner) for module in related)
        if is_related or isinstance(base.get_submodule(owner), _CONTAINERS):
            not_saved.append(name)
        elif owner not in modules:
            modules.append(owner)
    inside = tuple(f"{name}." for name in modules)
    return [name for name in modules if not name.startswith(inside)], not_saved
