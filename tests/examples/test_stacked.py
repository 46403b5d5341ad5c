# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Many tasks, or networks, trained at once: each starts as its base, and trains as it would alone."""

import copy

import pytest
import torch
from peft import get_peft_model
from study_tools import stacked, together
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import KAN


def squared(predictions, y):
    return (predictions[..., 0] - y).square()


def make_tasks(count):
    x = torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.stack([torch.sin((task + 1) * rows.sum(1)) for task, rows in enumerate(x)])
    rows, targets = x[:count], y[:count]
    return stacked.Tasks((rows, targets), (rows, targets), (rows, targets), squared)


MAKERS = {
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
def base(maker):
    torch.manual_seed(0)
    kan = KAN([2, 5, 1])
    is_mlp = maker is MAKERS["LoRA"]
    return (stacked.mlp_like(kan) if is_mlp else kan).requires_grad_(False)


def test_a_method_starts_as_its_base(maker, base):
    tasks = make_tasks(3)
    found = maker(base, tasks, 1e-2)(tasks.test[0])

    assert_close(found.detach(), base(tasks.test[0]), atol=1e-5, rtol=1e-5)


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

    assert_close(*errors, atol=1e-5, rtol=1e-4)
    assert errors[0].mean() < 0.97 * squared(base(tasks.test[0]), tasks.test[1])[0].mean()


def test_a_network_among_others_is_trained_as_alone():
    x, models, optimizers = torch.rand(30, 3), [], []
    data = x, torch.sin(3 * x[:, :2])
    for seed, lr in enumerate((1e-2, 3e-2, 1e-1)):
        torch.manual_seed(seed)
        models.append(get_peft_model(KAN([3, 4, 2]), LoTRAConfig(r=2)))
        optimizers.append(create_lotra_optimizer(models[-1], torch.optim.Adam, lr=lr))
    alone = copy.deepcopy(models[1])
    optimizer = create_lotra_optimizer(alone, torch.optim.Adam, lr=3e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    draws = [together.draw(data, 20, rows=8) for _ in models]
    losses = together.train(models, optimizers, together.batches([data] * 3, draws), F.mse_loss, 20)
    for step, rows in enumerate(draws[1]):
        loss = F.mse_loss(alone(data[0][rows]), data[1][rows])
        assert_close(losses[step, 1], loss.detach(), atol=1e-5, rtol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    assert_close(models[1](data[0]), alone(data[0]), atol=1e-4, rtol=1e-3)
    assert losses[-3:, 1].mean() < 0.9 * losses[:3, 1].mean()
