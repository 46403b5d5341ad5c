# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`init_weights="gradient"`: factors from the gradient that `preprocess_lotra` gathers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import adapt, base, components, inputs, lotra_layers, nested, relative
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, preprocess_lotra
from peft_lotra.families.registry import get_kan_spec
from peft_lotra.kan import KAN, KANLinear, SlimKAN
from peft_lotra.tucker import expand_inputs


every_family = pytest.mark.parametrize("family", FAMILIES)


def gradient_config(**kwargs: Any) -> LoTRAConfig:
    return LoTRAConfig(**{"r": (2, 2, 3), "init_weights": "gradient", **kwargs})


def train_step_for(model: nn.Module, batches: int = 2, rows: int = 5, in_features: int = 3) -> Callable[[], None]:
    """Some batches whose targets no function of few directions explains; the same at each call."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    data = [torch.rand(rows, in_features, generator=generator).to(dtype) * 1.6 - 0.8 for _ in range(batches)]
    noise = [torch.randn(rows, 9, generator=generator).to(dtype) for _ in range(batches)]

    def train_step() -> None:
        for x, target in zip(data, noise, strict=True):
            y = model(x)
            (y - target[:, : y.shape[-1]]).square().mean().backward()

    return train_step


def gradient_of(model: nn.Module, layer_name: str = "kan") -> Tensor:
    """The summed gradient (out, in, basis [+ 1]) of a layer, from a copy of the model in which all is trainable."""
    model = copy.deepcopy(model).requires_grad_(True)
    train_step_for(model)()
    layer = model.get_submodule(layer_name)
    tensor = get_kan_spec(layer).locate(layer)
    return tensor.join([layer.get_parameter(name).grad for name in tensor.parameters])


def adapt_by_gradient(model: nn.Module, **kwargs: Any) -> PeftModel:
    config = gradient_config(**kwargs)
    preprocess_lotra(model, config, train_step_for(model))
    return get_peft_model(model, config)


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


def directions(layer: nn.Module, adapter: str = "default") -> Tensor:
    """(in basis, ro): what factor_out weighs for each output."""
    core, _, factor_in, factor_basis = layer.get_components(adapter)
    return expand_inputs(core, factor_in, factor_basis).flatten(1).T


def leading_directions(tensor: Tensor, rank: int) -> Tensor:
    """(in basis, rank): the leading right singular vectors of the unfolding (out, in basis)."""
    return torch.linalg.svd(tensor.flatten(1), full_matrices=False).Vh[:rank].T


def leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors of an unfolding."""
    return torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False).U[:, :rank]


def kept(tensor: Tensor, factors: list[Tensor]) -> float:
    """The share of the tensor's squared norm that lies in the span of the factors."""
    projectors = [projector(factor) for factor in factors]
    part = torch.einsum("oik,po,qi,rk->pqr", tensor, *projectors)
    return (part.square().sum() / tensor.square().sum()).item()


