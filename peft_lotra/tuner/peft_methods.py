# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Transactions around the methods of PEFT's models that change a model.

PEFT injects an adapter, loads its tensors and switches to evaluation in frames of its own, which enclose those of this
package. Nothing in a tuner can undo what is half done there. Models without LoTRA pass through.
"""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from yaml import YAMLError

from ..files.format import make_own
from ..modules.calls import check_module
from ..modules.checks import check_name, check_path
from .arguments import check_base_of_load
from .transaction import (
    base_parameters,
    change_lock,
    configs_among,
    creation,
    is_part_of_change,
    is_switched,
    transaction,
)


# the methods that change a model, besides those that a tuner has itself
_CHANGES = ("add_adapter", "load_adapter", "set_adapter", "delete_adapter")
_OF_LOADING = ("model_id", "adapter_name")
_ARGUMENTS = {
    "load_adapter": _OF_LOADING,
    "add_adapter": ("adapter_name", "peft_config"),
    "set_adapter": ("adapter_name",),
    "delete_adapter": ("adapter_name",),
}
_OF_SAVING = ("selected_adapters", "save_embedding_layers")  # the arguments that say what is saved
_OF_THE_HUB = ("subfolder", "revision", "token", "cache_dir", "check_base")


def enclose(model_classes: Iterable[type], tuner_cls: type, config_cls: type) -> None:
    """Puts transactions around the methods of PEFT's model classes, for models with this tuner."""
    for model_cls in model_classes:
        for name, method in list(vars(model_cls).items()):
            if name == "__init__":
                setattr(model_cls, name, _around_creation(_bare(method), config_cls))
            elif name in _CHANGES:
                setattr(model_cls, name, _around_change(_bare(method), tuner_cls))
            elif name == "create_or_update_model_card":
                setattr(model_cls, name, _around_card(_bare(method), tuner_cls))
            elif name == "save_pretrained":
                setattr(model_cls, name, _around_saving(_bare(method), tuner_cls))
            elif name == "from_pretrained":
                setattr(model_cls, name, classmethod(_around_loading(_bare(method.__func__))))
        if "save_pretrained" in vars(model_cls):  # not the classes of tasks, which inherit it
            model_cls.push_to_hub = _instead_of_pushing(_bare(model_cls.push_to_hub), tuner_cls)  # type: ignore[attr-defined]


def _bare(method: Any) -> Any:
    """The method without a transaction of an earlier import of this package."""
    return getattr(method, "_without_transaction", method)


def _marked(run: Any, method: Any) -> Any:
    run._without_transaction = method
    return run


def _around_creation(method: Any, config_cls: type) -> Any:
    @wraps(method)
    def __init__(self, model, peft_config, *args: Any, **kwargs: Any) -> None:
        if not isinstance(peft_config, config_cls):
            method(self, model, peft_config, *args, **kwargs)
            return
        with creation(model, [peft_config]):
            method(self, model, peft_config, *args, **kwargs)

    return _marked(__init__, method)


def _around_change(method: Any, tuner_cls: type) -> Any:
    loads = method.__name__ == "load_adapter"
    changes = is_switched if method.__name__ == "set_adapter" else None

    @wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        tuner = self._modules.get("base_model")
        if not isinstance(tuner, tuner_cls) or is_part_of_change(self, tuner.model):
            return method(self, *args, **kwargs)
        _check_arguments(method.__name__, hasattr(tuner_cls, "check_reload"), args, kwargs)
        check_base = kwargs.pop("check_base", None) if loads else None
        with change_lock(tuner).held, check_base_of_load(check_base):
            # of merged layers, since switching unmerges them, and of the adapter, if it is there already
            written: list[Tensor] = [*base_parameters(tuner, merged_only=True)]
            if loads:
                path, name = map(kwargs.get, _OF_LOADING, (*args, None, None))
                written += _tensors_of(tuner, name)
                if name in tuner.peft_config and hasattr(
                    tuner_cls, "check_reload"
                ):  # PEFT's mixed models have no such
                    options = {"check_base": check_base, **kwargs}
                    tuner.check_reload(name, path, **{key: options[key] for key in _OF_THE_HUB if options.get(key)})
            with transaction(self, written, configs_among(args, kwargs), changes), _clear_config_errors():
                return method(self, *args, **kwargs)

    return _marked(run, method)


