# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Many tasks trained at once: each method starts as its base, and trains each task as it would be trained alone."""

from __future__ import annotations

import pytest
import torch
from study_tools import stacked
from torch import nn

from peft_lotra.kan import KAN


def squared(predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (predictions[..., 0] - y).square()


def make_tasks(count: int) -> stacked.Tasks:
    x = torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.stack([torch.sin((task + 1) * rows.sum(1)) for task, rows in enumerate(x)])
    rows, targets = x[:count], y[:count]
    return stacked.Tasks((rows, targets), (rows, targets), (rows, targets), squared)


MAKERS = {
    "scale and shift": stacked.scale_and_shift,
    "last layer": stacked.last_layer,
    "copies": stacked.copies,
    "LoTRA": stacked.lotra(2),
    "from the gradient": stacked.lotra(2, gradient=True),
    "LoRA": stacked.lora(2),
}


@pytest.fixture(params=[name for name in MAKERS])
def maker(request):
    return MAKERS[request.param]


@pytest.fixture
def base(maker) -> nn.Module:
    torch.manual_seed(0)
    kan = KAN([2, 5, 1])
    is_mlp = maker is MAKERS["LoRA"]
    return (stacked.mlp_like(kan) if is_mlp else kan).requires_grad_(False)


def test_a_method_starts_as_its_base(maker, base):
    tasks = make_tasks(3)
    found = maker(base, tasks, 1e-2)(tasks.test[0])
    torch.testing.assert_close(found.detach(), base(tasks.test[0]), atol=1e-5, rtol=1e-5)


def test_a_task_among_others_is_trained_as_alone(maker, base):
    errors, start = [], []
    for count in (3, 1):
        torch.manual_seed(1)
        tasks = make_tasks(count)
        method = maker(base, tasks, 3e-2)
        if isinstance(method, stacked.Stacked):  # which draws the starts of all tasks layer by layer
            start = start or [part.detach().clone() for part in method.parameters]
            for part, first in zip(method.parameters, start, strict=True):
                part.data = first[:count].clone()
        torch.manual_seed(2)
        stacked.train(lambda *_, made=method: made, base, tasks, 3e-2, 8, 16)
        errors.append(stacked.losses_of(method, tasks, tasks.test)[0])
        if isinstance(method, stacked.Banked):
            method.bank.detach()
    torch.testing.assert_close(*errors, atol=1e-5, rtol=1e-4)
    assert errors[0].mean() < 0.97 * squared(base(tasks.test[0]), tasks.test[1])[0].mean()
