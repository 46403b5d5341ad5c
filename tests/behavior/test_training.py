# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training by first-order optimizers changes the active adapter and nothing else."""

import pytest
import torch
from helpers import KINDS, X, adapt, assert_equal, assert_near, net, state
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig, create_lotra_optimizer


Y = torch.stack([X.prod(dim=1), X.sum(dim=1).sin()], dim=1)


def changed(model, before):
    """The names of the tensors that changed."""
    return {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}


def train(model, steps=3, optimizer_cls=torch.optim.AdamW):
    """The losses of some steps."""
    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(X)[:, :2], Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "pykan", "fast-kan"])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_the_loss_falls_and_the_base_stays(kind, optimizer_cls):
    base = KINDS[kind]()
    base_state = state(base)
    model = get_peft_model(base, LoTRAConfig(r=2))
    start = state(model)

    losses = train(model, 30, optimizer_cls)

    assert losses[-1] < 0.999 * losses[0]
    assert changed(model, start) == {name for name in start if "lotra_" in name}
    assert_equal(state(model.unload()), base_state)


def test_only_the_active_adapter_and_its_modules_are_trained():
    model = get_peft_model(net(), LoTRAConfig(r=2))
    model.add_adapter("other", LoTRAConfig(r=2, modules_to_save=["head"]))
    model.set_adapter("other")
    start = state(model)

    train(model)

    of_the_adapter = {name for name in start if "lotra_" in name and name.endswith(".other")}
    of_the_head = {name for name in start if "head.modules_to_save.other" in name}
    assert changed(model, start) == of_the_adapter | of_the_head


def gradients(run):
    torch.manual_seed(1)
    model = adapt().train()
    run(model).float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_keeps_the_gradients():
    expected = gradients(lambda model: model(X))

    assert len(expected) == 7
    assert_equal(gradients(lambda model: checkpoint(model, X, use_reentrant=False)), expected)


def test_autocast_keeps_the_gradients_to_its_precision():
    expected = gradients(lambda model: model(X))

    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(lambda model: model(X))

    for name, gradient in expected.items():
        assert_near(rounded[name], gradient, 0.3)
