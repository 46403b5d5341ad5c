# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pickle

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lotra.tucker import (
    KernelTucker,
    Tucker,
    cap_ranks,
    check_ranks,
    contract,
    direct_sum,
    fit,
    hosvd,
    reconstruct,
    tucker,
    tucker_of,
    tucker_scaled,
)


sizes = st.tuples(*[st.integers(1, 6)] * 3)
sizes_with_kernel = st.tuples(*[st.integers(1, 5)] * 4)
SHAPES = [((6, 5, 4), (2, 3, 2)), ((6, 5, 4, 9), (2, 3, 2, 4))]


def random_tucker(shape=(6, 5, 4), ranks=(2, 3, 2)) -> Tucker:
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    return tucker_of(torch.randn(ranks, dtype=torch.float64), *factors)


@given(st.one_of(st.tuples(sizes, sizes), st.tuples(sizes_with_kernel, sizes_with_kernel)))
@settings(max_examples=60, deadline=None)
def test_reconstruct_equals_tensorly(case):
    shape, ranks = case
    tensorly.set_backend("pytorch")
    core = torch.randn(ranks, dtype=torch.float64)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    tensor = reconstruct(core, *factors)
    assert tensor.shape == shape
    torch.testing.assert_close(tensor, tensorly.tucker_to_tensor((core, factors)))


