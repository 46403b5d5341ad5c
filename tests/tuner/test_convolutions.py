# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Convolutional KAN layers, whose coefficients have a fourth mode: the positions of the kernel."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conv_stand_ins import CONVOLUTIONS, ConvNet, FastKANConvNDLayer, images, register_missing
from helpers import lotra_layers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    find_kan_layers,
    hotswap_adapter,
    preprocess_lotra,
    refit_adapters,
    slim,
)
from peft_lotra.families import registry
from peft_lotra.hub import adapter_table
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.tucker import KernelTucker
from peft_lotra.tuner.gradients import gather_gradients
from peft_lotra.tuner.targets import locate_target


FAMILIES = list(CONVOLUTIONS)


@pytest.fixture(autouse=True, scope="module")
def _families():
    before = dict(registry._SPECS)
    register_missing()
    yield
    registry._SPECS.clear()
    registry._SPECS.update(before)


def net(family: str = "fastkanconv", groups: int = 1, ndim: int = 2) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(family, groups=groups, ndim=ndim).eval()


def adapted(model: nn.Module, random: bool = True, **config) -> PeftModel:
    """With an adapter that changes the function, unless `random` is false."""
    return get_peft_model(model, LoTRAConfig(**{"r": (3, 2, 2, 4), "init_weights": not random, **config})).eval()


