# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A trained KAN is compressed into Tucker form by what it computes on data.

Then it is fine-tuned, and made dense again.
"""

import argparse

import torch

from peft_lotra import slim
from peft_lotra.kan import KAN


def target(x: torch.Tensor) -> torch.Tensor:
    waves = (torch.pi * x[:, :2]).sin().mean(1, keepdim=True)
    return torch.exp(waves + (x[:, 2:] ** 2).mean(1, keepdim=True)) / 2


def train(model: torch.nn.Module, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.rand(256, 4) * 2 - 1
        loss = torch.nn.functional.mse_loss(model(x), target(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def error(model: torch.nn.Module) -> str:
    with torch.no_grad():
        return f"{100 * (model(x) - target(x)).std() / target(x).std():.2f} %"


NOTES = """Needs nothing beside the package; takes 15 seconds on one core;
writes nothing."""
argparse.ArgumentParser(
    usage=argparse.SUPPRESS, description=__doc__, epilog=NOTES
).parse_args()

torch.set_num_threads(1)  # more threads slow down networks this small
torch.manual_seed(0)
x = torch.rand(2000, 4) * 2 - 1
trained = KAN([4, 32, 32, 1])
train(trained, steps=800, lr=1e-2)
print(
    f"dense: {sum(p.numel() for p in trained.parameters()):,} parameters, "
    f"error {error(trained)}"
)

# the share of the outputs' energy that is kept
small = slim(trained, energy=0.99, inputs=x[:1000])
print(f"{small.slim_report}\nSlim: error {error(small)}")
train(small, steps=600, lr=5e-3)
print(f"after 600 more steps: error {error(small)}")
dense = small.to_dense()  # the original class again
print(f"as a dense {type(dense).__name__}: error {error(dense)}")
