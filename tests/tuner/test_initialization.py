# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import COMPONENTS, adapt, base, inputs, lotra_layers
from stand_ins import FAMILIES

from peft_lotra.tucker import reconstruct
from peft_lotra.tuner.initialization import reset_components


def new_components(shape=(9, 7, 8), ranks=(4, 3, 5), dtype=torch.float64, device="cpu"):
    sizes = [ranks, *zip(shape, ranks, strict=True)]
    return [torch.full(size, torch.nan, dtype=dtype, device=device) for size in sizes]


def test_the_update_is_zero_by_one_component_alone():
    parts = new_components()
    reset_components(*parts)
    assert torch.equal(reconstruct(*parts), torch.zeros(9, 7, 8, dtype=torch.float64))
    assert [bool(part.any()) for part in parts] == [True, False, True, True]


def test_the_update_is_not_zero_on_request():
    parts = new_components()
    reset_components(*parts, zero=None)
    assert reconstruct(*parts).count_nonzero() == 9 * 7 * 8


def test_the_columns_of_the_factors_are_orthogonal():
    _, _, factor_in, factor_basis = parts = new_components()
    reset_components(*parts)
    torch.testing.assert_close(factor_in.T @ factor_in, torch.eye(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(factor_basis.T @ factor_basis, 8 * torch.eye(5).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [8, 64, 512])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (8, 4, 6)])
def test_the_output_of_a_random_update_has_the_size_of_its_input_at_any_width(width, ranks):
    energies = []
    for _ in range(40):
        parts = new_components((16, width, 8), ranks)
        reset_components(*parts, zero=None)
        # any features of unit variance will do for basis functions
        features = torch.randn(16, width, 8, dtype=torch.float64)
        output = torch.einsum("bik,oik->bo", features, reconstruct(*parts))
        energies.append(output.square().mean().item())
    # sum_r E[core^2] |factor_in|^2 |factor_basis|^2 E[factor_out^2] = basis
    assert 0.6 < sum(energies) / len(energies) / 8 < 1.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    parts = new_components(dtype=dtype)
    reset_components(*parts, zero=None)
    assert all(part.dtype == dtype and part.isfinite().all() for part in parts)


def test_meta_tensors_are_left_alone():
    reset_components(*(parts := new_components(device="meta")))
    assert all(part.is_meta for part in parts)


def test_ranks_equal_to_the_sizes_and_sizes_of_one():
    for shape, ranks in (((4, 3, 5), (4, 3, 5)), ((1, 1, 1), (1, 1, 1))):
        parts = new_components(shape, ranks)
        reset_components(*parts)
        assert all(part.isfinite().all() for part in parts)


def test_the_random_state_decides():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        parts = new_components()
        reset_components(*parts)
        draws.append(parts[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_init_weights_false_changes_the_function(family):
    model = base(family, torch.float64)
    x = inputs(dtype=torch.float64)
    before = model(x)
    assert (adapt(model, random=True)(x) - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("init_weights", [True, False])
def test_reset_lotra_parameters(init_weights):
    model = adapt(base("own"), random=init_weights)  # the other way round than after the reset
    layer = lotra_layers(model)["base_model.model.kan"]
    before = [part.clone() for part in layer.get_components("default")]
    layer.reset_lotra_parameters("default", init_weights)
    assert layer.get_delta_weight("default").any() != init_weights
    for name, part, old in zip(COMPONENTS, layer.get_components("default"), before, strict=True):
        assert part.shape == old.shape and not torch.equal(part, old), name
        assert part.isfinite().all()
