# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One process of a group that `test_distributed.py` starts: python distributed_worker.py results.json

Trains an adapted model for one step under each kind of data parallelism, and writes its distance from the plain model
after the same step on the whole batch.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from process_groups import run_worker
from stand_ins import FAMILIES
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from peft_lotra import LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN


def own() -> nn.Module:
    return KAN([3, 8, 8, 2])


def efficient_kan() -> nn.Module:
    return nn.Sequential(*(FAMILIES["efficient-kan"](*sizes) for sizes in ((3, 8), (8, 2))))


NETWORKS = {"own": own, "efficient-kan": efficient_kan}


def make(network: str) -> PeftModel:
    base = NETWORKS[network]().double()
    torch.manual_seed(0)
    for parameter in base.parameters():  # the least squares of efficient-kan's start differ
        nn.init.normal_(parameter, std=0.3)  # between processes in the last bits
    return get_peft_model(base, LoTRAConfig(r=(2, 3, 4), init_weights=False))


def fsdp(model: nn.Module, *wrapped: type) -> nn.Module:
    policy = ModuleWrapPolicy(set(wrapped)) if wrapped else None
    return FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy
    )


def fsdp2(model: nn.Module, *sharded: type) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, sharded):
            fully_shard(module)
    return fully_shard(model)


def base_type(model: nn.Module) -> type:
    return next(type(module.base_layer) for module in model.modules() if isinstance(module, LoTRALayer))


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp": fsdp,
    "fsdp-layers": lambda model: fsdp(model, LoTRALayer),
    "fsdp2": fsdp2,
    "fsdp2-layers": lambda model: fsdp2(model, LoTRALayer),
}
# these kinds shard the base layer without its adapters
WRONG_KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp": lambda model: fsdp(model, base_type(model)),
    "fsdp2": lambda model: fsdp2(model, base_type(model)),
}


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of the tensor; infinite if the names differ."""
    if actual.keys() != expected.keys():
        return float("inf")
    return max(
        ((actual[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)).item()
        for name, value in expected.items()
    )


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(8, 3, dtype=torch.float64) * 1.6 - 0.8, torch.randn(8, 2, dtype=torch.float64)


def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The outputs of a step, after which the parameters tell their gradients; weight decay moves what is trainable."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    y = model(x)
    (y - target).square().mean().backward()
    optimizer.step()
    return y.detach()


def run(network: str, kind: str, rank: int, world: int) -> dict[str, Any]:
    x, target = batch()
    mine = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    plain = make(network)
    model = copy.deepcopy(plain)
    loaded = copy.deepcopy(plain)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    y = step(plain, x, target)
    assert all(parameter.grad.any() for parameter in plain.parameters() if parameter.requires_grad)

    model = KINDS[kind](model)
    my_y = step(model, x[mine], target[mine])
    inner = model.module if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)) else model
    # as accelerate's get_state_dict, but on all ranks: torch 2.13 crashes when FSDP gathers CPU tensors on one alone
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = plain.state_dict()
    trained = {name for name in expected if "lotra_" in name}
    saved = get_peft_model_state_dict(inner, state_dict=state)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "lotra_" in name:
                parameter.zero_()
    set_peft_model_state_dict(loaded, saved)
    return {
        "output": distance({"y": my_y}, {"y": y[mine]}),
        "state": distance(state, expected),
        "frozen parameters moved": [n for n in before if n not in trained and not torch.equal(state[n], before[n])],
        "trained parameters not moved": [n for n in trained if torch.equal(state[n], before[n])],
        "saved": distance(saved, get_peft_model_state_dict(plain)),
        "loaded": distance({"y": loaded(x)}, {"y": plain(x)}),
    }


def run_wrong(network: str, kind: str) -> list[str]:
    """The name and text of the error of a forward pass if the base layer is sharded without its adapters."""
    model = WRONG_KINDS[kind](make(network))
    try:
        model(batch()[0])
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def results(rank: int, world: int) -> dict[str, Any]:
    found = {f"{network} {kind}": run(network, kind, rank, world) for network in NETWORKS for kind in KINDS}
    wrong = {f"{network} {kind}": run_wrong(network, kind) for network in NETWORKS for kind in WRONG_KINDS}
    return {"results": found, "wrong": wrong}


if __name__ == "__main__":
    run_worker(results)
