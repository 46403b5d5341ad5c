# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A warning of adapters that the first backward pass does not reach, which are not trained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn


def watch_first_backward(cores: Mapping[str, nn.Parameter]) -> None:
    """Warns once, after the first backward pass that reaches one of the adapters, of those that it does not reach.

    `cores` are the cores of an adapter by layer. Those that require no gradient are left out.
    """
    trained = {name: core for name, core in cores.items() if core.requires_grad and core.is_leaf}
    if len(trained) > 1:
        _FirstBackward(trained)


class _FirstBackward:
    """Hooks on cores, which remove themselves after the first pass: a forward pass, and later steps, cost nothing."""

    def __init__(self, cores: Mapping[str, nn.Parameter]) -> None:
        self.cores = {name: ref(core) for name, core in cores.items()}
        self.is_queued = False
        self.handles = [core.register_post_accumulate_grad_hook(self._reached) for core in cores.values()]

    def _reached(self, core: torch.Tensor) -> None:
        if not self.is_queued:
            self.is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # pyright: ignore

    def _finish(self) -> None:
        self.is_queued = False
        if _is_within_another_pass():
            return
        for handle in self.handles:
            handle.remove()
        cores = {name: core for name, known in self.cores.items() if (core := known()) is not None}
        missed = [name for name, core in cores.items() if core.requires_grad and core.grad is None]
        if missed:
            warnings.warn(
                f"The first backward pass brought no gradient to the adapters of {', '.join(missed)}: the loss does "
                "not depend on these layers, which stay as they are. Are they called, and is nothing detached? Leave "
                "layers that are not to be trained out by `exclude_modules`.",
                stacklevel=2,
            )


def _is_within_another_pass() -> bool:
    """Whether a backward pass is that of a re-entrant checkpoint, which reaches a part of the layers."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(("torch/utils/checkpoint.py", "torch\\utils\\checkpoint.py")):
            return True
        frame = frame.f_back
    return False
