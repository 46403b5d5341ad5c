# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The network of a solution is read from a file as it was written, and conditions are given again as code."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, SlimKAN, jet
from peft_lotra.pde import BoxDistance, HardConstraint, load_network, solve
from peft_lotra.pde.solution import Solution


BOX = (0.0, 0.0), (2.0, 1.0)


def heat(model: nn.Module, x: Tensor) -> Tensor:
    _, (_, u_t), u_xx = jet(model, x, collapse=(1.0, 0.0))
    return u_t - u_xx


def start(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., :1])


def since(x: Tensor) -> Tensor:
    return x[..., 1:]


def solved(network: nn.Module | None = None, **options) -> Solution:
    """Take two steps."""
    torch.manual_seed(0)
    defaults = {"distance": since, "lift": start, "steps": 2, "progress": False}
    return solve(heat, *BOX, network=network, **(defaults | options))


def frozen_in_part(network: nn.Module) -> nn.Module:
    """Return a network whose grids stay, as not all of it is trained."""
    first, *_ = network.parameters()
    first.requires_grad_(False)
    return network


def assert_same(network: nn.Module, result: Solution) -> None:
    """The model with a loaded network has the same values and derivatives."""
    x = torch.rand(20, 2, dtype=torch.float64) * 0.9
    model = HardConstraint(network, result.model.distance, result.model.lift)
    torch.testing.assert_close(jet(model, x), jet(result.model, x), rtol=1e-12, atol=1e-12)


BUILT_BY_SOLVE = {
    "plain": {},
    "scaled": {"lift": lambda x: 1e4 * start(x), "distance": lambda x: 1e-4 * since(x)},
    "periodic": {"periodic": [0]},
    "polynomials": {"steps": 40},
}


@pytest.mark.parametrize("name", BUILT_BY_SOLVE)
@pytest.mark.filterwarnings("ignore:The training stalled")
def test_networks_of_solve_are_restored(tmp_path, name):
    result = solved(**BUILT_BY_SOLVE[name])

    result.save(tmp_path / "u.safetensors")

    assert_same(load_network(tmp_path / "u.safetensors"), result)
    assert [path.name for path in tmp_path.iterdir()] == ["u.safetensors"]


def adapter() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(KAN([2, 4, 1], norm="tanh"), LoTRAConfig(r=2))


NETWORKS = {
    "KAN": lambda: frozen_in_part(KAN([2, 4, 1], 4, 4, norm="tanh")),
    "Slim KAN": lambda: frozen_in_part(SlimKAN([2, 4, 1], (1, 2, 2))),
    "MLP": lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)),
    "adapter": adapter,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*outside of its grid", "ignore:Adapters have more parameters")
def test_networks_of_the_caller_are_filled(tmp_path, name):
    result = solved(NETWORKS[name]())
    result.save(tmp_path / "u.safetensors")
    network = NETWORKS[name]()

    loaded = load_network(tmp_path / "u.safetensors", network)

    assert_same(loaded, result)
    assert any(module is network for module in loaded.modules())


def test_an_adapter_on_a_loaded_network_is_restored(tmp_path):
    solved(frozen_in_part(KAN([2, 4, 1], norm="tanh"))).save(tmp_path / "base.safetensors")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        base = load_network(tmp_path / "base.safetensors", KAN([2, 4, 1], norm="tanh"))
        return get_peft_model(base, LoTRAConfig(r=2))

    result = solved(adapted())
    result.save(tmp_path / "moved.safetensors")

    assert_same(load_network(tmp_path / "moved.safetensors", adapted()), result)


def test_a_loaded_network_goes_on(tmp_path):
    first = solved()
    first.save(tmp_path / "u.safetensors")

    second = solved(load_network(tmp_path / "u.safetensors"))
    second.save(tmp_path / "u.safetensors")

    assert second.first_residual == pytest.approx(first.residual)
    assert_same(load_network(tmp_path / "u.safetensors"), second)


def test_a_refined_network_is_built_with_its_finer_grids(tmp_path):
    result = solved(KAN([2, 4, 1], 4, norm="tanh"))
    result.save(tmp_path / "u.safetensors")

    assert_same(load_network(tmp_path / "u.safetensors", KAN([2, 4, 1], 8, norm="tanh")), result)


def test_other_networks_are_refused(tmp_path):
    path = tmp_path / "u.safetensors"
    solved(frozen_in_part(KAN([2, 4, 1], 4, norm="tanh")), distance=BoxDistance(*BOX)).save(path)

    with pytest.raises(ValueError, match=r"did not build this network.*`network=...`"):
        load_network(path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_network(path, KAN([2, 4, 1], 5, norm="tanh"))
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "nowhere.safetensors")
