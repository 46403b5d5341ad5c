# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapted layer computes what a layer of coefficients with the dense update added does, in each precision."""

import copy

import pytest
import torch
from helpers import (
    adapt,
    assert_equal,
    assert_near,
    base,
    components,
    inputs,
    layer_of,
    relative,
)
from peft import PeftModel, get_peft_model
from stand_ins import LAYER_KINDS

from peft_lotra import LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN


def test_an_adapted_layer_tells_its_sizes_and_its_components():
    layer = layer_of(adapt(base("own"), r=(2, 3, 100)))

    assert isinstance(layer, LoTRALayer)
    assert (layer.in_features, layer.out_features) == (3, 4)

    components = layer.get_components("default")

    assert {name: tuple(part.shape) for name, part in components._asdict().items()} == {
        "core": (2, 3, 9),
        "factor_out": (4, 2),
    }
    assert components.form == (2, "full", "full")
    assert repr(layer).startswith("lotra.LoTRALayer")
    assert type(layer.get_base_layer()).__name__ == "KANLinear"


@pytest.mark.parametrize("width", [8, 512])
def test_the_output_of_a_random_update_has_the_size_of_a_basis_function_at_any_width(width):
    energies = []
    for _ in range(20):
        model = adapt(base("own", torch.float64, width, 16), r=(8, 4, 6), adapt_residual=False)
        features = torch.randn(16, width, 8, dtype=torch.float64)
        output = torch.einsum("bik,oik->bo", features, layer_of(model).get_delta_weight("default"))
        energies.append(output.square().mean().item())

    assert 0.5 < sum(energies) / len(energies) / 8 < 1.8


def dtypes(model):
    return {parameter.dtype for _, parameter in components(model)}


@pytest.mark.parametrize("kind", ["own", "efficient-kan", "pykan", "fast-kan", "inkan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_base_of_another_precision_is_adapted_saved_and_merged(kind, dtype, autocast_adapter_dtype, tmp_path):
    model, x = base(kind, dtype), inputs(dtype=dtype)
    before, config = model(x), LoTRAConfig(r=2, init_weights=False)
    fresh = copy.deepcopy(model)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert dtypes(adapted) == {torch.promote_types(dtype, torch.float32) if autocast_adapter_dtype else dtype}
    assert all(p.dtype == dtype for name, p in adapted.named_parameters() if "lotra_" not in name)
    y = adapted(x)
    assert_equal(adapted.train()(x), y)
    assert y.dtype == before.dtype
    assert y.isfinite().all()
    assert relative(y, before) > 1e-2
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for _, p in components(adapted))

    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    assert_equal(loaded(x), y)
    assert dtypes(loaded) == dtypes(adapted)

    merged = adapted.merge_and_unload(safe_merge=True)
    assert all(p.dtype == dtype for p in merged.parameters())
    assert_near(merged(x), y, 1e-12)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_autocast_keeps_the_update_in_full_precision(kind):
    """Under autocast the adapted layer computes what its merged base computes, from a delta in full precision."""
    reference = base(kind)
    adapted = adapt(copy.deepcopy(reference), alpha=0.1)
    for name, part in layer_of(adapted).lotra_tensor.split(layer_of(adapted).get_delta_weight("default")).items():
        reference.kan.get_parameter(name).data.add_(part)
    x = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, y = reference(x), adapted(x)
        trained = adapted.train()(x)

    assert y.dtype == expected.dtype
    assert_equal(y, expected)
    assert_equal(trained, expected)

    trained.float().sum().backward()

    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in components(adapted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_that_is_added_to_a_half_precision_base_does_not_train(dtype):
    model = adapt(KAN([3, 4, 2]).to(dtype))
    model.add_adapter("second", LoTRAConfig(r=1))

    assert not [name for name, p in components(model) if name.endswith(".second") and p.requires_grad]
    assert all(p.requires_grad and p.dtype == torch.float32 for name, p in components(model) if ".default" in name)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "inkan"])
def test_a_grid_that_is_cast_has_not_moved(kind, merged):
    """A cast to fewer digits and back rounds the grid, as it rounds the coefficients."""
    model = adapt(base(kind))
    layer = model.base_model.model.kan.base_layer
    if kind == "own":
        layer.grid_bounds.mul_(1.2345678)
        model = adapt(model.unload())
    x = inputs()
    if merged:
        model.merge_adapter()
    model.to(torch.bfloat16).to(torch.float32)
    if merged:
        model.unmerge_adapter()
    y = model(x)

    assert torch.isfinite(y).all()

    adapted = layer_of(model)
    layer.get_buffer(adapted.lotra_spec.grid[0]).mul_(1.1)

    with pytest.raises(RuntimeError, match="grid"):
        model(x)
