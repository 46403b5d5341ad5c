# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The load of a LoTRA adapter together with adapters of other PEFT methods from one folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from ..modules.calls import undone_on_error
from ..modules.checks import list_first
from ..modules.folders import naming_damage
from .contents import read_config, saved_adapters


def load_adapters(
    base: nn.Module,
    source: str | os.PathLike,
    names: Sequence[str] | None = None,
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Load a LoTRA adapter and the adapters of other PEFT methods that were saved with it, such as LoRA on a head.

    `model.save_pretrained(folder)` writes all of them into one folder, and `push_to_hub` into one repository:
    "default" goes to the folder, each other adapter to a subfolder of its name. All adapters that are loaded are
    active. `PeftModel.from_pretrained` would load the LoTRA adapter alone.

    Args:
        base (`nn.Module`): The base model, without adapters. It is changed in place, as by `from_pretrained`.
        source (`str`): The folder, or a repository on the Hub.
        names (`list[str]`, *optional*): The adapters to load, exactly one of them LoTRA. By default the LoTRA adapter
            and all that were saved with it. Others in the folder, of earlier saves, are left out with a warning.
        is_trainable (`bool`): Whether to train the adapters further. By default they are frozen.
        revision (`str`, *optional*): The branch, tag or commit of the repository.
        token (`str`, *optional*): The access token of the Hub.
        kwargs: For `PeftModel.from_pretrained`, which loads the LoTRA adapter, e.g. `check_base="error"`.

    Returns:
        The model. `merge_and_unload` merges all adapters, `save_pretrained` writes them again.

    Raises:
        ValueError: The base has adapters; the folder has no LoTRA adapter, or several and `names` does not choose one;
            an adapter is missing or damaged, or does not fit the base. The base is unchanged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model, inject_adapter_in_model
        >>> from peft_lotra import LoTRAConfig, load_adapters
        >>> from peft_lotra.kan import KAN
        >>> def build():
        ...     torch.manual_seed(0)
        ...     return torch.nn.Sequential(KAN([2, 4]), torch.nn.Linear(4, 1))
        >>> model = get_peft_model(build(), LoTRAConfig(r=2))
        >>> lora = LoraConfig(r=1, target_modules=["1"])
        >>> _ = inject_adapter_in_model(lora, model.get_base_model(), adapter_name="head")
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = load_adapters(build(), folder)
        >>> list(loaded.peft_config)
        ['default', 'head']
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("The base has adapters. Take them out by `model.unload()`, or build the base again.")
    if isinstance(names, str):
        names = [names]

    folders = _find_folders(source, names, revision, token)
    lotra_name = _find_lotra_adapter(source, folders)
    if names is None:
        folders = _leave_out_earlier_saves(source, folders, lotra_name)
    # read before the base is changed
    others = {}
    for name, folder in folders.items():
        if name != lotra_name:
            others[name] = _read_other_adapter(folder)

    with undone_on_error(base):
        with warnings.catch_warnings():
            # the others are loaded next, unless `names` leaves them out
            warnings.filterwarnings("ignore", "The adapter was saved with adapters of other methods")
            model = PeftModel.from_pretrained(
                base, folders[lotra_name], adapter_name=lotra_name, is_trainable=is_trainable, **kwargs
            )
        for name, (config, tensors) in others.items():
            config.inference_mode = not is_trainable
            _inject(model, name, config, tensors)
        # only when all fit, since LoRA may hold biases of the base
        for name, (_, tensors) in others.items():
            set_peft_model_state_dict(model, tensors, adapter_name=name)
        _activate(model, list(folders), is_trainable)
    if not is_trainable:
        model.eval()
    return model


def _find_folders(
    source: str | os.PathLike,
    names: Sequence[str] | None,
    revision: str | None,
    token: str | None,
) -> dict[str, Path]:
    """Return the folders of the adapters to load, by name."""
    prefixes = ["", "*/"]
    if names is not None:
        prefixes = ["" if name == "default" else f"{name}/" for name in names]
    patterns = []
    for prefix in prefixes:
        patterns += [f"{prefix}{CONFIG_NAME}", f"{prefix}{SAFETENSORS_WEIGHTS_NAME}"]
    root = Path(source)
    if not root.exists():
        try:
            root = snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no folder {source}, and no repository of that name could be read from the Hub. {error}"
            ) from error
    folders = saved_adapters(root)
    if names is None:
        return folders
    missing = [name for name in names if name not in folders]
    if missing:
        raise ValueError(f"{source} has no adapter {missing}. It has {list(folders)}.")
    return {name: folders[name] for name in names}


