# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Writes the adapters of this folder, by the version of peft_lotra that is first on the path.

They are those of commit c2f4d8a, the last one before the package was split into wings; with that commit checked out
in ../old:

    PYTHONPATH=../old:tests/support python tests/legacy/make.py

A folder per case of `legacy_cases.CASES`: the base model, what PEFT saves of the adapter, and `outputs.safetensors`
with `inputs`, and the outputs of the base model and of the adapted, merged and unloaded ones. It is not run
again: files of a newer version would show nothing.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import torch
from legacy_cases import BASE, CASES, IO, PRETRAINED, Case, saved_base
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_lotra import LoTRAConfig, preprocess_lotra
from peft_lotra.kan import KANModel


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model(x)
    return (y if isinstance(y, torch.Tensor) else y.logits).contiguous()


def adapt(case: Case, model: nn.Module, x: torch.Tensor) -> PeftModel:
    """Random components; for a gradient start three steps of training, since it leaves the outputs as they are."""
    config = LoTRAConfig(**{"r": (2, 2, 3), "alpha": 1.5, "init_weights": False, **case.config})
    target = torch.randn_like(x[:, :2])
    if config.init_weights == "gradient":
        preprocess_lotra(model, config, lambda: (model(x) - target).square().mean().backward())
    adapted = get_peft_model(model, config).eval()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3 if config.init_weights == "gradient" or config.modules_to_save else 0):
        optimizer.zero_grad()
        (adapted(x) - target).square().mean().backward()
        optimizer.step()
    return adapted


def make(name: str, case: Case) -> None:
    torch.manual_seed(0)
    folder = Path(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = case.blank()
    if isinstance(model, KANModel):
        model.save_pretrained(folder / PRETRAINED)
    else:
        save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, folder / BASE)

    base = saved_base(name, Path())
    x = (torch.rand(6, 3) * 1.8 - 0.9).to(case.dtype)
    found = {"inputs": x, "base": output(base, x)}
    adapted = adapt(case, base, x)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    found["adapted"] = output(adapted, x)
    found["merged"] = output(copy.deepcopy(adapted).merge_and_unload(), x)
    found["unloaded"] = output(copy.deepcopy(adapted).unload(), x)
    assert not torch.equal(found["adapted"], found["base"])
    save_file(found, folder / IO)


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)  # the paths in the files are relative to this folder
    torch.set_num_threads(1)
    for name, case in CASES.items():
        make(name, case)
