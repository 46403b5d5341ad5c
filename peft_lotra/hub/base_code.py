# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The Python code of the model card that builds the base of an adapter."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from keyword import iskeyword
from pathlib import Path
from pprint import pformat
from typing import NamedTuple, TypeGuard

from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ..kan import KAN, KANLinear
from ..tuner.config import LoTRAConfig


# entries of a transformers configuration that say nothing about the architecture
_INCIDENTAL = ("_name_or_path", "architectures", "transformers_version", "model_type", "dtype", "torch_dtype")


class BaseSource(NamedTuple):
    """Where the base comes from: its repository, the module and name of its class, and code that sets `base` to it."""

    model: str | None
    module: str | None
    name: str | None
    code: str
    auto: bool  # whether AutoPeftModel can load the base as well


def literal(text: str) -> str:
    """Python code of a string. It neither ends the code block of a card nor the part that a card marks."""
    escaped = text.encode("unicode_escape").decode()
    return '"' + re.sub('["`<]', lambda found: f"\\x{ord(found[0]):x}", escaped) + '"'


def hub_id(name: str | None) -> str | None:
    """The name if it can be that of a repository; None for an existing path and for an invalid name."""
    return name if name and not Path(name).exists() and _is_repository(name) else None


def check_base_model(base_model: str | None) -> None:
    """Raises a ValueError if `base_model` cannot be the name of a repository."""
    if base_model is not None and not _is_repository(base_model):
        raise ValueError(
            f"`base_model` is {base_model!r}, expected a repository on the Hub such as 'user/kan'. For a base that is "
            "not on the Hub pass `base_code`."
        )


def check_base_code(code: str | None) -> None:
    """Raises a ValueError for what is no Python, or would end the block of the model card that it is written into."""
    if code is None:
        return
    problem = "" if isinstance(code, str) else f"is of type {type(code).__name__}"
    if not problem and any(line.lstrip().startswith("```") for line in code.splitlines()):
        problem = "has a line that begins with ```, which ends its block in the model card"
    if not problem:
        try:
            ast.parse(code)
        except (SyntaxError, ValueError) as error:
            problem = f"is no Python: {error}"
    if problem:
        raise ValueError(f"`base_code` {problem}. Pass Python that assigns the base model to the variable `base`.")


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def source_of_model(
    base: nn.Module,
    config: LoTRAConfig,
    base_model: str | None = None,
    base_code: str | None = None,
    written_code: str | None = None,
) -> BaseSource:
    """The source of a base in memory; `written_code` is the code of an earlier card, for what cannot be built."""
    module, name = _import_path(type(base))
    model = base_model or hub_id(getattr(base, "name_or_path", None))
    auto = False
    if base_code is not None:
        code = base_code
    elif model and hasattr(base, "from_pretrained"):
        code, auto = _from_pretrained(module, name, model, config.revision), True
    else:
        where = f"those of {model} on the Hub" if model else "which are not on the Hub"
        built = _same_architecture(base)
        todo = f"# now load into `base` the weights that the adapter was trained on, {where}"
        code = f"{built}\n{todo}" if built else (None if base_model else written_code) or _by_hand(module, name)
    return BaseSource(model, module, name, code.strip("\n"), auto)


def source_of_config(
    config: LoTRAConfig, base_model: str | None = None, base_code: str | None = None, written_code: str | None = None
) -> BaseSource:
    """The source of a base by the configuration of the adapter; `written_code` is the code of an earlier card."""
    mapping = config.auto_mapping or {}
    module, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not (_is_importable(module) and _is_importable(name) and "." not in name):
        module = name = None  # the file can have anything, and both go into code
    cls = getattr(sys.modules.get(module), name, None) if module and name else None
    if isinstance(cls, type):
        module, name = _import_path(cls)
    model = base_model or hub_id(config.base_model_name_or_path)
    loads = _from_pretrained(module, name, model, config.revision) if model and module and name else None
    code = base_code or (None if base_model else written_code) or loads or _by_hand(module, name)
    code = code.strip("\n")
    return BaseSource(model, module, name, code, auto=code == loads)


def _is_importable(path: object) -> TypeGuard[str]:
    return isinstance(path, str) and all(part.isidentifier() and not iskeyword(part) for part in path.split("."))


def _import_path(cls: type) -> tuple[str, str]:
    """The shortest package that exports the class, and the name of the class."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        if getattr(sys.modules.get(package), cls.__name__, None) is cls:
            return package, cls.__name__
    return cls.__module__, cls.__qualname__


def _from_pretrained(module: str, name: str, model: str, revision: str | None) -> str:
    arguments = literal(model) + (f", revision={literal(revision)}" if revision else "")
    return f"from {module} import {name}\n\nbase = {name}.from_pretrained({arguments})"


def _by_hand(module: str | None, name: str | None) -> str:
    what = f"a {module}.{name}" if name else "the base model"
    return f"base = ...  # {what}, with the weights that the adapter was trained on"


def _same_architecture(base: nn.Module) -> str | None:
    """Code that builds a network of the same architecture; None if its arguments are unknown."""
    module, name = _import_path(type(base))
    config = getattr(base, "config", None)
    if hasattr(base, "from_pretrained") and config is not None and hasattr(config, "to_diff_dict"):
        config_module, config_name = _import_path(type(config))
        values = {key: value for key, value in config.to_diff_dict().items() if key not in _INCIDENTAL}
        written = pformat(values, sort_dicts=False, width=100, compact=True)
        if config_module == module:
            imports = f"from {module} import {config_name}, {name}"
        else:
            imports = f"from {config_module} import {config_name}\nfrom {module} import {name}"
        return f"{imports}\n\nconfig = {config_name}.from_dict({written})\nbase = {name}(config)"
    arguments = _kan_arguments(base)
    if arguments is None and module != "__main__" and "<locals>" not in name:
        # a class without arguments always builds the same network
        arguments = None if inspect.signature(type(base)).parameters else ""
    return None if arguments is None else f"from {module} import {name}\n\nbase = {name}({arguments})"


def _kan_arguments(base: nn.Module) -> str | None:
    """The arguments of a `peft_lotra.kan.KAN`; None if its layers are not the ones that `KAN` makes."""
    if type(base) is not KAN:
        return None
    bare = (getattr(layer, "base_layer", layer) for layer in base.layers)
    layers = [layer for layer in bare if type(layer) is KANLinear]
    settings = {(layer.grid_size, layer.spline_order, layer.grid_range) for layer in layers}
    if len(settings) != 1 or len(layers) < len(base.layers):
        return None
    ((grid_size, spline_order, grid_range),) = settings
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    return f"{widths}, grid_size={grid_size}, spline_order={spline_order}, grid_range={grid_range}"
