# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Forked processes, threads that are stopped in the middle of something, and what a model must be in a child."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn


SECONDS = 30  # for a child, which takes milliseconds


def in_child(check: Callable[[], object]) -> None:
    """Runs a check in a forked process; fails with its traceback, or if it hangs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            check()
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(0)
    os.close(write)
    end = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    with os.fdopen(read) as file:
        if error := file.read():
            pytest.fail(f"in the child: {error}")


class Gate:
    """Stops the first thread of this process that passes, until it is opened."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.reached, self.opened = threading.Event(), threading.Event()

    def __deepcopy__(self, memo: dict) -> Gate:
        return self

    def pass_through(self, *args: object, **kwargs: object) -> None:
        if os.getpid() == self.process and not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(SECONDS)


@contextmanager
def stopped_within(function: Callable[[], object], gate: Gate) -> Iterator[None]:
    """Another thread is in the middle of the function, at the gate."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert gate.reached.wait(SECONDS), errors
        yield
    finally:
        gate.opened.set()
        thread.join(SECONDS)
    assert not errors and not thread.is_alive()


def describe(model: nn.Module) -> dict[str, object]:
    """What a child must find as it is in its parent between calls."""
    return {
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "data": {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "modules": {name: (id(module), module.training) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "methods": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "adapters": sorted(getattr(model, "peft_config", {})),
    }
