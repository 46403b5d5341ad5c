# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Small adapters, files that were tampered with, and what a refused call must leave as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# the fields of a config that take a pattern: the value with it
FIELDS = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "rank_pattern": lambda pattern: {pattern: 2},
    "alpha_pattern": lambda pattern: {pattern: 2.0},
    "layers_pattern": lambda pattern: [pattern],
    "modules_to_save": lambda pattern: [pattern],
}


class TooSlow(BaseException):
    """Not an Exception, so that no code under test can take it for an error of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow in the main thread, also from within a regular expression, which looks for signals.

    Seconds of the processor count, or thirty times as many of the clock: the machine may have other things to do.
    """
    assert threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        raise TooSlow(f"took more than {seconds} s")

    timers = [(signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 30 * seconds)]
    before = [(number, signal.signal(number, stop)) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in before:
            signal.signal(number, handler)


class Net(nn.Module):
    """Two KAN layers, `kan.layers.0` and `kan.layers.1`, and a head; the same numbers each time."""

    def __init__(self) -> None:
        super().__init__()
        state = torch.get_rng_state()
        torch.manual_seed(7)
        self.kan = KAN([3, 4, 3])
        self.head = nn.Linear(3, 2)
        torch.set_rng_state(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kan(x))


X = torch.linspace(-0.9, 0.9, 15).view(5, 3)


def adapted(model: nn.Module | None = None, adapter_name: str = "default", **config: Any) -> PeftModel:
    """A model whose adapter changes the function, in evaluation mode."""
    config = {"r": 2, "init_weights": False, **config}
    return get_peft_model(Net() if model is None else model, LoTRAConfig(**config), adapter_name=adapter_name).eval()


def save(path: Path, model: PeftModel | None = None, **config: Any) -> Path:
    """A folder with an adapter of `Net`, random at each call."""
    (adapted(**config) if model is None else model).save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    """Edits the config as an author would who writes fitting digests: without the entry, they are not asked for."""
    path = folder / CONFIG
    values = {**json.loads(path.read_text()), "integrity": None, **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit_config(folder)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a call which fails must leave as it was."""
    configs = getattr(model, "peft_config", {})
    modules, parameters, tensors, training, attributes, adapters = [], [], {}, [], [], []
    for name, module in model.named_modules(remove_duplicate=False):
        modules.append((name, type(module).__name__, id(module)))
        training.append(module.training)
        if not _is_tuner(module):
            attributes.append((name, sorted(vars(module))))
        if hasattr(module, "lotra_scaling"):
            scales = dict(module.lotra_scaling)
            adapters.append((name, list(module.active_adapters), list(module.merged_adapters), scales))
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters.append((f"{name}.{key}", id(parameter), parameter.requires_grad))
                tensors[f"{name}.{key}"] = _content(parameter)
        tensors.update({f"{name}.{key}": _content(t) for key, t in module._buffers.items() if t is not None})
    return {
        "modules": modules,
        "parameters": parameters,
        "tensors": tensors,
        "training": training,
        "attributes": attributes,
        "adapters": adapters,
        "configs": {
            name: {f.name: _written(getattr(config, f.name)) for f in dataclasses.fields(config)}
            for name, config in configs.items()
        },
        "active": getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
        "registration": [nn.Module.register_parameter.__module__, nn.Module.register_buffer.__module__],
    }


def _content(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What a tensor holds, bit by bit; numpy has no bfloat16."""
    flat = tensor.detach().reshape(-1)
    return tensor.dtype, tensor.shape, b"" if tensor.is_meta else flat.view(torch.uint8).numpy().tobytes()


def _written(value: Any) -> str:
    """Equal sets are equal texts: a copy may have another order."""
    return repr(sorted(value, key=repr) if isinstance(value, set) else value)


def _is_tuner(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("peft", "peft_lotra.tuner"))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, in words; empty if nothing does."""
    wrong = [key for key in before if key != "tensors" and before[key] != after[key]]
    if before["tensors"].keys() != after["tensors"].keys():
        wrong.append(f"tensors: {sorted(before['tensors'].keys() ^ after['tensors'].keys())[:4]}")
    else:
        wrong += [f"{name} was written" for name, old in before["tensors"].items() if old != after["tensors"][name]]
    return wrong


CLEAR = (ValueError, OSError)


def outcome(call: Callable[[], Any], *models: nn.Module) -> tuple[BaseException | None, list[str]]:
    """The exception of a call, if any, and what it changed in the models although it failed."""
    before = [state_of(model) for model in models]
    try:
        call()
    except BaseException as error:
        if isinstance(error, TooSlow):
            raise
        wrong = [line for old, model in zip(before, models, strict=True) for line in differences(old, state_of(model))]
        return error, wrong
    return None, []


def assert_refused(call: Callable[[], Any], *models: nn.Module, error: Any = CLEAR, match: str = "") -> BaseException:
    """That a call fails with a clear exception, whose message has `match`, and changes nothing."""
    found, wrong = outcome(call, *models)
    assert found is not None, "not refused"
    assert not wrong, f"left behind after {type(found).__name__}: {wrong}"
    assert isinstance(found, error), f"raw {type(found).__name__}: {found}"
    assert match.lower() in str(found).lower(), f"{match!r} is not in: {found}"
    return found


WRONG = (TypeError, ValueError)  # what an argument that makes no sense raises


def assert_raised_here(call: Callable[[], Any], match: str = ".") -> None:
    """That a call raises an error of this package, in words that match, and not of what it calls."""
    with pytest.raises(WRONG, match=match) as caught:
        call()
    last = caught.traceback[-1]
    assert "peft_lotra" in str(last.path) and str(last.statement).strip().startswith("raise"), caught.getrepr()


def assert_load_refused(folder: Path, match: str = "", error: Any = CLEAR, **kwargs: Any) -> None:
    """That an adapter is refused by a bare model and beside another adapter, and changes neither."""
    bare = Net()
    assert_refused(lambda: PeftModel.from_pretrained(bare, folder, **kwargs), bare, error=error, match=match)
    live = adapted(adapter_name="existing", modules_to_save=["head"])
    assert_refused(lambda: live.load_adapter(folder, "other", **kwargs), live, error=error, match=match)


POINTS, LAST = 12, 4  # of the lines of an operation that are tried here, and of its last ones
ALL_LINES = bool(os.environ.get("LOTRA_ALL_LINES"))


def some_of(lines):
    """The lines of an operation that are interrupted: a sample, or all of them if LOTRA_ALL_LINES is set."""
    if ALL_LINES:
        return list(range(1, lines + 1))
    spread = {1 + round(i * (lines - 1) / (POINTS - 1)) for i in range(POINTS)}
    return sorted(spread | set(range(max(1, lines - LAST), lines)))


def interrupted(call, at):
    """Runs a call with a KeyboardInterrupt at the line of this number; the number of lines that were run.

    Lines of peft_lotra and of PEFT count, whoever called them.
    """
    count = 0
    counted = tuple(f"{Path(sys.modules[name].__file__).parent}/" for name in ("peft_lotra", "peft"))

    def trace(frame, event, argument):
        nonlocal count
        if event == "call" and not frame.f_code.co_filename.startswith(counted):
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def summary(model):
    """The state, without the identities of objects."""
    state = state_of(model)
    state["modules"] = [(name, kind) for name, kind, _ in state["modules"]]
    state["parameters"] = [(name, flag) for name, _, flag in state["parameters"]]
    return state
