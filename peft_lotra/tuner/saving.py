# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tensors of an adapter: read and checked before a model is touched, checked before they are saved."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load, save_file
from torch import Tensor, nn, strided

from ..modules.calls import PREFIX
from ..modules.checks import list_first
from ..modules.folders import naming_damage, replacing_files
from ..tucker import COMPONENTS, Update
from .config import LoTRAConfig, Source, pattern_key
from .layer import Target, lotra_layers
from .targets import exact_targets


def read_tensors(source: Source, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a saved adapter, by name; warns if their SHA-256 is not the one given.

    Raises:
        ValueError: There is no adapter_model.safetensors, or it is damaged. A pickle is not read.
    """
    folder = os.path.join(source.path, source.subfolder or "")
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        if not os.path.isdir(folder):
            path = hf_hub_download(
                source.path, SAFETENSORS_WEIGHTS_NAME, subfolder=source.subfolder, **source.hub_kwargs
            )
        with open(path, "rb") as file:
            content = file.read()
    except (FileNotFoundError, EntryNotFoundError) as error:
        raise ValueError(
            f"The adapter at {folder} has no {SAFETENSORS_WEIGHTS_NAME}, and pickled weights are not loaded. Save the "
            "adapter again, or ask its author to do it."
        ) from error
    with naming_damage(path):
        tensors = load(content)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        warnings.warn(f"{path} was changed after it had been saved: it has another SHA-256.", stacklevel=2)
    return tensors


def check_tensors(
    tensors: Mapping[str, Tensor],
    config: LoTRAConfig,
    model: nn.Module,
    targets: Mapping[str, Target],
    allows_other_shapes: bool = False,
) -> None:
    """Compares the tensors of a file with those that an adapter of this configuration has in this model.

    Raises:
        ValueError: A tensor is missing, belongs to no adapter, or has another shape or dtype, or values not finite.
    """
    expected: dict[str, tuple[int, ...] | None] = {
        f"{PREFIX}{name}.lotra_{component}": shape
        for name, target in targets.items()
        for component, shape in config.component_shapes(name, target.tensor).items()
    }
    for name, key, value in saved_tensors(config, model, targets):  # None: integers, such as a number of batches
        expected[f"{PREFIX}{name}.{key}"] = tuple(value.shape) if value.is_floating_point() else None
    wrong = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    wrong += [f"{name} belongs to no adapter of this model" for name in tensors.keys() - expected.keys()]
    for name in tensors.keys() & expected.keys():
        tensor, shape = tensors[name], expected[name]
        if shape is None:
            continue
        if tuple(tensor.shape) != shape and not allows_other_shapes:
            wrong.append(f"{name} has the shape {tuple(tensor.shape)} instead of {shape}")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            wrong.append(f"{name} is of {tensor.dtype}")
    place = f" at {config.source.path}" if config.source else ""
    raise_if_any(f"The file{place} is not that of an adapter of this model", [*wrong, *_not_finite(tensors)])


def saved_tensors(config: LoTRAConfig, model: nn.Module, targets: Iterable[str]) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors of `modules_to_save`: the name of the module in a file, the name in the module, the tensor."""
    endings = tuple(config.modules_to_save or ())
    for name, module in model.named_modules() if endings else ():
        bare = name.replace(".base_layer", "").replace(".original_module", "")
        if not bare.endswith(endings) or ".modules_to_save" in name or name.endswith(".original_module"):
            continue
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        target = next((t for t in targets if bare.startswith(f"{t}.")), None)
        stored = bare if target is None else f"{target}.base_layer{bare.removeprefix(target)}"
        for key, value in original.state_dict().items():
            yield stored, key, value


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} has values that are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.float().isfinite().all()
    ]


def raise_if_any(headline: str, wrong: list[str]) -> None:
    """Raises a ValueError if something is wrong, which names the first three."""
    if wrong:
        raise ValueError(f"{headline}: {list_first(sorted(wrong))}. Nothing was changed.")


def check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if an entry is no tensor, or has values that are not finite."""
    wrong = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.layout != strided or tensor.is_meta:
            wrong.append(f"{name} has no values")
    raise_if_any("The state dict is not that of an adapter", wrong or _not_finite(state_dict))


def check_no_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a state dict to be loaded into an adapter has parameters of the frozen base."""
    others = [name for name in tensors if ".lotra_" not in name and ".modules_to_save." not in name]
    of_base = model.state_dict().keys() & others if others else ()
    wrong = [f"{name} is a parameter of the base" for name in of_base]
    raise_if_any("The state dict is not that of an adapter", wrong)


def check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raise a ValueError if components in a state dict have other shapes than those of the model."""
    wrong = []
    for name, layer in lotra_layers(model):
        for adapter in layer.lotra_r:
            for component, part in layer.get_components(adapter)._asdict().items():
                key = f"{prefix}{name}.lotra_{component}.{adapter}"
                if key in tensors and tensors[key].shape != part.shape:
                    wrong.append(f"{key} has the shape {tuple(tensors[key].shape)} instead of {tuple(part.shape)}")
    raise_if_any("The tensors do not fit the adapters", wrong)


def select_to_save(adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The components of an adapter in the state dict of a model; what is of the base is taken out of the dict."""
    endings = tuple(f".{component}.{adapter_name}" for component in COMPONENTS)
    # PEFT would go on to write embeddings that were resized, or that `save_embedding_layers` asks for
    for key in [key for key in state_dict if not key.endswith(endings) and ".modules_to_save." not in key]:
        del state_dict[key]
    return {key: value for key, value in state_dict.items() if key.endswith(endings)}


