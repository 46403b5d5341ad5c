# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modules and their modes, calls of layers with other parameters, and the network inside of wrappers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dis import get_instructions
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


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
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def read_at_rest(model: nn.Module) -> Iterator[None]:
    """Lets parametrizations be read as in evaluation mode: in training, each read of some changes their buffers
    (`spectral_norm`)."""
    lists = [module for module in modules_of(model) if isinstance(module, ParametrizationList)]
    training = [module for parametrizations in lists for module in modules_of(parametrizations) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def freeze_norms(model: nn.Module) -> None:
    """Puts norms with running statistics into evaluation mode, but those that PEFT's `modules_to_save` trains."""
    modules = [module for module in modules_of(model) if not isinstance(module, torch.jit.ScriptModule)]
    saved: set[nn.Module] = set()
    for module in modules:
        if isinstance(copies := module._modules.get("modules_to_save"), nn.ModuleDict):
            saved.update(copies.modules())
    for module in modules:
        if module.training and module not in saved and module._buffers.get("running_mean") is not None:
            module.training = False


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


class LayerLock:
    """A re-entrant lock around temporary parameter swaps; a copied, or unpickled, layer gets a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *args: Any) -> None:
        self._lock.release()

    def __reduce__(self):
        return LayerLock, ()


class _Call(nn.Module):
    """A function called as a module, so that `functional_call` can exchange the parameters of `layer` around it."""

    def __init__(self, layer: nn.Module, function: Callable):
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _Settled(nn.Module):
    """Passes over the assignment of a parameter to itself, e.g. `self.w = nn.Parameter(self.w.to(x.device))`.

    It would take the place of the tensor that was put in, without its graph.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        now = self._parameters.get(name)
        if now is None or not isinstance(value, torch.Tensor) or not _is_same(value, now):
            super().__setattr__(name, value)


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    try:
        return first is second or first.is_set_to(second)
    except RuntimeError:  # on the meta device, or in `vmap`
        return False


@lru_cache(maxsize=256)
def settled(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class, settled if one of its methods, besides the constructor, assigns one of these parameters."""
    methods = [m for base in cls.__mro__[: cls.__mro__.index(nn.Module)] for m in vars(base).values()]
    functions = [inspect.unwrap(m) for m in methods if inspect.isfunction(m) and m.__name__ != "__init__"]
    codes = [function.__code__ for function in functions if inspect.isfunction(function)]
    assigned = {step.argval for code in codes for step in get_instructions(code) if step.opname == "STORE_ATTR"}
    if issubclass(cls, _Settled) or assigned.isdisjoint(names):
        return cls
    return type(cls.__name__, (_Settled, cls), {"__module__": cls.__module__})


@contextmanager
def _all_settled(modules: Collection[nn.Module]) -> Iterator[None]:
    before = [(module, type(module)) for module in modules]
    try:
        for module, cls in before:
            if (new := settled(cls, tuple(module._parameters))) is not cls:
                module.__class__ = new
        yield
    finally:
        for module, cls in before:
            if type(module) is not cls:
                module.__class__ = cls


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
    module = layer
    if function is not layer:
        module, parameters = _Call(layer, function), {f"layer.{name}": value for name, value in parameters.items()}
    with nullcontext() if torch.compiler.is_compiling() else _all_settled(owners.values()):
        return torch.func.functional_call(module, parameters, args, kwargs)


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