def train(model: nn.Module, x: Tensor, steps: int = 4) -> list[float]:
    target = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(1))
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("groups, ndim", [(2, 1), (1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_life_of_an_adapter(family, groups, ndim, tmp_path):
    base, x = net(family, groups, ndim), images(ndim=ndim)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected, classes = base(x), [type(module) for module in base.modules()]
    model = adapted(copy.deepcopy(base), random=False)
    assert torch.equal(model(x), expected)  # an adapter starts as its base

    losses = train(model, x)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lotra_" in name)
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
    trained = model(x)
    assert not torch.allclose(trained, expected, atol=1e-4)

    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), trained)

    model.merge_adapter()
    assert torch.equal(model(x), trained)
    model.unmerge_adapter()
    bare = {name.replace(".base_layer", ""): t for name, t in model.base_model.model.state_dict().items()}
    assert all(torch.equal(bare[name], tensor) for name, tensor in before.items())

    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(x), trained)
    assert [type(module) for module in merged.modules()] == classes and list(merged.state_dict()) == list(before)
    model.add_adapter("other", LoTRAConfig(r=1))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(x), expected) and not any(name.endswith(".default") for name in model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unload().state_dict().items())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_modes_are_those_of_the_layer(family, groups):
    """A change of one slice of the canonical tensor changes what the modes say: outputs, and nothing else."""
    layer, x = CONVOLUTIONS[family](4, 6, 3, groups=groups, padding=1), images(2)
    location = locate_target("layer", layer).coefficients
    out, in_, basis, kernel = location.shape
    assert (out, in_, kernel) == (6, 4 // groups, 9)
    layer.layer_norm = nn.ModuleList(nn.Identity() for _ in range(groups))  # which would mix positions
    tensor = location.read(layer).detach()
    assert tensor.shape[2] == basis + location.has_residual

    def run(changed: Tensor, x: Tensor = x) -> Tensor:
        return torch.func.functional_call(layer, location.split(changed), (x,)).detach()

    def change(*index) -> Tensor:
        changed = tensor.clone()
        changed[index] += 0.5
        return changed

    before = run(tensor)
    for o in (0, 5):
        others = [other for other in range(6) if other != o]
        difference = (run(change(o)) - before).abs().amax((0, 2, 3))
        assert difference[o] > 0 and not difference[others].any()
    for i in range(in_):  # the inputs of another block, or other inputs of the same, do not matter
        moved = x.clone()
        moved[:, [c for c in range(4) if c % in_ != i]] += 0.1
        if family == "kalnconv":  # brings the inputs together first
            continue
        alone = torch.zeros_like(tensor)
        alone[:, i] = tensor[:, i]
        torch.testing.assert_close(run(alone), run(alone, moved))
    # the last position of the kernel sees the pixel below and to the right, which the last pixel does not have
    corner = torch.zeros_like(tensor)
    corner[..., -1] = tensor[..., -1]
    torch.testing.assert_close(run(corner)[..., -1, -1], run(torch.zeros_like(tensor))[..., -1, -1])


def test_ranks_of_three_and_four_modes():
    shape = find_kan_layers(net())[0].shape
    assert shape == (6, 4, 5, 9)
    for r, expected in ((3, (3, 3, 3, 3)), ((2, 9, 2), (2, 4, 2, 9)), ((2, 2, 2, 99), (2, 2, 2, 9))):
        layer = lotra_layers(adapted(net(), r=r))["base_model.model.first"]
        components = layer.get_components("default")
        assert isinstance(components, KernelTucker) and layer.lotra_r["default"] == components.ranks == expected
        assert components.shape == (6, 4, 6, 9)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == components.numel()
    model = adapted(net(), r=1, rank_pattern={"second": (2, 2, 2, 5)}, adapt_residual=False)
    ranks = {name.rpartition(".")[2]: layer.lotra_r["default"] for name, layer in lotra_layers(model).items()}
    assert ranks == {"first": (1, 1, 1, 1), "second": (2, 2, 2, 5)}
    assert lotra_layers(model)["base_model.model.first"].get_components("default").shape == (6, 4, 5, 9)


def test_four_ranks_serve_dense_layers_too():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.kan = FastKANConvNDLayer(4, 6, 3), KAN([6, 3])

        def forward(self, x: Tensor) -> Tensor:
            return self.kan(self.convolution(x).flatten(2).mean(-1))

    model = adapted(Mixed(), r=(2, 3, 2, 4))
    ranks = [layer.lotra_r["default"] for layer in lotra_layers(model).values()]
    assert ranks == [(2, 3, 2, 4), (2, 3, 2)]
    dense = [name for name in model.state_dict() if "kan" in name and "lotra" in name]
    assert len(dense) == 4 and not any("factor_kernel" in name for name in dense)
    model(images()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lotra" in name)


def test_each_component_has_its_rate():
    optimizer = create_lotra_optimizer(adapted(net()), torch.optim.Adam, lr=0.1, policy={"factor_kernel": 0.5})
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["factor_kernel"] == 0.05 and rates["core"] == 0.1


def test_random_starts_have_columns_of_the_promised_norms():
    layer = lotra_layers(adapted(net(), random=False))["base_model.model.first"]
    core, out, in_, basis, kernel = layer.get_components("default")
    assert not out.any() and core.std() < 3 / math.sqrt(2 * 2 * 4)
    for factor, gain in ((in_, 1), (basis, math.sqrt(6)), (kernel, 1)):
        torch.testing.assert_close(factor.T @ factor, gain**2 * torch.eye(factor.shape[1]))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_start_uses_the_leading_directions_of_the_kernel(groups):
    model, x = net("kagnconv", groups), images()
    target = locate_target("first", model.first)

    def step() -> None:
        model(x).square().sum().backward()

    gradient = gather_gradients({"first": (target.layer, target.coefficients)}, model, step)[target.layer]
    assert gradient.shape == (6, 4 // groups, 5, 9)
    # with all other modes whole, the best subspace of the kernel is that of its unfolding
    config = LoTRAConfig(r=(6, 4, 5, 2), target_modules=["first"], init_weights="gradient")
    preprocess_lotra(model, config, step)
    before = model(x)
    adapted_model = get_peft_model(model, config)
    assert torch.equal(adapted_model(x), before)
    kernel = lotra_layers(adapted_model)["base_model.model.first"].lotra_factor_kernel["default"]
    leading = torch.linalg.svd(gradient.movedim(3, 0).flatten(1), full_matrices=False).U[:, :2]
    torch.testing.assert_close(kernel @ kernel.T, leading @ leading.T, atol=1e-3, rtol=0)


def test_dropout_scale_and_disabling():
    model, x = adapted(net(), rank_dropout=0.5, alpha=2.0), images()
    layer = lotra_layers(model)["base_model.model.first"]
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(delta, 2 * layer.get_components("default").dense())
    assert torch.equal(layer.coefficients_in_force(), layer.get_base_weight() + delta)
    on = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
    layer.set_scale("default", 0.5)
    assert torch.equal(layer.get_delta_weight("default"), layer.get_components("default").dense())
    layer.set_scale("default", 1.0)
    torch.manual_seed(0)
    kept = {layer._update("default", dropout=True).tensor.core.flatten(1).any(1).sum().item() for _ in range(20)}
    assert len(kept) > 1 and torch.equal(model(x), on)


@pytest.mark.parametrize("family", ["kagnconv", "fastkanconv"])
def test_compiled_and_in_half_precision(family):
    model, x = adapted(net(family, groups=2)), images()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.1 * expected.abs().max() + 0.1


def test_a_batch_of_several_adapters():
    model, x = adapted(net("fastkanconv", groups=2)), images(6)
    model.add_adapter("other", LoTRAConfig(r=(1, 2, 3, 2), init_weights=False))
    own = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        own[name] = model(x)
    with model.disable_adapter():
        own["__base__"] = model(x)
    names = ["other", "default", "__base__", "default", "other", "__base__"]
    mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([own[name][row] for row, name in enumerate(names)]))


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums(combination):
    model = adapted(net(), r=(1, 2, 1, 2))
    model.add_adapter("other", LoTRAConfig(r=(2, 1, 2, 1), init_weights=False))
    ranks = (3, 3, 3, 3) if combination == "svd" else None
    errors = model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "sum", combination, ranks=ranks)
    assert max(errors.values()) < 1e-5
    layer = lotra_layers(model)["base_model.model.first"]
    assert layer.lotra_r["sum"] == (3, 3, 3, 3)
    wanted = 0.7 * layer.get_delta_weight("default") - 0.3 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), wanted, atol=1e-5, rtol=1e-4)