def check_complete(adapter_name: str, tensors: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if components are spread over several processes, or an adapter has values not finite."""
    for key, tensor in tensors.items():
        if tensor.dim() < 2 or type(tensor) not in (Tensor, nn.Parameter):  # FSDP1 gives flat pieces
            raise ValueError(
                f"{key} is spread over several processes. Gather whole tensors, by "
                "`get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, and pass them as "
                "`save_pretrained(folder, state_dict=...)`."
            )
    own = {key: value for key, value in state_dict.items() if f".{adapter_name}" in key}
    raise_if_any(f"The adapter {adapter_name!r} is not saved", _not_finite(own))


def cast_to_storage(tensors: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    """Return the components in the dtype of a file; warn if rounding changes one by more than 1 %.

    Raises:
        ValueError: A component has values above the largest one of this dtype.
    """
    stored = {key: tensor.to(getattr(torch, storage)) for key, tensor in tensors.items()}
    raise_if_any(f'The adapter is not saved in {storage}, take `storage="bfloat16"` or None', _not_finite(stored))
    for key, tensor in tensors.items():
        exact = tensor.cpu().double()  # squares of small float32 values would be zero
        if (stored[key].cpu().double() - exact).norm() > 0.01 * exact.norm():
            warnings.warn(
                f'{key} loses more than 1 % in {storage}: its values are too small. Take `storage="bfloat16"`.',
                stacklevel=2,
            )
    return stored


def is_saving() -> bool:
    """Whether `PeftModel.save_pretrained` is running; a ValueError if it would write a pickle.

    PEFT does not tell `_get_adapter_state_dict`: it is found by its name in the four frames above. Only then the base
    is recorded and tensors that are not complete are refused; `get_peft_model_state_dict` by itself may have them.
    """
    frame: Any = sys._getframe(1)
    for _ in range(4):
        if frame is not None and frame.f_code.co_name == "save_pretrained":
            if not frame.f_locals.get("safe_serialization", True):
                raise ValueError("LoTRA adapters are saved as safetensors only: leave `safe_serialization` out.")
            return True
        frame = frame and frame.f_back
    return False


def save_adapter(model: PeftModel, folder: str | os.PathLike, **kwargs: Any) -> None:
    """Saves adapters as `model.save_pretrained(folder)` does, but so that an interruption loses nothing.

    The files are written beside the old ones, and moved when all are complete. If the process is killed, the adapter
    there is the old one or the new one, and the next save removes what is left.

    Args:
        model (`PeftModel`): The model.
        folder (`str`): The folder. It needs room for the old files and the new ones.
        kwargs: As for `PeftModel.save_pretrained`, e.g. `selected_adapters`.

    Raises:
        ValueError: `model` is no PeftModel, `folder` is a file, or what `PeftModel.save_pretrained` raises. The folder
            is as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, save_adapter
        >>> from peft_lotra.kan import KAN
        >>> with TemporaryDirectory() as folder:
        ...     save_adapter(get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2)), folder)
        ...     sorted(os.listdir(folder))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if not hasattr(model, "get_base_model"):  # an injected model has not
        raise ValueError(f"`model` is of type {type(model).__name__}, but must be a PeftModel.")
    with replacing_files(folder, "README.md") as stage:  # a user's card, which PEFT completes
        model.save_pretrained(stage, **kwargs)


def write_updates(
    folder: str, updates: dict[str, Update], start: bool | str, record: dict[str, Any], base: nn.Module
) -> None:
    """Write an adapter into a folder as `PeftModel.save_pretrained` does; `alpha` is in the cores.

    Args:
        folder: The folder, which exists.
        updates: The updates of the adapter, by layer.
        start: How its training started, as `init_weights` of a configuration names it.
        record: The record of the base.
        base: The base.
    """
    functions = {name: record[name]["shape"][2] for name in updates}
    # the configuration says of all layers together whether the residual branch is adapted
    adapt_residual = any(update.tensor.shape[2] > functions[name] for name, update in updates.items())
    tensors = {}
    ranks = {}
    for name, update in updates.items():
        size = functions[name] + (adapt_residual and record[name]["has_residual"])
        components = update.tensor.padded(size)
        ranks[name] = components.form
        for component, value in components._asdict().items():
            tensors[f"{PREFIX}{name}.lotra_{component}"] = value.cpu().contiguous()
    dtype = next(iter(tensors.values())).dtype
    config = LoTRAConfig(
        r=next(iter(ranks.values())),
        rank_pattern={pattern_key(name): of_layer for name, of_layer in ranks.items()},
        target_modules=exact_targets(updates, base),
        adapt_residual=adapt_residual,
        init_weights=start,  # pyright: ignore[reportArgumentType]
        storage={torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(dtype),  # pyright: ignore[reportArgumentType]
        base_layers={name: record[name] for name in updates},
        inference_mode=True,
    )
    save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(folder)
