# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`modules_to_save` that lie inside of adapted layers, such as the batch norm of a KAN layer.

PEFT copies modules outside of adapted layers only. While the base layers stand in the places of the adapted ones, it
copies those inside too. In a file, their names lead through the base layer: "layers.0.base_layer.bn.weight".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..modules.calls import modules_of
from .config import LoTRAConfig
from .targets import Target


# what PEFT adds to `modules_to_save` for these tasks, whether the model has them or not
_ADDED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_MAX_SHOWN = 12


def check_saved_modules(config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Refuses a name in `modules_to_save` that matches no module, or one that cannot be copied or is adapted."""
    if not config.modules_to_save:
        return
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    names += [f"{target}.{part}" for target, part in _parts(targets)]
    for ending in config.modules_to_save:
        if ending in _ADDED_BY_PEFT.get(config.task_type or "", ()) or any(name.endswith(ending) for name in names):
            continue
        leaves = (name for name, module in model.named_modules() if name and not list(module.children()))
        shown = [name.replace(".base_layer", "") for name in leaves if ".lotra_" not in name]
        raise ValueError(
            f"`modules_to_save` has {ending!r}, which is no module of the model, nor the end of the name of one. Its "
            f"modules are {', '.join(shown[:_MAX_SHOWN])}{', ...' if len(shown) > _MAX_SHOWN else ''}."
        )
    for name, module in model.named_modules():
        if name.endswith(tuple(config.modules_to_save)) and (computed := _computed_tensor(module)):
            raise ValueError(
                f"`modules_to_save` has `{name}`, which cannot be copied: its `{computed}` is computed from other "
                "parameters, by pruning (`torch.nn.utils.prune.remove` makes it permanent), `weight_norm` "
                "(`torch.nn.utils.parametrizations.weight_norm` can be copied), or a hook."
            )
    for target, part in _saved_parts(config, targets):
        if any(name.startswith(f"{part}.") for name in targets[target].coefficients.parameters):
            raise ValueError(
                f"`modules_to_save` has the module `{part}` of the layer `{target}`, whose coefficients are adapted. "
                "Save it whole, and leave the layer out by `exclude_modules`, or adapt the layer, and leave it out of "
                "`modules_to_save`."
            )


def _computed_tensor(module: nn.Module) -> str | None:
    """The name of a tensor in a module that is a result of autograd, which `copy.deepcopy` refuses."""
    for path, part in module.named_modules():
        for name, value in chain(vars(part).items(), part._buffers.items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                return f"{path}.{name}" if path else name
    return None


def saves_inside(config: LoTRAConfig, targets: Mapping[str, Target]) -> bool:
    """Whether some of `modules_to_save` lie inside of targets."""
    return bool(config.modules_to_save) and any(True for _ in _saved_parts(config, targets))


def name_in_file(name: str, model: nn.Module, targets: Mapping[str, Target]) -> str:
    """The name that a module to save has once the targets are adapted."""
    for target in targets:
        if name.startswith(f"{target}.") and not isinstance(model.get_submodule(target), BaseTunerLayer):
            return f"{target}.base_layer{name.removeprefix(target)}"
    return name


def put_saved_modules(model: nn.Module) -> None:
    """Puts the copies that are in force in the places of the modules that PEFT's `unload` did not reach."""
    for module in modules_of(model):
        for name, child in list(module._modules.items()):
            if isinstance(child, ModulesToSaveWrapper):
                module._modules[name] = child.unload_and_optionally_merge_module(False, False, None)


def _saved_parts(config: LoTRAConfig, targets: Mapping[str, Target]) -> Iterator[tuple[str, str]]:
    if endings := tuple(config.modules_to_save or ()):
        yield from ((target, part) for target, part in _parts(targets) if f"{target}.{part}".endswith(endings))


def _parts(targets: Mapping[str, Target]) -> Iterator[tuple[str, str]]:
    """The modules inside of targets: the name of the target, and that of the module in it."""
    for target, (layer, _, _) in targets.items():
        yield from ((target, part) for part, _ in layer.named_modules() if part)