def everything(model: nn.Module) -> dict[str, Any]:
    """References to the tensors of a model, and copies of their values and flags."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {name: id(tensor) for name, tensor in tensors},
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {name: parameter.grad for name, parameter in model.named_parameters()},
        "grad values": {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        },
        "hooks": {n: len(p._post_accumulate_grad_hooks or ()) for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "vars": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything(model)
    for key, value in before.items():
        if key == "grad":
            assert all(after[key][name] is grad for name, grad in value.items())
        elif key in ("values", "grad values"):
            for name, tensor in value.items():
                now = after[key][name]
                assert now is None if tensor is None else torch.equal(now, tensor), (key, name)
        else:
            assert after[key] == value, key


def with_batch_norm() -> nn.Module:
    """A frozen and a trainable layer besides the targets, running statistics, and gradients from before."""
    model = nn.Sequential(nn.BatchNorm1d(3), KANLinear(3, 4), nn.Dropout(0.1), KANLinear(4, 4), nn.Linear(4, 2))
    train_step_for(model)()
    model[4].requires_grad_(False)
    model[1].base_weight.requires_grad_(False)
    model[3].zero_grad()
    model[2].eval()
    return model


####################
# What it computes #
####################


@every_family
@pytest.mark.parametrize("mode, factor", [(1, "lotra_factor_in"), (2, "lotra_factor_basis")])
def test_a_factor_spans_the_leading_singular_vectors_of_the_gradient(family, mode, factor):
    model = base(family, torch.float64)
    gradient = gradient_of(model)
    # with the other two ranks full, the best approximation is the truncated singular value decomposition
    ranks = tuple(2 if i == mode else 99 for i in range(3))
    (layer,) = lotra_layers(adapt_by_gradient(model, r=ranks)).values()
    columns = getattr(layer, factor)["default"]
    assert columns.shape == (gradient.shape[mode], 2)
    gram = columns.T @ columns
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(2).to(gram), rtol=0, atol=1e-6)
    expected = projector(leading(gradient, mode, 2))
    torch.testing.assert_close(projector(columns), expected, rtol=0, atol=1e-6)


@every_family
def test_the_directions_are_the_leading_ones_of_the_gradient_and_of_equal_weight(family):
    model = base(family, torch.float64)
    gradient = gradient_of(model)
    (layer,) = lotra_layers(adapt_by_gradient(model, r=(2, 99, 99))).values()
    columns = directions(layer)
    size = gradient.shape[2]  # factor_basis has columns of norm sqrt(basis)
    torch.testing.assert_close(columns.T @ columns, size * torch.eye(2).to(columns), rtol=0, atol=1e-6)
    expected = projector(leading_directions(gradient, 2))
    torch.testing.assert_close(projector(columns), expected, rtol=0, atol=1e-6)


def test_more_outputs_than_directions():
    model = base("own", torch.float64)
    (layer,) = lotra_layers(adapt_by_gradient(model, r=(4, 1, 2))).values()
    core, factor_out, _, _ = layer.get_components("default")
    assert core.shape == (4, 1, 2) and core.flatten(1).norm(dim=1).all() and not factor_out.any()
    torch.testing.assert_close(core.flatten(1)[:2] @ core.flatten(1)[:2].T, torch.eye(2).to(core))


@every_family
def test_factors_of_small_ranks_keep_the_most_of_the_gradient(family):
    model = base(family, torch.float64)
    gradient = gradient_of(model)
    ranks = (2, 2, 3)
    (layer,) = lotra_layers(adapt_by_gradient(model, r=ranks)).values()
    # higher-order orthogonal iteration, from the leading singular vectors
    factors = [leading(gradient, mode, rank) for mode, rank in enumerate(ranks)]
    of_hosvd = kept(gradient, factors)
    for _ in range(100):
        for mode in range(3):
            reduced = gradient
            for other in {0, 1, 2} - {mode}:
                reduced = (projector(factors[other]) @ reduced.movedim(other, -2)).movedim(-2, other)
            factors[mode] = leading(reduced, mode, ranks[mode])
    part = gradient.flatten(1) @ projector(directions(layer))
    share = (part.square().sum() / gradient.square().sum()).item()
    assert share > of_hosvd - 1e-9 and share == pytest.approx(kept(gradient, factors), abs=1e-3)
    random = [torch.randn_like(factor) for factor in factors]
    assert share > kept(gradient, random) + 0.05


@every_family
def test_the_adapted_model_starts_as_its_base(family):
    model = base(family)
    x = inputs()
    y = model(x)
    adapted = adapt_by_gradient(model)
    assert relative(adapted(x), y) <= 1e-6
    (layer,) = lotra_layers(adapted).values()
    core, factor_out, *factors = layer.get_components("default")
    assert not factor_out.any() and all(part.any() for part in (core, *factors))
    # the first step moves it: a zero factor still has a gradient
    adapted(x).square().sum().backward()
    assert factor_out.grad.any()


def test_the_gradient_is_that_of_the_layouts_as_stored():
    """Independent of the package's own layouts: (out, in, basis) and (in, out, basis)."""
    for family, order in (("own", (0, 1, 2)), ("kanx", (1, 0, 2))):
        model = base(family, torch.float64)
        twin = copy.deepcopy(model)
        train_step_for(twin)()
        spline, residual = (getattr(twin.kan, name).grad for name in ("spline_weight", "base_weight"))
        gradient = torch.cat([spline, residual[..., None]], -1).permute(order)
        (layer,) = lotra_layers(adapt_by_gradient(model, r=(1, 99, 99))).values()
        expected = projector(leading_directions(gradient, 1))
        torch.testing.assert_close(projector(directions(layer)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan", "fast-kan", "flashkan", "pina"])
@pytest.mark.parametrize("adapt_residual", [True, False])
def test_the_residual_branch_is_the_last_slice_or_none(family, adapt_residual):
    model = base(family, torch.float64)
    gradient = gradient_of(model)
    size = gradient.shape[2]
    (layer,) = lotra_layers(adapt_by_gradient(model, r=(99, 99, 2), adapt_residual=adapt_residual)).values()
    columns = layer.lotra_factor_basis["default"]
    assert layer.lotra_tensor.has_residual and len(columns) == (size if adapt_residual else size - 1)
    part = gradient[..., : len(columns)]
    torch.testing.assert_close(projector(columns), projector(leading(part, 2, 2)), rtol=0, atol=1e-6)
    if adapt_residual:
        assert columns[-1].any()


def test_only_the_targets_receive_gradients_and_they_are_taken_away_at_once():
    model = with_batch_norm()
    config = gradient_config(target_modules=["3"])
    parameters = dict(model.named_parameters())
    inner = train_step_for(model)
    calls = []

    def train_step():
        assert {name for name, p in parameters.items() if p.requires_grad} == {"3.spline_weight", "3.base_weight"}
        inner()
        calls.append([name for name, parameter in parameters.items() if parameter.grad is not None])

    preprocess_lotra(model, config, train_step)
    assert calls == [[]]


def test_all_layers_of_a_model_get_their_own():
    model = nested().double()
    names = ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]
    gradients = {}
    twin = nested().double()
    twin.load_state_dict(model.state_dict())
    train_step_for(twin)()
    for name in names:
        layer = twin.get_submodule(name)
        tensor = get_kan_spec(layer).locate(layer)
        gradients[name] = tensor.join([layer.get_parameter(n).grad for n in tensor.parameters])
    layers = lotra_layers(adapt_by_gradient(model, r=(1, 99, 99)))
    assert list(layers) == [f"base_model.model.{name}" for name in names]
    for name, gradient in gradients.items():
        columns = directions(layers[f"base_model.model.{name}"])
        torch.testing.assert_close(projector(columns), projector(leading_directions(gradient, 1)), rtol=0, atol=1e-6)


def test_half_precision():
    model = base("own", torch.bfloat16)
    adapted = adapt_by_gradient(model)
    x = inputs(dtype=torch.bfloat16)
    assert torch.equal(adapted(x), adapted.get_base_model()(x))
    assert all(part.isfinite().all() for _, part in components(adapted))


#############################
# The base is left as it was #
#############################


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, RuntimeError, "no backward", "nan"])
def test_the_base_is_left_as_it_was(failure):
    model = with_batch_norm()
    config = gradient_config()
    before = everything(model)
    assert any(grad is not None for grad in before["grad"].values())
    inner = train_step_for(model)

    def train_step():
        if failure == "no backward":
            model(inputs())
            return
        if failure == "nan":
            (model(inputs()).sum() * torch.nan).backward()
            return
        model.train(not model.training)
        model[4].requires_grad_(True)
        inner()
        model[0](inputs())
        if failure is not None:
            raise failure

    if failure is None:
        preprocess_lotra(model, config, train_step)
    else:
        with pytest.raises(ValueError if isinstance(failure, str) else failure):
            preprocess_lotra(model, config, train_step)
    assert_unchanged(model, before)
    if failure is not None:  # nothing was kept
        with pytest.raises(ValueError, match="preprocess_lotra"):
            get_peft_model(model, config)
        assert_unchanged(model, everything(model))


