# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tensors of an adapter: read and checked before a model is changed, checked before they are saved."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
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
from ..tucker import Update
from .config import LoTRAConfig, Source, pattern_key
from .layer import Targets, Tensors
from .linear_path import PATH, LinearPath, add_path
from .targets import exact_targets


def read_tensors(
    source: Source,
    sha256: str | None = None,
    is_strict: bool = False,
) -> Tensors:
    """Return the tensors of a saved adapter by name; warn, or raise, if their SHA-256 differs from the one given.

    Raises:
        ValueError: There is no adapter_model.safetensors, or it is damaged. A pickle is not read.
    """
    folder = Path(source.path, source.subfolder or "")
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        if not folder.is_dir():
            options = {"subfolder": source.subfolder, **source.hub_kwargs}
            path = Path(hf_hub_download(source.path, SAFETENSORS_WEIGHTS_NAME, **options))
        content = path.read_bytes()
    except (FileNotFoundError, EntryNotFoundError) as error:
        raise ValueError(
            f"The adapter at {folder} has no {SAFETENSORS_WEIGHTS_NAME}, and pickled weights are not loaded. Save the "
            "adapter again, or ask its author to."
        ) from error
    with naming_damage(path):
        tensors = load(content)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        message = f"{path} was changed after it had been saved: its SHA-256 differs."
        if is_strict:
            raise ValueError(f"{message} If it is being saved, try again; otherwise save the adapter again.")
        warnings.warn(message, stacklevel=2)
    return tensors


def check_tensors(
    tensors: Mapping[str, Tensor],
    config: LoTRAConfig,
    model: nn.Module,
    targets: Targets,
) -> None:
    """Compare the tensors of a file with those that an adapter of this configuration has in this model.

    Raises:
        ValueError: A tensor is missing, belongs to no adapter, or has another shape or dtype, or values not finite.
    """
    expected: dict[str, tuple[int, ...] | None] = {}
    for name, target in targets.items():
        for component, shape in config.shapes_of(name, target.tensor).items():
            expected[f"{PREFIX}{name}.lotra_{component}"] = shape
    for name, key, value in saved_tensors(config, model, targets):
        # None for integers, such as a number of batches
        expected[f"{PREFIX}{name}.{key}"] = tuple(value.shape) if value.is_floating_point() else None

    errors = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        if name not in expected:
            errors.append(f"{name} belongs to no adapter of this model")
            continue
        shape = expected[name]
        if shape is None:
            continue
        if tuple(tensor.shape) != shape and not config.allows_other_shapes:
            errors.append(f"{name} has the shape {tuple(tensor.shape)} instead of {shape}")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            errors.append(f"{name} is of {tensor.dtype}")
    errors += _not_finite(tensors)
    location = f" at {config.source.path}" if config.source else ""
    raise_if_any(f"The file{location} does not hold an adapter of this model", errors)