def _check_arguments(method: str, one_tuner: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises a TypeError for a path, a name or a config of another type, which would be raw errors of PEFT."""
    names = _ARGUMENTS[method]
    given = {**dict(zip(names, args, strict=False)), **{name: kwargs[name] for name in names if name in kwargs}}
    if "model_id" in given:
        check_path(given["model_id"], "model_id")
    if "adapter_name" in given and one_tuner:  # mixed models take several
        check_name(given["adapter_name"])
    if "peft_config" in given and not isinstance(given["peft_config"], PeftConfig):
        kind = type(given["peft_config"]).__name__
        raise TypeError(f"`peft_config` is of type {kind}, but must be a config, such as a LoTRAConfig.")


def _around_saving(method: Any, tuner_cls: type) -> Any:
    @wraps(method)
    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any) -> None:
        tuner = self._modules.get("base_model")
        checks = isinstance(tuner, tuner_cls) and hasattr(tuner_cls, "check_saving")
        if checks:
            check_path(save_directory, "save_directory")
        arguments = inspect.signature(method).bind(self, save_directory, *args, **kwargs).arguments
        if checks and not arguments.get("safe_serialization", True):
            raise ValueError(
                "LoTRA adapters are saved as safetensors only, since a pickle is refused when it is loaded: leave "
                "`safe_serialization` out."
            )
        if checks and not os.path.isfile(save_directory):
            # before PEFT writes tensors over those that are there
            tuner.check_saving(**{name: arguments[name] for name in _OF_SAVING if name in arguments})
            # PEFT, and older versions of safetensors, open what is there
            for name in ("", *tuner.peft_config):
                for file in ("README.md", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                    make_own(os.path.join(save_directory, name, file))
        method(self, save_directory, *args, **kwargs)
        write_card = getattr(tuner_cls, "write_card", None)
        if not checks or write_card is None or not arguments.get("is_main_process", True):
            return
        # tensors that are given are those of a sharded model, whose own are in parts: the card is made from the files
        sharded = "state_dict" in arguments.get("kwargs", {})
        try:
            write_card(None if sharded else self, save_directory)
        except ValueError as error:
            warnings.warn(f"The adapter is saved, its model card is not written: {error}", stacklevel=2)

    return _marked(save_pretrained, method)


def _around_card(method: Any, tuner_cls: type) -> Any:
    @wraps(method)
    def create_or_update_model_card(self, output_dir) -> None:
        try:
            method(self, output_dir)
        except (
            ValueError,
            TypeError,
            YAMLError,
        ):  # the card that is there cannot be read: no reason not to save the adapter
            if not isinstance(self._modules.get("base_model"), tuner_cls):
                raise

    return _marked(create_or_update_model_card, method)


def _instead_of_pushing(method: Any, tuner_cls: type) -> Any:
    @wraps(method)
    def push_to_hub(self, repo_id, *args: Any, **kwargs: Any) -> Any:
        push = getattr(tuner_cls, "push", None)
        if push is None or not isinstance(self._modules.get("base_model"), tuner_cls):
            return method(self, repo_id, *args, **kwargs)
        for name in ("max_shard_size", "safe_serialization", "use_temp_dir", "commit_description"):
            kwargs.pop(name, None)  # of transformers: an adapter is one file
        if kwargs.get("tags") is None:
            kwargs.pop("tags", None)
        return push(self, repo_id, *args, **kwargs)

    return _marked(push_to_hub, method)


def _around_loading(method: Any) -> Any:
    @wraps(method)
    def from_pretrained(cls, model, *args: Any, **kwargs: Any) -> Any:
        check_module(model)
        check_path(args[0] if args else kwargs.get("model_id", ""), "model_id")
        # what other methods leave behind is not for this package to undo
        with transaction(model, objects=configs_among(args, kwargs), begins=False), _clear_config_errors():
            return method(cls, model, *args, **kwargs)

    return _marked(from_pretrained, method)


_READING = {"peft.peft_model", "peft.mixed_model"}  # besides peft.config


@contextmanager
def _clear_config_errors() -> Iterator[None]:
    """Makes a ValueError of what an adapter_config.json raises in PEFT, which reads it before this package."""
    try:
        yield
    except (RecursionError, TypeError, KeyError, AttributeError, ValueError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        module, function = frames[-1].f_globals.get("__name__", ""), frames[-1].f_code.co_name
        if isinstance(error, ValueError):  # a byte order mark, another encoding, numbers of thousands of digits
            in_parser = module.partition(".")[0] in ("json", "codecs")
            if in_parser and any(frame.f_globals.get("__name__") == "peft.config" for frame in frames):
                raise ValueError(f"The adapter_config.json is broken, it must be JSON in UTF-8: {error}") from error
            raise
        if isinstance(error, RecursionError) and module.startswith("json."):
            raise ValueError("The adapter_config.json is nested too deeply to be read: it is damaged.") from error
        # the lookup of `peft_type`, which may be of any type
        is_lookup = module in _READING and (isinstance(error, KeyError) or "unhashable" in str(error))
        if module == "peft.config" or (is_lookup and function in ("from_pretrained", "load_adapter")):
            raise ValueError(
                "The adapter_config.json is not that of an adapter: it must be a JSON object with a `peft_type` that "
                f'PEFT knows, such as "LOTRA" ({type(error).__name__}: {error}).'
            ) from error
        raise


def _tensors_of(model: nn.Module, adapter_name: Any) -> Iterator[Tensor]:
    """The tensors of an adapter, none if it is not there."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for attribute in module.adapter_layer_names:
                parts = getattr(module, attribute)
                if adapter_name in parts:
                    part = parts[adapter_name]
                    yield from part.parameters() if isinstance(part, nn.Module) else (part,)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            saved = module.modules_to_save[adapter_name]
            yield from chain(saved.parameters(), saved.buffers())
