# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Data parallelism over one and two processes on the CPU.

Each process runs this file, `python test_distributed.py results.json`: it trains an adapted model for one step under
each kind of data parallelism, and writes its distance from the plain model after the same step on the whole batch.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from process_groups import run_worker, start_group
from stand_ins import LAYER_KINDS
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from peft_lotra import LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN


pytestmark = pytest.mark.slow

NETWORKS = {
    "own": lambda: KAN([3, 8, 8, 2]),
    "efficient-kan": lambda: nn.Sequential(LAYER_KINDS["efficient-kan"](3, 8), LAYER_KINDS["efficient-kan"](8, 2)),
}


def make(network):
    base = NETWORKS[network]().double()
    torch.manual_seed(0)
    for parameter in base.parameters():  # the least squares of efficient-kan's start differ
        nn.init.normal_(parameter, std=0.3)  # between processes in the last bits
    return get_peft_model(base, LoTRAConfig(r=(2, 3, 4), init_weights=False))


def fsdp(model, *wrapped):
    policy = ModuleWrapPolicy(set(wrapped)) if wrapped else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu, auto_wrap_policy=policy)


def fsdp2(model, *sharded):
    for module in list(model.modules()):
        if isinstance(module, sharded):
            fully_shard(module)
    return fully_shard(model)


def base_type(model):
    return next(type(module.base_layer) for module in model.modules() if isinstance(module, LoTRALayer))


KINDS = {
    "ddp": DistributedDataParallel,
    "fsdp": fsdp,
    "fsdp-layers": lambda model: fsdp(model, LoTRALayer),
    "fsdp2": fsdp2,
    "fsdp2-layers": lambda model: fsdp2(model, LoTRALayer),
}
# these kinds shard the base layer without its adapters
WRONG_KINDS = {
    "fsdp": lambda model: fsdp(model, base_type(model)),
    "fsdp2": lambda model: fsdp2(model, base_type(model)),
}


# What each process runs


def distance(actual, expected):
    """The largest difference, relative to the largest value of the tensor; infinite if the names differ."""
    if actual.keys() != expected.keys():
        return float("inf")
    distances = []
    for name, value in expected.items():
        size = value.abs().max().clamp_min(1e-3)
        distances.append(((actual[name] - value).abs().max() / size).item())
    return max(distances)


def draw_batch():
    torch.manual_seed(1)
    return torch.rand(8, 3, dtype=torch.float64) * 1.6 - 0.8, torch.randn(8, 2, dtype=torch.float64)


def take_step(model, x, target):
    """The outputs of a step, after which the parameters tell their gradients; weight decay moves what is trainable."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    y = model(x)
    (y - target).square().mean().backward()
    optimizer.step()
    return y.detach()


def compare_with_plain(network, kind, rank, world):
    x, target = draw_batch()
    shard = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    plain = make(network)
    model = copy.deepcopy(plain)
    loaded = copy.deepcopy(plain)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    y = take_step(plain, x, target)
    assert all(parameter.grad.any() for parameter in plain.parameters() if parameter.requires_grad)

    model = KINDS[kind](model)
    shard_y = take_step(model, x[shard], target[shard])
    inner = model.module if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)) else model
    # as accelerate's get_state_dict, but on all ranks: torch 2.13 crashes when FSDP gathers CPU tensors on one alone
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    saved = get_peft_model_state_dict(inner, state_dict=state)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "lotra_" in name:
                parameter.zero_()
    set_peft_model_state_dict(loaded, saved)

    moved = {name for name in start if not torch.equal(state[name], start[name])}
    adapter = {name for name in start if "lotra_" in name}
    return {
        "output": distance({"y": shard_y}, {"y": y[shard]}),
        "state": distance(state, plain.state_dict()),
        "frozen parameters moved": sorted(moved - adapter),
        "trained parameters not moved": sorted(adapter - moved),
        "saved": distance(saved, get_peft_model_state_dict(plain)),
        "loaded": distance({"y": loaded(x)}, {"y": plain(x)}),
    }


def error_of_wrong_sharding(network, kind):
    """The name and text of the error of a forward pass if the base layer is sharded without its adapters."""
    model = WRONG_KINDS[kind](make(network))
    try:
        model(draw_batch()[0])
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def results(rank, world):
    """What a process computes with the other ones, and then alone."""
    together = results_of_group(rank, world)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return {"2": together, "1": results_of_group(0, 1)}


def results_of_group(rank, world):
    comparisons, errors = {}, {}
    for network in NETWORKS:
        for kind in KINDS:
            comparisons[f"{network} {kind}"] = compare_with_plain(network, kind, rank, world)
        for kind in WRONG_KINDS:
            errors[f"{network} {kind}"] = error_of_wrong_sharding(network, kind)
    return {"comparisons": comparisons, "errors": errors}


# What the processes wrote


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The results of two processes, which run everything, since most of their time are imports."""
    return start_group(__file__, 2, tmp_path_factory.mktemp("group"))


@pytest.fixture(params=["1", "2"], ids=["world-1", "world-2"])
def ranks(request, processes):
    """The results of each process in a group of one or two."""
    return [process[request.param] for process in processes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_is_that_of_the_plain_model(ranks, network, kind):
    for rank in ranks:
        comparison = rank["comparisons"][f"{network} {kind}"]

        assert comparison["frozen parameters moved"] == []
        assert comparison["trained parameters not moved"] == []
        for name in ("output", "state", "saved", "loaded"):  # the last two are the gathered adapter
            assert comparison[name] < 1e-5


@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_sharding_the_base_layer_alone_is_refused(ranks, network, kind):
    for rank in ranks:
        error, message = rank["errors"][f"{network} {kind}"]

        assert error == "RuntimeError"
        assert "Shard the LoTRALayer" in message


if __name__ == "__main__":
    run_worker(results)