def test_hotswap(tmp_path):
    first, second, x = adapted(net("kagnconv")), adapted(net("kagnconv")), images()
    lotra_layers(second)["base_model.model.first"].reset_lotra_parameters("default", init_weights=False)
    second.save_pretrained(tmp_path)
    assert not torch.allclose(first(x), second(x))
    hotswap_adapter(first, tmp_path)
    assert torch.equal(first(x), second(x))


def test_the_file_is_checked(tmp_path):
    adapted(net()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such layer|shape|does not fit|another model"):
        PeftModel.from_pretrained(ConvNet("fastkanconv", width=8), tmp_path)
    row = adapter_table(adapted(net()))[0]
    assert (row.name, row.shape, row.ranks) == ("first", (6, 4, 6, 9), (3, 2, 2, 4))
    assert row.norm == pytest.approx(adapted(net()).base_model.model.first.get_delta_weight("default").norm().item())


def test_levenberg_marquardt_trains_them():
    torch.manual_seed(0)
    model, x = adapted(net().double(), random=False, r=(1, 1, 1, 2)), images(4, dtype=torch.float64)
    target = torch.randn(4, 3, dtype=torch.float64) * 0.1

    def residuals(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return model(x) - target

    optimizer = LevenbergMarquardt(model)
    steps = [optimizer.step([(residuals, (x, target))]) for _ in range(4)]
    assert all(step.accepted for step in steps) and steps[-1].loss < 0.5 * steps[0].loss


def test_what_is_not_for_convolutions_says_so():
    model, x = adapted(net()), images()
    for network in (model, net()):
        with pytest.raises(TypeError, match="`first`.* is a convolution"):
            jet(network, x)
    with pytest.raises(ValueError, match="slim.*`first`.* convolution"):
        slim(net(), 2)
    layers, grid = lotra_layers(model), model.base_model.model.first.base_layer.rbf.grid
    delta = layers["base_model.model.first"].get_delta_weight("default").clone()
    with pytest.raises(ValueError, match="convolution"):
        refit_adapters(model, x, move=lambda base: base.first.rbf.grid.data.mul_(1.1))
    assert torch.equal(grid, torch.linspace(-2, 2, 5))
    assert torch.equal(layers["base_model.model.first"].get_delta_weight("default"), delta)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_core_on_the_factors_of_the_base(family):
    model, x = net(family, 2), images()
    before = model(x)
    model = adapted(model, init_weights="hosvd", train=["core", "factor_kernel"])
    torch.testing.assert_close(model(x), before)
    losses = train(model, x)
    assert losses[-1] < losses[0]
    names = {name.split("lotra_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"core", "factor_kernel"}
