# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Levenberg-Marquardt trains adapters."""

import pytest
import torch
from behaving import KINDS, X, net, state
from peft import get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import SlimKAN
from peft_lotra.optim import LevenbergMarquardt


XD = X.double()
Y = torch.stack([XD.prod(dim=1), XD.sum(dim=1).sin()], dim=1)


def residual(model, x, y):
    return model(x)[:, :2] - y


@pytest.mark.parametrize("train", [None, ["core"]])
@pytest.mark.parametrize("kind", ["net", "efficient-kan", "cheby-kan", "slim"])
def test_the_loss_falls_and_the_base_stays(kind, train):
    make = {**KINDS, "net": net, "slim": lambda: SlimKAN([3, 4, 2], ranks=2)}[kind]
    model = get_peft_model(make().double(), LoTRAConfig(r=2, train=train, init_weights="hosvd"))
    start, first = state(model), residual(model, XD, Y).square().sum() / len(XD)
    losses = [record.loss for record in LevenbergMarquardt(model).fit([(residual, (XD, Y))], 8, progress=False)]
    assert losses[-1] < 0.9 * first and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx((residual(model, XD, Y).square().sum() / len(XD)).item())
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if ("lotra_core" if train else "lotra_") in name}
