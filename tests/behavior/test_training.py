# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training, by Levenberg-Marquardt too, moves the adapter alone."""

import pytest
import torch
from behaving import KINDS, X, adapted, apart, net, same, state
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import SlimKAN
from peft_lotra.optim import LevenbergMarquardt


Y = torch.stack([X.prod(dim=1), X.sum(dim=1).sin()], dim=1)


def train(model, steps=3, optimizer_cls=torch.optim.AdamW):
    """The losses of some steps, and the names of what they changed."""
    optimizer, start, losses = create_lotra_optimizer(model, optimizer_cls, lr=2e-2), state(model), []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(X)[:, :2], Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name for name, tensor in state(model).items() if not torch.equal(tensor, start[name])}


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "pykan", "fast-kan"])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_the_loss_falls_and_the_base_stays(kind, optimizer_cls):
    base = KINDS[kind]()
    before, model = state(base), get_peft_model(base, LoTRAConfig(r=2))
    losses, moved = train(model, 30, optimizer_cls)
    assert losses[-1] < 0.999 * losses[0]
    assert moved == {name for name in model.state_dict() if "lotra_" in name}
    assert same(state(model.unload()), before)


def test_only_the_active_adapter_and_its_modules_are_trained():
    model = get_peft_model(net(), LoTRAConfig(r=2))
    model.add_adapter("other", LoTRAConfig(r=2, modules_to_save=["head"]))
    model.set_adapter("other")
    moved = train(model)[1]
    assert any("head.modules_to_save.other" in name for name in moved)
    assert all(name.endswith(".other") or "head.modules_to_save.other" in name for name in moved)


def gradients(run):
    torch.manual_seed(1)
    model = adapted().train()
    run(model).float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_and_autocast():
    expected = gradients(lambda model: model(X))
    assert len(expected) == 7 and same(gradients(lambda model: checkpoint(model, X, use_reentrant=False)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(lambda model: model(X))
    assert all(apart(rough[name], gradient) < 0.3 for name, gradient in expected.items())


XD, YD = X.double(), Y.double()


def residual(model, x, y):
    return model(x)[:, :2] - y


@pytest.mark.parametrize("train", [None, ["core"]])
@pytest.mark.parametrize("kind", ["net", "efficient-kan", "cheby-kan", "slim"])
def test_levenberg_marquardt(kind, train):
    make = {**KINDS, "net": net, "slim": lambda: SlimKAN([3, 4, 2], ranks=2)}[kind]
    model = get_peft_model(make().double(), LoTRAConfig(r=2, train=train, init_weights="hosvd"))
    start, first = state(model), residual(model, XD, YD).square().sum() / len(XD)
    losses = [record.loss for record in LevenbergMarquardt(model).fit([(residual, (XD, YD))], 8, progress=False)]
    assert losses[-1] < 0.9 * first and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx((residual(model, XD, YD).square().sum() / len(XD)).item())
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if ("lotra_core" if train else "lotra_") in name}
