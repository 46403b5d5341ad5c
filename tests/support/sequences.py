# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Random sequences of operations on adapters, compared with the same operations on a dense model.

The dense model has the effective coefficients of each layer in float64, base + sum of scale * update. It uses no
Tucker components, no merging in place, and no PEFT. The tests run forty sequences. More of them, with a report:

    PYTHONPATH=. python tests/support/sequences.py --count 2000 --output examples/results/fuzz_sequences.json
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from helpers import lotra_layers
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import LoTRAConfig, save_adapter
from peft_lotra.families.registry import get_kan_spec


# pykan returns a tuple, flashkan compiles
SEQUENCE_FAMILIES = [name for name in FAMILIES if name not in ("pykan", "flashkan")]
OPERATIONS = (
    "add",
    "set",
    "disable",
    "enable",
    "merge",
    "unmerge",
    "scale",
    "delete",
    "save",
    "load",
    "mixed",
    "copy",
)

# largest difference from the float64 reference, relative to the largest output; bfloat16 has three digits
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1}


@dataclass
class Reference:
    """The dense model: a bare network, and updates (out, in, basis + 1) by adapter and layer."""

    network: nn.Module
    updates: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    active: str = ""
    disabled: bool = False
    # by layer; one that has none of the merged adapters goes on with the active one, as with PEFT's other methods
    merged: dict[str, torch.Tensor] = field(default_factory=dict)

    def merge(self, adapters: list[str]) -> None:
        for adapter in adapters:
            for name, update in self.updates[adapter].items():
                self.merged[name] = self.merged.get(name, 0) + self.scales[adapter] * update

    def __call__(self, x: torch.Tensor, adapter: str | None = None) -> torch.Tensor:
        """The output, in float64; of a named adapter, or `"__base__"`, instead of those in force."""
        if adapter is None and self.disabled:
            self.merged = {}  # a forward pass that is disabled unmerges
        in_force = {} if adapter == "__base__" or (adapter is None and self.disabled) else {adapter or self.active}
        updates = {n: self.scales[a] * update for a in in_force for n, update in self.updates[a].items()}
        updates |= self.merged if adapter is None else {}
        network = copy.deepcopy(self.network).double()
        with torch.no_grad():
            for name, update in updates.items():
                layer = network.get_submodule(name)
                for parameter, part in get_kan_spec(layer).locate(layer).split(update).items():
                    layer.get_parameter(parameter).add_(part)
            return network(x.double())


