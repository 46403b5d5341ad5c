# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A solution is read from a folder as it was written, and no code of the folder is executed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, SlimKAN, jet
from peft_lotra.pde import BoxDistance, Solution, disk, solve


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
    defaults = {"distance": BoxDistance(*BOX, twice=[(0, "low")]), "lift": 0.5, "steps": 2, "progress": False}
    return solve(heat, *BOX, network=network, **(defaults | options))


@pytest.fixture(scope="module")
def solution() -> Solution:
    """A solution that tests do not train further."""
    return solved(KAN([2, 3, 1], 4, norm="tanh"))


class Residual(nn.Module):
    """A network that no folder can describe."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)) + 0.1 * self.inner(x))


def flags(model: nn.Module) -> dict[str, tuple[bool, torch.dtype]]:
    return {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}


def assert_same(loaded: Solution, saved: Solution) -> None:
    """All but the model is equal, and the model has the same values, derivatives and trained parameters."""
    x = torch.rand(20, 2, dtype=torch.float64)
    assert str(loaded) == str(saved)
    assert loaded.as_dict() == saved.as_dict()
    torch.testing.assert_close(jet(loaded.model, x), jet(saved.model, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loaded.low, saved.low, rtol=0, atol=0)
    assert flags(loaded.model) == flags(saved.model)


def frozen() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 4, bias=False), nn.GELU("tanh"), nn.LayerNorm(4), nn.Linear(4, 1))
    network[0].requires_grad_(False)
    return network


NETWORKS = {
    "the default": lambda: None,
    "a KAN": lambda: KAN([2, 4, 1], 4, 4, norm="tanh"),
    "a normalized KAN": lambda: KAN([2, 4, 1], norm="layer"),
    "a Slim KAN": lambda: SlimKAN([2, 4, 1], (2, 2, 2)),
    "modules of torch, partly frozen": frozen,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*outside of its grid", "ignore:.*no closed form")
def test_a_solution_is_restored(tmp_path, name):
    result = solved(NETWORKS[name]())

    result.save(tmp_path / "new" / "folder")

    assert_same(Solution.load(tmp_path / "new" / "folder"), result)


def test_a_continuation_on_moved_knots_and_a_periodic_box_is_restored(tmp_path):
    def residual(model: nn.Module, x: Tensor, rate: float) -> Tensor:
        return heat(model, x) * rate

    options = {"distance": since, "lift": start, "periodic": [0], "continuation": (1.0, 2.0), "steps": 9}
    torch.manual_seed(0)
    result = solve(residual, *BOX, network=KAN([3, 4, 1], 4, 4, norm="tanh"), progress=False, **options)

    result.save(str(tmp_path))

    assert_same(Solution.load(str(tmp_path), distance=since, lift=start), result)


def test_a_loaded_solution_goes_on(solution, tmp_path):
    solution.save(tmp_path)

    result = solved(Solution.load(tmp_path).model)

    assert result.first_residual == pytest.approx(solution.residual)


def test_a_callback_can_save_what_is_not_finished(tmp_path):
    solved(callback=lambda solution, record: solution.save(tmp_path))

    loaded = Solution.load(tmp_path)

    assert len(loaded.history) == 2
    assert math.isnan(loaded.residual)
    assert "nan" in str(loaded)


def test_functions_are_passed_again_and_compared(tmp_path):
    result = solved(distance=since, lift=start)
    result.save(tmp_path)

    assert_same(Solution.load(tmp_path, distance=since, lift=start), result)
    with pytest.raises(ValueError, match=r"does not hold `distance`.*load\(folder, distance=...\)"):
        Solution.load(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold `lift`.*load\(folder, lift=...\)"):
        Solution.load(tmp_path, distance=since)
    with pytest.raises(ValueError, match="`lift` has other values"):
        Solution.load(tmp_path, distance=since, lift=lambda x: 1.001 * start(x))
    with pytest.raises(ValueError, match="`distance` has other values"):
        Solution.load(tmp_path, distance=lambda x: x[..., 1:] ** 2, lift=start)


def adapter() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(KAN([2, 4, 1], norm="tanh"), LoTRAConfig(r=2))


@pytest.mark.parametrize("network", [Residual, adapter, lambda: nn.Sequential(Residual(), nn.Tanh())])
@pytest.mark.filterwarnings("ignore:.*no closed form", "ignore:Adapters have more parameters")
def test_other_networks_are_passed_again_and_filled(tmp_path, network):
    result = solved(network(), refine=False)
    result.save(tmp_path)
    fresh = network()

    loaded = Solution.load(tmp_path, network=fresh)

    assert_same(loaded, result)
    assert any(module is fresh for module in loaded.model.modules())
    with pytest.raises(ValueError, match=r"does not hold `network`"):
        Solution.load(tmp_path)


def test_a_network_of_another_shape_is_refused_and_unchanged(tmp_path):
    solved(Residual()).save(tmp_path)
    network = KAN([2, 4, 1], 3, norm="tanh")
    state = copy.deepcopy(network.state_dict())

    with pytest.raises(ValueError, match="`network` has .* of shape .*, but .* was saved"):
        Solution.load(tmp_path, network=network)

    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*no closed form")
def test_a_network_with_a_hook_is_passed_again(tmp_path):
    network = KAN([2, 3, 1], norm="tanh")
    network.register_forward_hook(lambda module, args, output: output.mul(2))
    solved(network).save(tmp_path)

    with pytest.raises(ValueError, match="does not hold `network`"):
        Solution.load(tmp_path)
    with pytest.raises(ValueError, match="`network` has other values"):
        Solution.load(tmp_path, network=KAN([2, 3, 1], 10, norm="tanh"))


def test_a_second_save_replaces_the_first_and_keeps_other_files(solution, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    solved().save(tmp_path)
    solution.save(tmp_path)

    assert_same(Solution.load(tmp_path), solution)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "solution.safetensors"]


def test_a_save_that_fails_changes_nothing(solution, tmp_path, monkeypatch):
    file = tmp_path / "solution.safetensors"
    file.write_bytes(b"an earlier solution")

    def fail(*args, **kwargs) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("peft_lotra.pde.saving.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        solution.save(tmp_path)

    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"an earlier solution"


def edit(folder: Path, **changes) -> None:
    """Change the settings in the header of the file."""
    path = folder / "solution.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["solution"])
    save_file(tensors, path, {"solution": json.dumps(settings | changes)})


def truncate(folder: Path) -> None:
    path = folder / "solution.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


CLASS = "peft_lotra.pde.constraints.HardConstraint"
DAMAGE = {
    "has no solution.safetensors. Write one by": lambda folder: (folder / "solution.safetensors").unlink(),
    "solution.safetensors is damaged": truncate,
    "safetensors is damaged": lambda folder: (folder / "solution.safetensors").write_bytes(b"\x80\x04K\x01."),
    "is damaged: TypeError": lambda folder: save_file({"x": torch.ones(1)}, folder / "solution.safetensors"),
    r"is damaged: .*`low` is": lambda folder: edit(folder, low=[3.0, 0.0]),
    "is damaged: .*unexpected keyword": lambda folder: edit(folder, phases=[{"code": 1}]),
    "malformed": lambda folder: edit(folder, model={"class": CLASS, "attributes": "exit(3)"}),  # text is not evaluated
    "does not hold `model`": lambda folder: edit(folder, model={"class": "os.system", "attributes": "{}"}),
    "`distance` has other values": lambda folder: edit(folder, low=[0.1, 0.0]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_named(solution, tmp_path, message):
    solution.save(tmp_path)
    DAMAGE[message](tmp_path)

    with pytest.raises(ValueError, match=message):
        Solution.load(tmp_path)


def test_wrong_folders_are_named(solution, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ValueError, match="has no solution.safetensors"):
        Solution.load(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        solution.save(tmp_path / "file")
    with pytest.raises(TypeError, match="not NoneType"):
        Solution.load(None)  # pyright: ignore[reportArgumentType]


def test_a_shape_is_given_again(tmp_path):
    hole = disk((1.0, 0.5), 0.2)

    def inside(x: Tensor) -> Tensor:
        return ~hole.inside(x)

    result = solved(inside=inside, distance=hole.distance)
    result.save(tmp_path)

    loaded = Solution.load(tmp_path, distance=hole.distance, inside=inside)

    x = torch.tensor([[0.2, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(loaded.model(x), result.model(x))
    for wrong in (None, hole.inside):
        with pytest.raises(ValueError, match="`inside` is not that of the saved solution"):
            Solution.load(tmp_path, distance=hole.distance, inside=wrong)
