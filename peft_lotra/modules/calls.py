# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modules and their modes, calls of layers with other parameters, and the network inside of wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .locks import IN_PROGRESS, put_back_by


_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue] (no stub)


def check_module(model: Any, argument: str = "model") -> None:
    """Raises a TypeError for what is no module, such as a class, a config, a path or a state dict."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        raise TypeError(f"`{argument}` must be a network, a `torch.nn.Module`, but is {given}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"`{argument}` was compiled by `torch.jit`, which hides its layers: pass the network itself.")


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, without the names that `model.modules()` makes up first."""
    modules, seen = [model], {model}
    for module in modules:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts each module of the model back into its mode, training or evaluation, at the end."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode

    with put_back_by(restore):
        yield


@contextmanager
def read_at_rest(model: nn.Module) -> Iterator[None]:
    """Lets parametrizations be read as in evaluation mode: in training, each read of some changes their buffers
    (`spectral_norm`)."""
    lists = [module for module in modules_of(model) if isinstance(module, ParametrizationList)]
    training = [module for parametrizations in lists for module in modules_of(parametrizations) if module.training]
    if not training:
        yield
        return

    def restore() -> None:
        for module in training:
            module.training = True

    with put_back_by(restore):
        for module in training:
            module.training = False
        yield


def set_mode(module: nn.Module, training: bool) -> None:
    """Sets the mode of a module and of those inside, as `module.train(training)` does.

    In networks whose method `train` is a training loop (pykan of 2024) torch's own takes its place.
    """
    if type(module).train is not nn.Module.train and _switches_mode(type(module).train):
        module.train(training)
        return
    module.training = training
    for child in module.children():
        set_mode(child, training)


@lru_cache(maxsize=256)
def _switches_mode(train: Callable[..., Any]) -> bool:
    """Whether a method may be called as torch calls `train`."""
    _, *parameters = inspect.signature(train).parameters.values()
    first = next(iter(parameters), None)
    return first is not None and (
        first.name == "mode" or isinstance(first.default, bool) or first.kind is first.VAR_POSITIONAL
    )


@contextmanager
def attributes_kept(model: Callable, of_transforms: bool = True) -> Iterator[None]:
    """Puts back the attributes in which modules keep tensors of a forward pass (pykan), or those of `of_transforms`
    alone, which are dead after a transform of `torch.func`."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    before = [(vars(module), dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for entries, kept in before:
            for name in [name for name, value in entries.items() if value is not kept.get(name)]:
                if not _holds_tensor(entries[name], of_transforms):
                    continue
                if name in kept:
                    entries[name] = kept[name]
                else:
                    del entries[name]


def _holds_tensor(value: Any, of_transform: bool) -> bool:
    """Whether a value is a tensor, or a list with one; or such a one of a transform."""
    if isinstance(value, torch.Tensor):
        return not of_transform or _functorch.is_functorch_wrapped_tensor(value)
    return isinstance(value, (list, tuple)) and any(_holds_tensor(part, of_transform) for part in value)


class _Call(nn.Module):
    """A function called as a module, so that `functional_call` can exchange the parameters of `layer` around it."""

    def __init__(self, layer: nn.Module, function: Callable):
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def call_with_parameters(
    layer: nn.Module, parameters: dict[str, torch.Tensor], function: Callable, args: tuple, kwargs: dict
) -> Any:
    """Calls a function while tensors replace parameters of a layer.

    `torch.func.functional_call` exchanges the entries of `_parameters`. FSDP (the first one) puts views of its flat
    parameter into `__dict__`, where they hide those entries: the views are exchanged instead.
    """
    if not parameters:
        return function(*args, **kwargs)
    owners = {name: layer.get_submodule(path) if (path := name.rpartition(".")[0]) else layer for name in parameters}
    if torch.compiler.is_compiling():
        return _exchange_and_call(layer, owners, parameters, function, args, kwargs)
    before = [_find_entry(owner, name.rpartition(".")[2]) for name, owner in owners.items()]
    key = object()
    IN_PROGRESS[key] = get_ident(), partial(_put_back, layer, before, list(parameters.values()))
    try:
        return _exchange_and_call(layer, owners, parameters, function, args, kwargs)
    finally:
        del IN_PROGRESS[key]


def _exchange_and_call(
    layer: nn.Module,
    owners: dict[str, nn.Module],
    parameters: dict[str, torch.Tensor],
    function: Callable,
    args: tuple,
    kwargs: dict,
) -> Any:
    views = {name: owner for name, owner in owners.items() if name.rpartition(".")[2] in owner.__dict__}
    if views:
        saved = {name: owner.__dict__[name.rpartition(".")[2]] for name, owner in views.items()}
        try:
            for name, owner in views.items():
                owner.__dict__[name.rpartition(".")[2]] = parameters[name]
            return function(*args, **kwargs)
        finally:
            for name, owner in views.items():
                owner.__dict__[name.rpartition(".")[2]] = saved[name]
    if function is layer:
        return torch.func.functional_call(layer, parameters, args, kwargs)
    parameters = {f"layer.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(_Call(layer, function), parameters, args, kwargs)


def _find_entry(owner: nn.Module, attribute: str) -> tuple[dict[str, Any], str, Any]:
    """The dict that holds an attribute of a module, the attribute, and its value."""
    for entries in (owner._parameters, owner._buffers, owner.__dict__):
        if attribute in entries:
            return entries, attribute, entries[attribute]
    return {}, attribute, None  # which `functional_call` refuses


def _put_back(layer: nn.Module, before: list[tuple[dict[str, Any], str, Any]], given: list[torch.Tensor]) -> None:
    """Puts back what given tensors replace in a layer, also under further names that share it (tied parameters)."""
    for entries, attribute, value in before:
        entries[attribute] = value
    originals = {id(tensor): value for tensor, (_, _, value) in zip(given, before, strict=True)}
    for module in layer.modules():
        for entries in (module._parameters, module._buffers):
            entries.update({name: originals[id(value)] for name, value in entries.items() if id(value) in originals})


def attribute_by(call: Callable, layer: nn.Module, name: str, computed: Collection[str]) -> Any:
    """An attribute of a layer; `call` reads the `computed` ones and the properties, and runs the methods."""
    if name in computed or isinstance(inspect.getattr_static(type(layer), name, None), property):
        return call(getattr, layer, name)
    value = getattr(layer, name)
    return partial(call, value) if inspect.ismethod(value) and value.__self__ is layer else value


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the hooks around the forward and backward pass of the one whose place it takes."""
    for kind, hooks in vars(old).items():
        if kind.startswith(("_forward_", "_backward_")) and isinstance(hooks, dict):
            vars(new)[kind].update(hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run a graph of `torch.compile`, which keeps the hooks that it was traced with."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside the wrappers that `torch.compile`, data parallelism and PEFT put around it.

    Raises a TypeError for what is no module.
    """
    check_module(model)
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # PeftModel
            inner = inner.get_base_model()
        elif hasattr(inner, "tuner_layer_cls"):  # a tuner of PEFT, or its mixed model
            inner = inner.model
        else:
            return inner