def saved_tensors(
    config: LoTRAConfig,
    model: nn.Module,
    targets: Iterable[str],
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the tensors of `modules_to_save`: the module's name in a file, the tensor's name in it, the tensor.

    A module inside a target gets `base_layer` in its name.
    """
    if not config.modules_to_save:
        return
    for name, module in model.named_modules():
        bare = name.replace(".base_layer", "").replace(".original_module", "")
        is_copy = ".modules_to_save" in name or name.endswith(".original_module")
        if is_copy or not bare.endswith(tuple(config.modules_to_save)):
            continue
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        stored = bare
        for target in targets:
            if bare.startswith(f"{target}."):
                stored = f"{target}.base_layer{bare.removeprefix(target)}"
        for key, value in original.state_dict().items():
            yield stored, key, value


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return an error for each tensor with values that are not finite."""
    errors = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            errors.append(f"{name} has no values, on the meta device")
        elif tensor.is_floating_point() and not tensor.float().isfinite().all():
            errors.append(f"{name} has values that are not finite")
    return errors


def raise_if_any(headline: str, errors: list[str]) -> None:
    """Raise a ValueError that names the first three errors; nothing without errors."""
    if errors:
        raise ValueError(f"{headline}: {list_first(sorted(errors))}. No tensor was changed.")


def check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if an entry is no tensor, or has values that are not finite."""
    errors = []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or tensor.layout != strided:
            errors.append(f"{name} has no values")
    raise_if_any("The state dict is not that of an adapter", errors or _not_finite(state_dict))


def check_no_base(model: nn.Module, tensors: Tensors) -> None:
    """Raise a ValueError if a state dict for an adapter would overwrite parameters of the frozen base."""
    names = [name for name in tensors if ".lotra_" not in name and ".modules_to_save." not in name]
    if names:
        base_names = model.state_dict().keys() & names
        errors = [f"{name} is a parameter of the base" for name in base_names]
        raise_if_any("The state dict is not that of an adapter", errors)


def check_shapes(parameters: Tensors, state_dict: Tensors) -> None:
    """Raise a ValueError if tensors for adapters have other shapes than their parameters."""
    errors = []
    for name, parameter in parameters.items():
        shape = state_dict[name].shape if name in state_dict else parameter.shape
        if shape != parameter.shape and (".lotra_" in name or ".modules_to_save." in name):
            errors.append(f"{name} has the shape {tuple(shape)} instead of {tuple(parameter.shape)}")
    raise_if_any("The tensors do not fit the adapters", errors)


def check_complete(adapter_name: str, tensors: Tensors, state_dict: Tensors) -> None:
    """Raise a ValueError if components are spread over several processes, or an adapter has values not finite."""
    for key, tensor in tensors.items():
        if tensor.dim() < 2 or type(tensor) not in (Tensor, nn.Parameter):  # FSDP1 gives flat pieces
            raise ValueError(
                f"{key} is spread over several processes. Gather whole tensors, by "
                "`get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`, and pass them as "
                "`save_pretrained(folder, state_dict=...)`."
            )
    saved = {key: value for key, value in state_dict.items() if f".{adapter_name}" in key}
    raise_if_any(f"The adapter {adapter_name!r} is not saved", _not_finite(saved))


def cast_to_storage(tensors: Tensors, storage: str) -> Tensors:
    """Return the components in the dtype of a file; warn if rounding changes one by more than 1 %.

    Raises:
        ValueError: A component has values above the largest one of this dtype.
    """
    dtype = getattr(torch, storage)
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    raise_if_any(f'The adapter is not saved in {storage}, take `storage="bfloat16"` or None', _not_finite(stored))
    for key, tensor in tensors.items():
        exact = tensor.cpu().double()  # squares of small float32 values would be zero
        rounded = stored[key].cpu().double()
        error = rounded - exact
        if error.norm() > 0.01 * exact.norm():
            warnings.warn(
                f'{key} loses more than 1 % in {storage}: its values are too small. Take `storage="bfloat16"`.',
                stacklevel=2,
            )
    return stored


def find_save() -> Mapping[str, Any] | None:
    """Return the variables of the `PeftModel.save_pretrained` that is running; None if none is.

    PEFT does not tell `_get_adapter_state_dict`, so that the calling functions are searched. Only a save records the
    base, and refuses incomplete tensors, which `get_peft_model_state_dict` may return.
    """
    frame = _find_frame("save_pretrained")
    return frame and frame.f_locals


def find_reload() -> Mapping[str, Any] | None:
    """Return the variables of the `PeftModel.load_adapter` that runs for an adapter of the model; None if none does.

    PEFT then keeps the configuration of the adapter, and does not read the one in the file.
    """
    frame = _find_frame("load_adapter")
    if frame is None or frame.f_back.f_code.co_name == "from_pretrained":
        return None
    is_new = "peft_config" in frame.f_locals
    is_of_peft = "model_id" in frame.f_locals
    return frame.f_locals if is_of_peft and not is_new else None


def _find_frame(function: str) -> Any:
    """Return the frame of the innermost call of a function; None if none is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame


def save_adapter(model: PeftModel, folder: str | os.PathLike, **kwargs: Any) -> None:
    """Save adapters like `model.save_pretrained(folder)`, so that an interruption loses nothing.

    New files are written next to the old ones, and moved when all are complete. If the process is killed, the folder
    holds the old adapter or the new one, and the next save cleans up.

    Args:
        model (`PeftModel`): The model.
        folder (`str`): The folder. It needs room for the old files and the new ones.
        kwargs: As for `PeftModel.save_pretrained`, e.g. `selected_adapters`.

    Raises:
        ValueError: `model` is no PeftModel, or `PeftModel.save_pretrained` raises it. The folder is unchanged.
        OSError: `folder` is a file.

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
    if not hasattr(model, "get_base_model"):
        raise ValueError(f"`model` is of type {type(model).__name__}, but must be a PeftModel.")
    with replacing_files(folder, "README.md") as stage:  # PEFT completes a user's card
        model.save_pretrained(stage, **kwargs)


def write_updates(
    folder: str,
    updates: dict[str, Update],
    start: bool | str,
    record: dict[str, Any],
    base: nn.Module,
) -> None:
    """Write an adapter into a folder like `PeftModel.save_pretrained`; the cores include `alpha`.

    Args:
        folder: The folder, which exists.
        updates: The updates of the adapter, by layer.
        start: How its training started, as `init_weights` of a configuration names it.
        record: The record of the base.
        base: The base.
    """
    path_tensors = {}
    if PATH in updates and isinstance(base, LinearPath):
        updates = dict(updates)
        change = updates.pop(PATH).tensor.core.flatten()
        for name, value in add_path(base, change).items():
            path_tensors[f"{PREFIX}{PATH}.{name}"] = value.cpu().contiguous()
    # one field of the configuration covers all layers
    adapt_residual = False
    for name, update in updates.items():
        adapt_residual |= update.tensor.shape[2] > record[name]["shape"][2]

    tensors = {}
    rank_pattern = {}
    for name, update in updates.items():
        has_residual = adapt_residual and record[name]["has_residual"]
        components = update.tensor.padded(record[name]["shape"][2] + has_residual)
        rank_pattern[pattern_key(name)] = components.form
        for component, value in components._asdict().items():
            tensors[f"{PREFIX}{name}.lotra_{component}"] = value.cpu().contiguous()

    dtype = next(iter(tensors.values())).dtype
    storage = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(dtype)
    config = LoTRAConfig(
        r=next(iter(rank_pattern.values())),
        rank_pattern=rank_pattern,
        target_modules=exact_targets(updates, base),
        adapt_residual=adapt_residual,
        init_weights=start,  # pyright: ignore[reportArgumentType]
        storage=storage,  # pyright: ignore[reportArgumentType]
        base_layers={name: record[name] for name in updates},
        modules_to_save=[PATH] if path_tensors else None,
        inference_mode=True,
    )

    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    save_file({**tensors, **path_tensors}, path, metadata={"format": "pt"})
    config.save_pretrained(folder)