def test_a_gradient_that_was_gathered_before_survives_a_failure():
    model = base("own", torch.float64)
    expected = projector(leading_directions(gradient_of(model), 2))
    config = gradient_config(r=(2, 99, 99))
    preprocess_lotra(model, config, train_step_for(model))
    with pytest.raises(ValueError, match="No gradient"):
        preprocess_lotra(model, config, lambda: None)
    (layer,) = lotra_layers(get_peft_model(model, config)).values()
    torch.testing.assert_close(projector(directions(layer)), expected, rtol=0, atol=1e-6)


def test_a_gradient_that_misses_one_layer_names_it():
    model = with_batch_norm()

    def train_step():
        model[3](inputs(in_features=4)).sum().backward()

    with pytest.raises(ValueError, match=r"No gradient arrived at \['spline_weight', 'base_weight'\] of `1`"):
        preprocess_lotra(model, gradient_config(), train_step)
    with pytest.raises(ValueError, match="preprocess_lotra"):  # that of the other layer is not kept either
        get_peft_model(model, gradient_config(target_modules=["3"]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_refused(value):
    model = base("own")
    with pytest.raises(ValueError, match="gradient of `kan` is not finite"):
        preprocess_lotra(model, gradient_config(), lambda: (model(inputs()).sum() * value).backward())


@pytest.mark.parametrize("target", ["4", "all-linear"])
def test_a_wrong_target_is_refused_before_the_step(target):
    model = with_batch_norm()
    before = everything(model)
    targets = [target] if target == "4" else target
    with pytest.raises(ValueError, match="not a KAN layer|all-linear"):
        preprocess_lotra(model, gradient_config(target_modules=targets), lambda: pytest.fail("called"))
    assert_unchanged(model, before)


###############
# Its one use #
###############


def test_without_preprocess_the_adapter_is_refused_and_the_model_unchanged():
    model = with_batch_norm()
    before = everything(model)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="preprocess_lotra"):
        get_peft_model(model, gradient_config())
    assert [type(module) for module in model.modules()] == types
    assert_unchanged(model, before)


def test_the_gradient_is_used_up_by_the_adapter():
    model = base("own")
    model = adapt_by_gradient(model).unload()
    before = everything(model)
    with pytest.raises(ValueError, match="preprocess_lotra"):
        get_peft_model(model, gradient_config())
    assert_unchanged(model, before)
    # and by an adapter that did not ask for it
    preprocess_lotra(model, gradient_config(), train_step_for(model))
    model = get_peft_model(model, LoTRAConfig(r=2)).unload()
    with pytest.raises(ValueError, match="preprocess_lotra"):
        get_peft_model(model, gradient_config())


def test_a_failed_injection_leaves_the_gradients():
    model = nested()
    config = gradient_config(target_modules=["body.0", "body.1"])
    preprocess_lotra(model, gradient_config(target_modules=["body.0"]), train_step_for(model))
    with pytest.raises(ValueError, match="preprocess_lotra"):
        get_peft_model(model, config)
    assert not lotra_layers(model)
    adapted = get_peft_model(model, gradient_config(target_modules=["body.0"]))
    assert list(lotra_layers(adapted)) == ["base_model.model.body.0"]


def test_the_last_of_two_gatherings_counts():
    model = base("own", torch.float64)
    expected = projector(leading_directions(gradient_of(model), 2))
    config = gradient_config(r=(2, 99, 99))

    def other_step():
        (model(inputs(20, torch.float64)) ** 3).sum().backward()

    preprocess_lotra(model, config, other_step)
    preprocess_lotra(model, config, train_step_for(model))
    (layer,) = lotra_layers(get_peft_model(model, config)).values()
    torch.testing.assert_close(projector(directions(layer)), expected, rtol=0, atol=1e-6)


@every_family
def test_a_saved_adapter_loads_without_preprocess(family, tmp_path):
    model = base(family)
    bare = copy.deepcopy(model)
    adapted = adapt_by_gradient(model)
    optimizer = torch.optim.Adam([part for _, part in components(adapted)], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        train_step_for(adapted)()
        optimizer.step()
    x = inputs()
    adapted.eval()
    assert (adapted(x) - bare.eval()(x)).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare, tmp_path).eval()
    assert loaded.peft_config["default"].init_weights == "gradient"
    assert torch.equal(loaded(x), adapted(x))


def test_a_second_adapter_on_a_peft_model():
    model = base("own", torch.float64)
    gradient = gradient_of(model)
    adapted = adapt(model, random=False)  # changes nothing yet: the gradient is that of the base
    before = everything(adapted)
    config = gradient_config(r=(2, 99, 99))
    preprocess_lotra(adapted, config, train_step_for(adapted))
    assert_unchanged(adapted, before)
    adapted.add_adapter("second", config)
    (layer,) = lotra_layers(adapted).values()
    assert adapted.active_adapters == ["default"]
    for name, part in before["values"].items():
        assert torch.equal(dict([*adapted.named_parameters(), *adapted.named_buffers()])[name], part)
    expected = projector(leading_directions(gradient, 2))
    torch.testing.assert_close(projector(directions(layer, "second")), expected, rtol=0, atol=1e-6)
    x = inputs(dtype=torch.float64)
    y = adapted(x)
    adapted.set_adapter("second")
    assert torch.equal(adapted(x), y)
    with pytest.raises(ValueError, match="preprocess_lotra"):
        adapted.add_adapter("third", config)
    assert list(adapted.peft_config) == ["default", "second"]


#########
# Worth #
#########


def test_the_first_steps_reduce_the_loss_of_a_shifted_task_more_than_with_random_factors():
    def task(shift: float) -> tuple[Tensor, Tensor]:
        x = torch.rand(256, 4) * 2 - 1
        weights = torch.tensor([[1.0, 0.5, -1.0, 0.3], [0.2, -0.7, 0.6, 1.0], [-0.5, 0.9, 0.1, -0.8]])
        return x, torch.sin(torch.pi * (x + shift)) @ weights.T

    def train(model, steps: int, lr: float, x: Tensor, y: Tensor) -> float:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        return (model(x) - y).square().mean().item()

    kan = KAN([4, 12, 3])
    train(kan, 150, 0.02, *task(0.0))
    x, y = task(0.15)
    start = (kan(x) - y).square().mean().item()
    losses = {}
    for init_weights in ("gradient", True):
        config = LoTRAConfig(r=(2, 2, 2), init_weights=init_weights)
        model = copy.deepcopy(kan)
        if init_weights == "gradient":
            preprocess_lotra(model, config, lambda m=model: (m(x) - y).square().mean().backward())
        losses[init_weights] = train(get_peft_model(model, config), 20, 0.02, x, y)
    assert losses["gradient"] < 0.8 * losses[True] and losses["gradient"] < 0.8 * start, (start, losses)


def test_a_config_that_would_not_use_the_gradient_is_refused():
    model = base("own")
    before = everything(model)
    for init_weights in (True, False):
        with pytest.raises(ValueError, match='(?s)`init_weights`.*Pass `LoTRAConfig\\(init_weights="gradient"\\)`'):
            preprocess_lotra(model, LoTRAConfig(init_weights=init_weights), lambda: pytest.fail("called"))
    assert_unchanged(model, before)


def test_slim_layers_that_are_merged_into_dense_ones():
    model = get_peft_model(SlimKAN([3, 4, 2], ranks=2), LoTRAConfig(r=2, init_weights=False))
    x = torch.rand(5, 3)
    model.merge_adapter()
    config = LoTRAConfig(r=2, init_weights="gradient")
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        preprocess_lotra(model, config, lambda: model(x).sum().backward())
    model.unmerge_adapter()
    preprocess_lotra(model, config, lambda: model(x).sum().backward())
