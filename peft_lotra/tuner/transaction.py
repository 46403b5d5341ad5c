# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A call that changes a model is done as a whole or not at all: an error, or Ctrl-C, leaves the model as it was."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from itertools import chain
from typing import Any
from weakref import WeakMethod, finalize, ref

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..modules.calls import modules_of
from ..modules.locks import IN_PROGRESS, LayerLock
from .merging import MergeableLayer, all_or_nothing


_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_REGISTRATION = ("register_parameter", "register_buffer")  # which PEFT exchanges while it makes empty adapters
_WITH_ADAPTERS = (BaseTunerLayer, AuxiliaryTrainingWrapper, BaseTuner, PeftModel, PeftMixedModel)


def is_switched(module: nn.Module) -> bool:
    """Whether setting, disabling, merging and unmerging adapters changes attributes of a module."""
    return isinstance(module, _WITH_ADAPTERS) or "running_mean" in module._buffers  # see `NormStatsTuner`


class _Thread(threading.local):
    # the innermost transaction; weak: an interruption at its end must not keep it
    change: Callable[[], transaction | None] = staticmethod(lambda: None)


_thread = _Thread()


class transaction:
    """Puts a model back as it was, with these of its tensors, if what is done within is not finished.

    The attributes of all modules are restored, with the contents of dicts, lists and sets, and which parameters
    require a gradient. Merges of LoTRA layers are undone. Contents of other tensors are restored if they are named. A
    process that another thread forks meanwhile has the model as it was. What is made within can be trained, also
    under `torch.inference_mode`. Methods of `nn.Module` that PEFT exchanges for the time of a load are torch's again.

    Args:
        model: The model.
        tensors: Tensors that are written within. They are copied.
        objects: Other objects with attributes that change within, such as configs.
        changes: Which modules have attributes that change within; all of them by default.
        begins: Whether the transaction begins at once, or with the first change that is a part of it, see
            `is_part_of_change`. What happens before is not undone.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> try:
        ...     with transaction(model):
        ...         model[0] = nn.Tanh()
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(model[0])
        Linear(in_features=2, out_features=2, bias=True)
    """

    # A class, since an interruption at the end of the block can keep `__exit__` from being called: what is done stays
    # done then, whereas a generator would undo it as soon as it is collected.
    def __init__(
        self,
        model: nn.Module,
        tensors: Iterable[Tensor] = (),
        objects: Sequence[object] = (),
        changes: Callable[[nn.Module], bool] | None = None,
        begins: bool = True,
    ) -> None:
        self.model, self._begins = model, begins
        modules = modules_of(model)
        owners = chain(modules if changes is None else filter(changes, modules), objects)
        attributes = [(now := vars(owner), now.copy()) for owner in owners]
        contents = [
            (value, value.copy() if value else ())
            for _, old in attributes
            for value in old.values()
            if type(value) in _CONTAINERS
        ]
        self._merges = all_or_nothing()
        self._containers = [*attributes, *contents]
        parameters = (value for module in modules for value in module._parameters.values() if value is not None)
        self._flags = [(parameter, parameter.requires_grad) for parameter in parameters]
        self._values = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]
        self._registration = {name: getattr(nn.Module, name) for name in _REGISTRATION}
        self._key: object = None  # in `IN_PROGRESS`, once it has begun

    def __enter__(self) -> None:
        self._outer, _thread.change = _thread.change, ref(self)
        # what is made here is trained later; a model that was made in inference mode can only be changed in it
        leaves = torch.is_inference_mode_enabled() and not any(tensor.is_inference() for tensor, _ in self._flags)
        self._mode = torch.inference_mode(False) if leaves else nullcontext()
        self._mode.__enter__()
        if self._begins:
            self.begin()

    def begin(self) -> None:
        """Lets what is done from now on be undone."""
        if self._key is None:
            self._merges.__enter__()
            # weak: if `__exit__` is not called, a fork long after would undo what has been done since
            undo, self._key = WeakMethod(self.undo), object()
            finalize(self, IN_PROGRESS.pop, self._key, None).atexit = False
            IN_PROGRESS[self._key] = threading.get_ident(), lambda: (method := undo()) and method()

    def __exit__(self, error: type[BaseException] | None, *args: Any) -> None:
        if self._key is not None:
            if error is not None:
                self.undo()
            IN_PROGRESS.pop(self._key, None)
            self._merges.__exit__(None)
        self._mode.__exit__(None, None, None)
        _thread.change = self._outer

    def undo(self) -> None:
        """Puts back what is not as it was when the transaction began."""
        self._merges.undo()
        for now, before in self._containers:
            if isinstance(before, dict):
                _restore(now, before)
            elif list(map(id, now)) != list(map(id, before)):
                now.clear()
                (now.extend if isinstance(now, list) else now.update)(before)  # an empty dict takes ()
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
        for tensor, data, value in self._values:
            tensor.data = data
            tensor.data.copy_(value)
        for name, method in self._registration.items():
            # interrupted in its last line, PEFT leaves its own, which puts all modules of the process on "meta"
            if getattr(nn.Module, name) is not method and method.__module__ == nn.Module.__module__:
                setattr(nn.Module, name, method)


def _restore(now: dict, before: dict) -> None:
    """Restores a dict, entry by entry: other threads may read what has not changed."""
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value
    if list(now) != list(before):
        now.clear()
        now.update(before)


def base_parameters(model: nn.Module, merged_only: bool) -> Iterator[nn.Parameter]:
    """The parameters of the base that merging, or, with `merged_only`, unmerging writes in layers of other methods.

    Those of LoTRA undo their merges themselves, see `all_or_nothing`.
    """
    for module in modules_of(model):
        if not isinstance(module, BaseTunerLayer) or isinstance(module, MergeableLayer):
            continue
        if module.merged or not merged_only:
            yield from module.get_base_layer().parameters()


def is_part_of_change(*models: nn.Module) -> bool:
    """Whether this thread is changing one of these models already; that change then undoes all of it."""
    outer = _thread.change()
    if outer is None or all(outer.model is not model for model in models):
        return False
    outer.begin()
    return True


def creation(model: nn.Module, configs: Sequence[PeftConfig]) -> AbstractContextManager[None]:
    """A transaction in which a model is wrapped, unless it is a part of another change."""
    return nullcontext() if is_part_of_change(model) else transaction(model, objects=configs)


def whole(method: Callable, changes: Callable[[nn.Module], bool] | None = None, merges: bool = False) -> Callable:
    """Makes a method of a tuner one that is done as a whole or not at all, one at a time.

    Args:
        method: The method.
        changes: Which modules have attributes that it changes; all of them by default.
        merges: Whether it merges.
    """

    @wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        lock = change_lock(self).held
        # a part of another change, which is undone as a whole
        if lock._is_owned():  # pyright: ignore[reportAttributeAccessIssue]
            return method(self, *args, **kwargs)
        with lock, transaction(self, base_parameters(self, merged_only=not merges), changes=changes):
            return method(self, *args, **kwargs)

    return run


def change_lock(tuner: nn.Module) -> LayerLock:
    """The lock that lets one thread at a time change a model.

    Without it, a load that fails would undo what other threads have loaded since it began. The forward pass does not
    take it, and goes on beside a load.
    """
    return vars(tuner).get("_change_lock") or vars(tuner).setdefault("_change_lock", LayerLock())


def configs_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[PeftConfig]:
    """The configs among the arguments of a call, which adding an adapter completes."""
    values = [*args, *kwargs.values()]
    values += chain.from_iterable(value.values() for value in values if isinstance(value, dict))
    return [value for value in values if isinstance(value, PeftConfig)]