def dense_updates(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The unscaled updates of an adapter, by einsum from its components as they are stored."""
    updates = {}
    for name, layer in lotra_layers(model.base_model.model).items():
        if adapter in layer.lotra_core:
            core, out, in_, basis = (part.detach().double() for part in layer.get_components(adapter))
            update = torch.einsum("abc,oa,ib,kc->oik", core, out, in_, basis)
            missing = layer.lotra_tensor.shape[2] + layer.lotra_tensor.has_residual - update.shape[2]
            updates[name] = nn.functional.pad(update, (0, missing))  # a residual branch that is not adapted
    return updates


def run_sequence(seed: int, length: int = 12) -> list[str]:
    """Runs `length` random operations and compares the outputs after each operation.

    Returns:
        The operations.

    Raises:
        AssertionError: The outputs differ from those of the reference.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16])
    families = [rng.choice(SEQUENCE_FAMILIES) for _ in range(2)]
    if dtype == torch.bfloat16 and {"fast-kan", "faster-kan"} & set(families):
        dtype = torch.float32  # their layer norms make any rounding of bfloat16 as large as the output
    widths = [rng.randint(2, 5) for _ in range(3)]
    network = nn.Sequential(*(FAMILIES[f](*widths[i : i + 2]) for i, f in enumerate(families))).to(dtype)
    reference = Reference(copy.deepcopy(network))
    x = (torch.rand(6, widths[0]) * 1.2 - 0.6).to(dtype)

    def config() -> LoTRAConfig:
        return LoTRAConfig(
            r=rng.choice([1, 2, 5, (1, 2, 3), (3, 1, 2)]),
            alpha=rng.choice([0.1, 0.3]),
            rank_pattern=rng.choice([{}, {"0": 1}, {"1": (2, 1, 1)}]),
            alpha_pattern=rng.choice([{}, {"1": 0.2}]),
            target_modules=rng.choice([None, None, ["0"], ["1"], r"[01]"]),
            adapt_residual=rng.random() < 0.7,
            init_weights=False,
        )

    def learn(name: str) -> None:
        # an alpha of its own per layer counts as part of the update
        layers = lotra_layers(model.base_model.model)
        reference.updates[name] = {
            layer: layers[layer].lotra_alpha[name] * update for layer, update in dense_updates(model, name).items()
        }
        reference.scales[name], reference.merged = 1.0, {}  # PEFT unmerges before it adds an adapter

    def check(y: torch.Tensor, expected: torch.Tensor) -> None:
        size = expected.abs().max().clamp(min=1e-3)
        worst = ((y.double() - expected).abs().max() / size).item()
        assert worst <= TOLERANCE[dtype], f"seed {seed}, {dtype}, {families}: {done}: differs by {worst:.1e}"

    done: list[str] = []
    count = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = get_peft_model(network, config(), adapter_name="a0").eval()
        learn("a0")
        reference.active = "a0"
        saved: dict[str, str] = {}
        copies: dict[str, dict[str, torch.Tensor]] = {}
        while len(done) < length:
            operation = rng.choice(OPERATIONS)
            names = list(reference.updates)
            name = rng.choice(names)
            if operation == "add":
                count += 1
                model.add_adapter(f"a{count}", config())
                learn(f"a{count}")
            elif operation == "set" and not reference.disabled:
                model.set_adapter(name)
                reference.active, reference.merged = name, {}  # PEFT unmerges first, and says so
            elif operation in ("disable", "enable"):
                reference.disabled = operation == "disable"
                (
                    model.base_model.disable_adapter_layers
                    if reference.disabled
                    else model.base_model.enable_adapter_layers
                )()
            elif operation == "merge" and not reference.merged and not reference.disabled:
                chosen = rng.sample(names, rng.randint(1, len(names)))
                model.merge_adapter(chosen, safe_merge=rng.random() < 0.5, keep_base=rng.random() < 0.8)
                reference.merge(chosen)
            elif operation == "unmerge" and reference.merged:
                model.unmerge_adapter()
                reference.merged = {}
            elif operation == "scale":
                scale = rng.choice([0.0, 0.5, 2.0])
                for layer in lotra_layers(model).values():
                    layer.set_scale(name, scale)
                reference.scales[name] = scale
            elif operation == "delete" and len(names) > 1 and name != reference.active and not reference.merged:
                model.delete_adapter(name)
                del reference.updates[name], reference.scales[name]
            elif operation == "save":
                path = str(Path(folder) / rng.choice(["x", "y"]))  # also over another adapter
                save = save_adapter if rng.random() < 0.5 else PeftModel.save_pretrained
                save(model, path, selected_adapters=[name])
                saved[path] = name
                copies[path] = reference.updates[name]
            elif operation == "load" and saved:
                path = rng.choice(list(saved))
                count += 1
                model.load_adapter(str(Path(path) / saved[path]), f"a{count}", low_cpu_mem_usage=rng.random() < 0.5)
                reference.updates[f"a{count}"], reference.scales[f"a{count}"] = copies[path], 1.0
                reference.merged = {}
            elif operation == "mixed" and not reference.merged and not reference.disabled:
                batch = [rng.choice([*names, "__base__"]) for _ in range(len(x))]
                rows = [reference(x, adapter=n)[i] for i, n in enumerate(batch)]
                done.append(f"mixed {batch}")
                check(model(x, adapter_names=batch), torch.stack(rows))
                continue
            elif operation == "copy":
                model = copy.deepcopy(model)
            else:
                continue
            done.append(f"{operation} {name}")
            check(model(x), reference(x))
        # the base is unchanged
        if reference.merged:
            model.unmerge_adapter()
            reference.merged = {}
        bare = model.unload()
        check(bare(x), reference(x, adapter="__base__"))
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    operations, wrong = Counter(), []
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        try:
            operations.update(entry.split()[0] for entry in run_sequence(seed))
        except Exception as error:
            wrong.append({"seed": seed, "error": repr(error)[:500]})
    report = {
        "sequences": arguments.count,
        "first seed": arguments.seed,
        "wrong": wrong,
        "operations": dict(operations),
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
