# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Exchange the weights of a loaded adapter while the model serves."""

from __future__ import annotations

import os
from operator import le
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..modules.calls import PREFIX, unwrap
from ..modules.checks import check_count
from ..tucker import cap_ranks, form_text, read_components
from .config import LoTRAConfig
from .layer import lotra_layers
from .model import LoTRAModel, read_checked
from .targets import find_targets
from .weighted import check_known


@torch.inference_mode(False)  # else parameters could not be trained, and compiled code would be compiled again
@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str = "default",
    target_rank: int | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights of a loaded adapter with the weights of another one for the same layers.

    All tensors are read and checked first, and exchanged at once: a forward pass in another thread gives the answer of
    the old adapter or of the new one, and a save writes one of them. A compiled model is not compiled again if the
    ranks stay the same. (PEFT's own `hotswap_adapter` only supports LoRA.) A scale set by `set_scale` is kept. If the
    new adapter has a different alpha, its core is multiplied by the ratio. The components are new parameters: create
    optimizers afterwards.

    Args:
        model ([`PeftModel`]): The model with the loaded adapter, compiled or not.
        model_name_or_path (`str`): The new adapter: a folder, or a repository on the Hub.
        adapter_name (`str`): The name of the adapter to replace; it keeps its name.
        target_rank (`int`, *optional*): The rank of all modes up to which components are filled with zeros, so that
            adapters of lower ranks fit too.
        kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `check_base`, as for `PeftModel.from_pretrained`.

    Raises:
        ValueError: The new adapter is not a LoTRA adapter; there is no adapter of this name; it is merged; or the new
            one has other layers, shapes, ranks, grids or saved modules. Nothing is changed then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, hotswap_adapter
        >>> from peft_lotra.kan import KAN
        >>> config = LoTRAConfig(r=2, init_weights=False)
        >>> model, other = (get_peft_model(KAN([2, 4, 1]), config) for _ in range(2))
        >>> with TemporaryDirectory() as folder:
        ...     other.save_pretrained(folder)
        ...     hotswap_adapter(model, folder)
    """
    model = model if isinstance(model, PeftModel) else getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, LoTRAModel):
        raise ValueError(f"`model` is a {type(model).__name__}, but must be a PeftModel with a LoTRA adapter.")
    tuner = model.base_model
    check_known([adapter_name], tuner.peft_config)
    if target_rank is not None:
        target_rank = check_count(target_rank, "target_rank")

    old = tuner.peft_config[adapter_name]
    new = LoTRAConfig.from_pretrained(model_name_or_path, **kwargs)

    base = unwrap(model)
    layers = dict(lotra_layers(base, adapter_name))
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged: call `model.unmerge_adapter()` first.")

    targets = find_targets(new, base) if new.base_layers else {}
    are_modules_equal = set(new.modules_to_save or ()) == set(old.modules_to_save or ())
    if targets.keys() != layers.keys() or not are_modules_equal:
        raise ValueError(
            f"The new adapter has the layers {list(targets)} and saves {new.modules_to_save}, the present one "
            f"{list(layers)} and {old.modules_to_save}. Load it as another adapter: `model.load_adapter(...)`."
        )

    tensors = read_checked(new, base, targets)
    replacements = {}
    for name, layer in layers.items():
        components = read_components(tensors, f"{PREFIX}{name}.")
        present = layer.get_components(adapter_name)
        ranks = present.ranks
        fits = components.ranks == ranks
        if target_rank is not None:
            ranks = cap_ranks(target_rank, present.shape)
            fits = all(map(le, components.ranks, ranks))
        if components.shape != present.shape or not fits:
            raise ValueError(
                f"`{name}` has the sizes {components.shape} and ranks {form_text(components.form)} in the new adapter,"
                f" {present.shape} and {ranks} in the model. Pass `target_rank`, or load it as another adapter: "
                "`model.load_adapter(...)`."
            )
        components = components.map(lambda value, like=present.core: value.to(like)).raised(ranks)
        ratio = new.alpha_of(name) / layer.lotra_alpha[adapter_name]
        replacements[name] = components._replace(core=components.core * ratio)

    saved = []
    # shares the memory of the parameters; another thread may add adapters while it is made
    state = model.state_dict() if new.modules_to_save else {}
    for key, parameter in state.items():
        file_key = key.replace(f".modules_to_save.{adapter_name}.", ".")
        if file_key != key:
            saved.append((parameter, tensors[file_key]))

    # Passes that have begun hold this dict (`ForwardPass.replaced`). A layer reads the components first, and the dict
    # second, so that such a pass has the former ones throughout. Later passes get the new dict below.
    with tuner.swap_lock:
        for layer in layers.values():
            tuner.replaced[id(layer), adapter_name] = layer.get_components(adapter_name)
        for name, layer in layers.items():
            layer.replace_components(adapter_name, replacements[name])
        for parameter, tensor in saved:
            parameter.copy_(tensor)
        tuner.replaced = {}
