# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Exchanging the weights of a loaded adapter, in place, so that a compiled model is not compiled again."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import PeftType, load_peft_weights
from torch import nn

from ..files.checkpoint import own_tensors, refuse
from ..files.format import differ
from ..modules.calls import unwrap
from ..modules.checks import check_name, check_path
from .config import LoTRAConfig
from .injection import check_names
from .layer import lotra_layers
from .norm_stats import NormStatsTuner, pop_stats
from .targets import check_base, locate_target
from .transaction import change_lock, is_switched, transaction


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike, adapter_name: str = "default", **kwargs: Any
) -> None:
    """Replaces the weights of a loaded adapter by those of another one of the same layers and ranks.

    The tensors are overwritten in place, so that a model that `torch.compile` compiled is not compiled again. (PEFT's
    own `hotswap_adapter` takes LoRA only.) If the new adapter has another alpha, its core is multiplied by the ratio.
    The scale that `set_scale` set and the dropouts are kept.

    Args:
        model ([`PeftModel`]): The model with the loaded adapter, compiled or not.
        model_name_or_path (`str`): The new adapter: a folder, or a repository on the Hub.
        adapter_name (`str`): The name of the adapter to replace; it keeps its name.
        kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `check_base`, as for `PeftModel.from_pretrained`.

    Raises:
        ValueError: The new adapter is not a LoTRA adapter; there is no adapter of the name; it is merged; or the new
            one has other layers, families, shapes, ranks, grids or saved modules. Nothing is changed then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, hotswap_adapter
        >>> from peft_lotra.kan import KAN
        >>> model, other = (get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2, init_weights=False)) for _ in range(2))
        >>> with TemporaryDirectory() as folder:
        ...     other.save_pretrained(folder)
        ...     hotswap_adapter(model, folder)
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` is a {type(model).__name__}, but must be a PeftModel with a LoTRA adapter.")
    check_path(model_name_or_path, "model_name_or_path")
    check_name(adapter_name)
    old = model.peft_config.get(adapter_name)
    if old is None:
        raise ValueError(f"There is no adapter {adapter_name!r} to replace, the model has {list(model.peft_config)}.")
    if not isinstance(old, LoTRAConfig):
        kind = PeftType(old.peft_type).value
        raise ValueError(f"The adapter {adapter_name!r} is of the type {kind}, and not LOTRA.")
    new = LoTRAConfig.from_pretrained(str(model_name_or_path), **kwargs)  # which checks the tensors too
    layers = dict(lotra_layers(unwrap(model)))
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"The adapter {adapter_name!r} is merged, so that replacing it would change nothing until it is unmerged, "
            "and unmerging would subtract the wrong update. Call `model.unmerge_adapter()` first."
        )

    # detached, but the model's own memory
    current = own_tensors(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    kwargs.pop("check_base", None)
    tensors = own_tensors(load_peft_weights(str(model_name_or_path), device="cpu", **kwargs))
    tuner = cast(NormStatsTuner, model.base_model)
    _, stats = pop_stats(current), pop_stats(tensors)
    wrong = _differences(old, new, current, tensors) + tuner.norm_stats_problems(stats)
    headline = f"The adapter in {str(model_name_or_path)!r} cannot take the place of {adapter_name!r}, "
    remedy = "Load it beside the other one: `model.load_adapter(path, adapter_name=...)`."
    refuse(f"{headline}and nothing was changed:", wrong, remedy)
    bare = unwrap(model)
    check_base(new, bare, {name: locate_target(name, layer) for name, layer in lotra_layers(bare, adapter_name)})
    for name, layer in layers.items():
        key = f"base_model.model.{name}.lotra_core"
        if key in tensors:
            # in the dtype of the adapter here: that of the file may be coarser
            tensors[key] = tensors[key].to(current[key].dtype) * (
                new.ranks_and_alpha(name)[1] / layer.lotra_alpha[adapter_name]
            )
    with change_lock(model.base_model).held, transaction(model, current.values(), changes=is_switched):
        for key, tensor in tensors.items():
            current[key].copy_(tensor)
        tuner.set_norm_stats(adapter_name, stats)


def check_reload(
    model: nn.Module, old: LoTRAConfig, adapter_name: str, path: str | os.PathLike, **kwargs: Any
) -> None:
    """Checks the files that are to be loaded into an adapter which is there, of which PEFT reads the tensors alone.

    Raises:
        ValueError: The files cannot be loaded; or the adapter there, whose config is `old`, has other tensors, another
            alpha, base or grid, or is merged.
    """
    new = LoTRAConfig.from_pretrained(str(path), **kwargs)
    layers = dict(lotra_layers(model, adapter_name))
    wrong = [
        f"{name}: its alpha is {alpha}, that of the loaded adapter {layer.lotra_alpha[adapter_name]}"
        for name, layer in layers.items()
        if (alpha := new.ranks_and_alpha(name)[1]) != layer.lotra_alpha[adapter_name]
    ]
    wrong += [
        f"{name}: the loaded adapter is merged" for name, it in layers.items() if adapter_name in it.merged_adapters
    ]
    refuse(
        f"The adapter in {str(path)!r} cannot be loaded into {adapter_name!r}, and nothing was changed:",
        wrong,
        "Unmerge it first, load the file under another name, or call `hotswap_adapter`, which makes up for the alpha.",
    )
    targets = {name: locate_target(name, layer) for name, layer in layers.items()}
    check_base(new, model, targets)
    check_names(new.checkpoint, old, model, targets)


def _differences(
    old: LoTRAConfig, new: LoTRAConfig, current: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> list[str]:
    """Why the tensors cannot take the places of the current ones."""
    wrong = [f"{key} is in the loaded adapter only" for key in current.keys() - tensors.keys()]
    wrong += [f"{key} is in the new adapter only" for key in tensors.keys() - current.keys()]
    wrong += [
        f"{key}: {problem}"
        for key, tensor in tensors.items()
        if key in current and (problem := differ(tensor, current[key], "the new adapter", "the loaded one"))
    ]
    families = {name: layer["family"] for name, layer in (old.base_layers or {}).items()}
    wrong += [
        f"{name}: a {layer['family']} layer in the new adapter, a {families[name]} layer in the loaded one"
        for name, layer in (new.base_layers or {}).items()
        if families.get(name, layer["family"]) != layer["family"]
    ]
    if any(alpha == 0 for alpha in (old.alpha, *old.alpha_pattern.values())):
        wrong.append("the loaded adapter has the alpha 0, which no core can make up for")
    return sorted(wrong)
