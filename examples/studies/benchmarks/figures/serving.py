# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""(d) Saving, loading, merging and swapping adapters, and inference before and after a merge."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from figures.measure import Parts, interleave
from figures.subjects import METHODS, make_kan, random_inputs


def cells(quick: bool) -> list[dict]:
    """Widths of the own KAN that is adapted, and the batch of its inference."""
    if quick:
        return [{"widths": [2, 8, 1], "batch": 16}]
    return [{"widths": [2, 16, 16, 1], "batch": 2000}, {"widths": [256, 256, 256, 256], "batch": 1024}]


def measure(cell: dict, device: torch.device, quick: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        base = make_kan("own KAN", cell["widths"], device).eval()
        x = random_inputs(cell["batch"], cell["widths"][0], device).detach()
        # the base once more, since the difference of two equal models is the noise of the measurement
        models = {"base": base, "base again": copy.deepcopy(base)}
        subjects = {"whole model": whole_model(base, Path(folder) / "whole.safetensors")}
        for name in ("LoTRA", "PEFT LoRA"):
            model = METHODS[name](copy.deepcopy(base)).eval()
            subjects[name] = adapter(model, base, Path(folder) / name)
            models[f"{name}, not merged"] = copy.deepcopy(model)
            models[f"{name}, merged"] = copy.deepcopy(model).merge_and_unload()
        subjects |= {f"inference: {name}": {"forward": _forward(model, x)} for name, model in models.items()}
        result = interleave(subjects, device, 0.1 if quick else 4.0)
        files = {"LoTRA": "LoTRA/adapter_model.safetensors", "PEFT LoRA": "PEFT LoRA/adapter_model.safetensors"}
        sizes = {name: (Path(folder) / file).stat().st_size for name, file in files.items()}
        return result | {"bytes": sizes | {"whole model": (Path(folder) / "whole.safetensors").stat().st_size}}


def whole_model(base: nn.Module, file: Path) -> Parts:
    """A whole fine-tuned model instead of an adapter: saved, and loaded into an existing model."""
    model = copy.deepcopy(base)
    return {
        "save": lambda: save_file(model.state_dict(), file),
        "load": lambda: model.load_state_dict(load_file(file, device=str(next(model.parameters()).device))),
    }


def adapter(model: PeftModel, base: nn.Module, folder: Path) -> Parts:
    """An adapter from a file into a fresh base and out of it again, and a swap with a second one."""
    config = copy.deepcopy(model.peft_config["default"])
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True
    model.add_adapter("second", config)
    state = {}

    def load() -> None:
        state["loaded"] = PeftModel.from_pretrained(state.pop("fresh"), folder)

    return {
        "save": lambda: model.save_pretrained(folder, selected_adapters=["default"]),
        "_fresh": lambda: state.update(fresh=copy.deepcopy(base)),
        "load": load,
        "merge and unload": lambda: state.pop("loaded").merge_and_unload(),
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "swap": lambda: model.set_adapter("second"),
        "_back": lambda: model.set_adapter("default"),
    }


def _forward(model: nn.Module, x: torch.Tensor):
    def forward() -> None:
        with torch.no_grad():
            model(x)

    return forward