@pytest.mark.parametrize("ranks", [(2, 3, 2), (2, 3, 2, 3)])
def test_reconstruct_is_differentiable_in_all_components(ranks):
    core = torch.randn(ranks, dtype=torch.float64, requires_grad=True)
    factors = [torch.randn(4, r, dtype=torch.float64, requires_grad=True) for r in core.shape]
    assert torch.autograd.gradcheck(reconstruct, (core, *factors))
    assert torch.autograd.gradgradcheck(reconstruct, (core, *factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reconstruct_keeps_the_dtype(dtype):
    parts = [torch.randn(size, dtype=dtype) for size in ((2, 2, 2), (5, 2), (4, 2), (3, 2))]
    assert reconstruct(*parts).dtype == dtype


@pytest.mark.parametrize(
    "r, shape, expected",
    [
        (4, (10, 3, 8), (4, 3, 4)),
        (1, (1, 1, 1), (1, 1, 1)),
        (100, (10, 3, 8), (10, 3, 8)),
        ((2, 9, 5), (10, 3, 8), (2, 3, 5)),
        (4, (10, 3, 8, 9), (4, 3, 4, 4)),
        ((2, 9, 5), (10, 3, 8, 9), (2, 3, 5, 9)),  # the kernel is small, and stays whole
        ((2, 9, 5, 4), (10, 3, 8, 9), (2, 3, 5, 4)),
        ((2, 9, 5, 99), (10, 3, 8, 9), (2, 3, 5, 9)),
        ((2, 9, 5, 4), (10, 3, 8), (2, 3, 5)),  # a dense layer of the same network
    ],
)
def test_cap_ranks(r, shape, expected):
    assert cap_ranks(r, shape) == expected


@pytest.mark.parametrize(
    "r, expected", [(1, 1), ((1, 2, 3), (1, 2, 3)), ([1, 2, 3], (1, 2, 3)), ([1, 2, 3, 4], (1, 2, 3, 4))]
)
def test_check_ranks_accepts(r, expected):
    assert check_ranks(r) == expected and type(check_ranks(r)) is type(expected)


@pytest.mark.parametrize(
    "r",
    [0, -1, 2.0, True, None, "4", (), (4,), (4, 4), (4,) * 5, (4, 0, 4), (4, 4, -1), (4, 4, 4.0), (4, True, 4)]
    + [(4, 4, 4, 0), (4, 4, 4, 2.0)],
)
def test_check_ranks_refuses(r):
    with pytest.raises(ValueError, match="`r` should be a positive integer value") as error:
        check_ranks(r)
    assert str(r) in str(error.value)


def test_shape_ranks_and_padding():
    tensor = random_tucker((6, 5, 4), (2, 3, 1))
    assert (tensor.shape, tensor.ranks, tensor.numel()) == ((6, 5, 4), (2, 3, 1), 6 + 12 + 15 + 4)
    padded = tensor.padded(6).dense()
    assert padded.shape == (6, 5, 6) and not padded[..., 4:].any()
    torch.testing.assert_close(padded[..., :4], tensor.dense())


def test_a_kernel_is_one_more_factor():
    tensor = random_tucker((6, 5, 4, 9), (2, 3, 1, 4))
    assert isinstance(tensor, KernelTucker) and tensor.factor_kernel.shape == (9, 4)
    assert (tensor.shape, tensor.ranks, tensor.numel()) == ((6, 5, 4, 9), (2, 3, 1, 4), 24 + 12 + 15 + 4 + 36)
    padded = tensor.padded(6).dense()
    assert padded.shape == (6, 5, 6, 9) and not padded[:, :, 4:].any()
    torch.testing.assert_close(padded[:, :, :4], tensor.dense())
    twice = tensor._replace(core=2 * tensor.core)
    assert type(twice) is type(tensor.map(torch.clone)) is type(pickle.loads(pickle.dumps(tensor))) is KernelTucker
    torch.testing.assert_close(twice.dense(), tensor.dense(scale=2.0))
    assert list(tensor._asdict()) == ["core", "factor_out", "factor_in", "factor_basis", "factor_kernel"]
    expanded = torch.einsum("oi...,oa->ai...", tensor.dense(), torch.linalg.pinv(tensor.factor_out).T)
    torch.testing.assert_close(tensor.expand_inputs(), expanded)


def test_a_kernel_of_one_position_is_the_tensor_without_it():
    tensor = random_tucker()
    kernel = tucker_of(tensor.core[..., None], *tensor.factors, torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(kernel.dense(), tensor.dense()[..., None])


def test_a_compiled_graph_takes_a_kernel():
    tensor = random_tucker(*SHAPES[1])

    def run(*components: torch.Tensor) -> torch.Tensor:
        made = tucker_of(*components)
        return made._replace(core=2 * made.core).dense() + made.map(torch.neg).factor_kernel.sum()

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(*tensor), run(*tensor))


def test_contract_is_the_product_of_the_dense_tensor():
    tensor, basis, residual = random_tucker((6, 5, 4)), torch.randn(7, 5, 3).double(), torch.randn(7, 5).double()
    expected = torch.einsum("nik,oik->no", torch.cat([basis, residual[..., None]], -1), tensor.dense())
    torch.testing.assert_close(contract(basis, residual, *tensor), expected)


def test_direct_sum_is_exact_and_differentiable():
    tensors = [random_tucker(ranks=ranks) for ranks in ((2, 3, 1), (1, 1, 4), (3, 2, 2))]
    total = direct_sum(tensors)
    assert total.ranks == (6, 6, 7)
    torch.testing.assert_close(total.dense(), sum(tensor.dense() for tensor in tensors))
    # the blocks are the cores, to the last bit, and there is nothing else
    assert torch.equal(total.core[2:3, 3:4, 1:5], tensors[1].core)
    assert total.core.count_nonzero() == sum(tensor.core.numel() for tensor in tensors)
    assert all(torch.equal(one, other) for one, other in zip(direct_sum(tensors[:1]), tensors[0], strict=True))
    core = tensors[0].core.requires_grad_()
    direct_sum(tensors).dense().sum().backward()
    assert core.grad is not None and core.grad.all()


def test_direct_sum_of_kernels_is_exact():
    tensors = [random_tucker((6, 5, 4, 9), ranks) for ranks in ((2, 3, 1, 2), (1, 1, 4, 3))]
    total = direct_sum(tensors)
    assert total.ranks == (3, 4, 5, 5)
    torch.testing.assert_close(total.dense(), sum(tensor.dense() for tensor in tensors))
    assert torch.equal(total.core[2:, 3:, 1:, 2:], tensors[1].core)
    assert total.core.count_nonzero() == sum(tensor.core.numel() for tensor in tensors)


@given(st.one_of(st.tuples(sizes, sizes), st.tuples(sizes_with_kernel, sizes_with_kernel)))
@settings(max_examples=30, deadline=None)
def test_truncation_of_orthogonal_factors_is_that_of_the_tensor(case):
    tensor = random_tucker(*case).orthogonal()
    small = tensor.truncated((2, 1, 2))
    assert small.ranks == cap_ranks((2, 1, 2), tensor.ranks)
    error = (tensor.dense() - small.dense()).square().sum()
    torch.testing.assert_close(error, tensor.core.square().sum() - small.core.square().sum(), atol=1e-9, rtol=1e-9)
    wanted = (tensor.dense() - tucker(tensor.dense(), small.ranks).dense()).square().sum()
    assert error <= wanted * 1.05 + 1e-9
    assert (tensor.truncated(9).dense() - tensor.dense()).norm() < 1e-9


def test_tucker_of_float32_on_any_backend_keeps_dtype():
    tensorly.set_backend("pytorch")
    decomposition = tucker(random_tucker().dense().float(), (2, 3, 2))
    assert decomposition.core.dtype == torch.float32
    assert not tucker(torch.zeros(3, 4, 5), (2, 2, 2)).dense().any()


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 9)])
def test_hosvd_is_exact_and_its_slices_have_the_singular_values_as_norms(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    decomposition, values = hosvd(tensor)
    assert len(values) == len(shape)
    torch.testing.assert_close(decomposition.dense(), tensor)
    for mode, expected in enumerate(values):
        torch.testing.assert_close(decomposition.core.movedim(mode, 0).flatten(1).norm(dim=1), expected)


@pytest.mark.parametrize("shape", [(6, 5, 4), (4, 4, 3, 3)])
def test_fit_finds_the_minimum_and_leaves_the_start_as_it_is(shape):
    ranks = (2,) * len(shape)
    target, weights = random_tucker(shape, ranks).dense(), torch.rand(shape, dtype=torch.float64) + 0.1
    start = tucker(weights * target, ranks)
    before = start.map(torch.clone)
    with torch.no_grad():
        found = fit(start, lambda tensor: (weights * (tensor - target)).square().sum(), steps=300)
    assert (found.dense() - target).norm() < 1e-3 * target.norm()
    assert all(torch.equal(one, other) for one, other in zip(start, before, strict=True))
    assert not any(part.requires_grad for part in (*found, *start))


def test_orthogonalize_and_balance_change_nothing():
    core = torch.randn(5, 6, 2, dtype=torch.float64)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in ((3, 5), (9, 6), (4, 2))]
    expected = reconstruct(core, *factors)
    orthogonal = Tucker(core, *factors).orthogonal()
    assert orthogonal.ranks == (3, 6, 2)
    for factor in orthogonal.factors:
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double())
    torch.testing.assert_close(orthogonal.dense(), expected)
    torch.testing.assert_close(orthogonal.balanced().dense(), expected)


def test_balanced_factors_have_the_norms_of_a_random_start():
    tensor = random_tucker(*SHAPES[1])
    balanced = tensor.orthogonal().balanced()
    torch.testing.assert_close(balanced.dense(), tensor.dense())
    for factor, gain in zip(balanced.factors, (6**0.5, 1, 2, 1), strict=True):
        torch.testing.assert_close(factor.norm(dim=0), torch.full_like(factor[0], gain))


def test_tucker_scaled_is_tucker_where_the_scale_is_one_and_finds_what_there_is_to_find():
    tensor = torch.randn(6, 5, 4, dtype=torch.float64)
    plain = tucker(tensor, (2, 2, 2)).dense()
    scaled = tucker_scaled(tensor, torch.ones_like(tensor), (2, 2, 2)).dense()
    assert (tensor - scaled).norm() <= (tensor - plain).norm() * (1 + 1e-6)
    low, scale = random_tucker((6, 5, 4), (2, 2, 2)).dense(), torch.randn(6, 5, 1, dtype=torch.float64).expand(6, 5, 4)
    found = tucker_scaled(scale * low, scale, (2, 2, 2))
    assert ((scale * (found.dense() - low)).norm() / (scale * low).norm()) < 1e-2