def _find_lotra_adapter(source: str | os.PathLike, folders: Mapping[str, Path]) -> str:
    """Return the name of the LoTRA adapter among these; raise a ValueError unless there is exactly one."""
    lotra_names = []
    for name, folder in folders.items():
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} holds tensors without {CONFIG_NAME}. Save or download the adapter again.")
        if read_config(folder)["peft_type"] == "LOTRA":
            lotra_names.append(name)
    if not lotra_names:
        raise ValueError(f"{source} has no LoTRA adapter among {list(folders)}.")
    if len(lotra_names) > 1:
        raise ValueError(
            f"{source} has the LoTRA adapters {lotra_names}. Pass one of them, and the adapters that belong to it, as "
            "`names=[...]`."
        )
    return lotra_names[0]


def _leave_out_earlier_saves(
    source: str | os.PathLike,
    folders: Mapping[str, Path],
    lotra_name: str,
) -> dict[str, Path]:
    """Return the folders of the adapters that were saved with the LoTRA adapter.

    All are returned if its file does not say, or its folder was renamed.

    Raises:
        ValueError: One of them is missing.
    """
    saved_with = read_config(folders[lotra_name]).get("saved_with")
    if not saved_with or saved_with[0] != lotra_name:
        return dict(folders)
    missing = [name for name in saved_with if name not in folders]
    if missing:
        raise ValueError(
            f"{source} has no adapter {missing}, which was saved with {lotra_name!r}. Copy it there, or pass "
            f"`names={list(folders)}` to load the model without it."
        )
    earlier = [name for name in folders if name not in saved_with]
    if earlier:
        warnings.warn(
            f"{source} also has {earlier}, which {lotra_name!r} was not saved with: left out. Pass `names=` to load "
            "it too.",
            stacklevel=3,
        )
    return {name: folder for name, folder in folders.items() if name in saved_with}


def _read_other_adapter(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors of an adapter of another method; pickles are not read."""
    with naming_damage(folder / CONFIG_NAME):
        config = PeftConfig.from_pretrained(str(folder))
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"The adapter at {folder} has no {SAFETENSORS_WEIGHTS_NAME}. Save or download it again.")
    with naming_damage(path):
        return config, load_file(path)


def _inject(
    model: PeftModel,
    name: str,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
) -> None:
    """Inject an adapter of another method into the model; raise a ValueError unless these tensors fit."""
    with warnings.catch_warnings():
        # here a second method is what the user asks for
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model.get_base_model(), adapter_name=name)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    places = expected.keys() | model.state_dict().keys()  # PEFT also saves embeddings
    errors = [f"{key} is missing" for key in expected if key not in tensors]
    for key, tensor in tensors.items():
        if key not in places:
            errors.append(f"{key} has no place in it")
        elif key in expected and tensor.shape != expected[key].shape:
            errors.append(f"{key} has the shape {tuple(tensor.shape)} instead of {tuple(expected[key].shape)}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            errors.append(f"{key} has NaN or infinite values")
    if errors:
        raise ValueError(f"The adapter {name!r} does not fit the base: {list_first(errors)}.")


def _activate(model: nn.Module, names: list[str], is_trainable: bool) -> None:
    """Activate adapters of several methods: each injection has left the others inactive in some modules."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            present = [name for name in names if name in module._get_available_adapters()]
            module.set_adapter(present, inference_mode=not is_trainable)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            present = [name for name in names if name in module._adapters]
            # a module can only have one active copy
            module.set_adapter(present[-1], inference_mode=not is_trainable)
