# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import pickle

import pytest
import tensorly
import tensorly.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lotra.tucker import (
    Tucker,
    cap_ranks,
    check_ranks,
    component_shapes,
    count_parameters,
    direct_sum,
    expand_inputs,
    fit,
    hosvd,
    reconstruct,
    relative_energy,
    truncated_hosvd,
    tucker,
    tucker_scaled,
)


sizes = st.tuples(*[st.integers(1, 6)] * 3)
sizes_with_kernel = st.tuples(*[st.integers(1, 5)] * 4)
shapes_and_ranks = st.one_of(st.tuples(sizes, sizes), st.tuples(sizes_with_kernel, sizes_with_kernel))
SHAPES = [((6, 5, 4), (2, 3, 1)), ((6, 5, 4, 9), (2, 3, 1, 4))]


def random_tucker(shape=(6, 5, 4), ranks=(2, 3, 2)) -> Tucker:
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    return Tucker(torch.randn(ranks, dtype=torch.float64), *factors)


def filter_factors(tensor: Tucker) -> list[torch.Tensor]:
    """The factors of the modes that are not full."""
    return [factor for factor in tensor.factors if factor is not None]


def form_of(shape, ranks) -> tuple:
    """Ranks, "full" where they are the sizes."""
    return tuple("full" if rank == size else rank for size, rank in zip(shape, ranks, strict=True))


def drop_factors(tensor: Tucker) -> Tucker:
    """The same tensor, whose square factors the core takes in."""
    return tensor.raised(tensor.ranks)


@given(shapes_and_ranks)
@settings(max_examples=60, deadline=None)
def test_the_dense_tensor_equals_tensorly(case):
    tensorly.set_backend("pytorch")
    core, *factors = tensor = random_tucker(*case)
    assert tensor.dense().shape == tensor.shape == case[0] and tensor.ranks == case[1]
    torch.testing.assert_close(tensor.dense(), tensorly.tucker_to_tensor((core, factors)))
    expanded = expand_inputs(core, *factors[1:])
    torch.testing.assert_close(torch.tensordot(factors[0], expanded, 1), tensor.dense())


@pytest.mark.parametrize("ranks", [(2, 3, 2), (2, 3, 2, 3)])
def test_the_dense_tensor_is_differentiable_and_of_the_dtype_of_the_components(ranks):
    tensor = random_tucker((4,) * len(ranks), ranks)
    assert torch.autograd.gradgradcheck(reconstruct, [part.requires_grad_() for part in tensor])
    assert tensor.map(torch.Tensor.bfloat16).dense(0.5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "r, shape, expected",
    [
        (4, (10, 3, 8), (4, 3, 4)),
        (100, (10, 3, 8), (10, 3, 8)),
        ((2, 9, 5), (10, 3, 8), (2, 3, 5)),
        (4, (10, 3, 8, 9), (4, 3, 4, 4)),
        ((2, 9, 5), (10, 3, 8, 9), (2, 3, 5, 9)),  # the kernel is small, and stays whole
        ((2, 9, 5, 99), (10, 3, 8, 9), (2, 3, 5, 9)),
        ((2, 9, 5, 4), (10, 3, 8), (2, 3, 5)),  # a dense layer of the same network
        ("full", (10, 3, 8, 9), (10, 3, 8, 9)),
        (("full", "full", 1), (10, 3, 8), (10, 3, 1)),
    ],
)
def test_cap_ranks(r, shape, expected):
    assert cap_ranks(r, shape) == expected


@pytest.mark.parametrize(
    "r",
    [
        0,
        2.0,
        True,
        None,
        "4",
        (),
        (4, 4),
        (4,) * 5,
        (4, 0, 4),
        (4, True, 4),
        (4, 4, 4, 2.0),
        "ful",
        ("full", "ful", 1),
    ],
)
def test_check_ranks(r):
    assert check_ranks(1) == 1 and check_ranks([1, 2, 3]) == (1, 2, 3)
    assert check_ranks("full") == "full" and check_ranks(["full", 2, "full", 1]) == ("full", 2, "full", 1)
    with pytest.raises(ValueError, match='`r` should be a positive integer or "full"') as error:
        check_ranks(r)
    assert str(r) in str(error.value)


@pytest.mark.parametrize("shape, ranks", SHAPES)
def test_a_tensor_is_the_tuple_of_its_components(shape, ranks):
    tensor = random_tucker(shape, ranks)
    names = ["core", "factor_out", "factor_in", "factor_basis", "factor_kernel"][: len(tensor)]
    assert list(tensor._asdict()) == names and tensor.numel() == sum(part.numel() for part in tensor)
    assert all(getattr(tensor, name) is part for name, part in zip(names, tensor, strict=True))
    twice = tensor._replace(core=2 * tensor.core)
    torch.testing.assert_close(twice.dense(), tensor.dense(scale=2.0))
    for same in (twice, tensor.map(torch.clone), pickle.loads(pickle.dumps(tensor))):
        assert type(same) is Tucker and same.shape == shape

    @torch.compile(fullgraph=True, backend="eager")
    def doubled(*parts: torch.Tensor) -> torch.Tensor:
        tensor = Tucker(*parts)
        return tensor._replace(core=2 * tensor.core).dense()

    torch.testing.assert_close(doubled(*tensor), twice.dense())
    padded = tensor.padded(6).dense()
    assert padded.shape[2] == 6 and not padded[:, :, 4:].any()
    torch.testing.assert_close(padded[:, :, :4], tensor.dense())


@pytest.mark.parametrize("shape, ranks", SHAPES)
def test_direct_sum_is_exact_and_differentiable(shape, ranks):
    tensors = [random_tucker(shape, ranks), random_tucker(shape, (1, 1, 4, 3)[: len(ranks)])]
    total = direct_sum(tensors)
    assert total.ranks == (3, 4, 5, 7)[: len(ranks)]
    torch.testing.assert_close(total.dense(), tensors[0].dense() + tensors[1].dense())
    # the blocks are the cores, to the last bit, and there is nothing else
    assert torch.equal(total.core[tuple(slice(rank, None) for rank in ranks)], tensors[1].core)
    assert total.core.count_nonzero() == sum(tensor.core.numel() for tensor in tensors)
    core = tensors[0].core.requires_grad_()
    direct_sum(tensors).dense().sum().backward()
    assert core.grad is not None and core.grad.all()


@given(shapes_and_ranks)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape, ranks",
    [((64, 16, 8), (4, 4, 4)), ((16, 1, 5), (4, 1, 4)), ((7, 13, 11), (1, 1, 1)), ((12, 9, 5, 9), (2, 3, 2, 4))],
)
def test_tucker_is_as_close_to_a_tensor_as_tensorly(shape, ranks, dtype):
    torch.manual_seed(0)
    tensor = random_tucker(shape, ranks).dense()
    tensor = (tensor / tensor.norm() + 0.3 * torch.randn(shape).double() / tensor.numel() ** 0.5).to(dtype)
    with tensorly.backend_context("pytorch"):
        reference = tensorly.decomposition.tucker(tensor.double(), ranks, n_iter_max=20, tol=1e-6)
        expected = (tensorly.tucker_to_tensor(reference) - tensor).norm()

    approximation = tucker(tensor, ranks)

    assert approximation.ranks == ranks and approximation.core.dtype == dtype
    assert approximation.form == form_of(shape, ranks)
    for factor in filter_factors(approximation):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=dtype))
    error = (approximation.dense() - tensor).double().norm()
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [(7, 1, 2), (7, 2, 3)])
def test_ranks_above_the_product_of_the_others_have_orthonormal_factors(ranks):
    factor = tucker(torch.randn(8, 2, 3), ranks).factor_out

    torch.testing.assert_close(factor.T @ factor, torch.eye(7))


def test_the_approximation_of_zeros_is_zero():
    assert not tucker(torch.zeros(3, 4, 5), (2, 2, 2)).dense().any()


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 9)])
def test_hosvd_is_exact_and_its_slices_have_the_singular_values_as_norms(shape):
    tensor = torch.randn(shape, dtype=torch.float64)
    decomposition, values = hosvd(tensor)
    torch.testing.assert_close(decomposition.dense(), tensor)
    torch.testing.assert_close(truncated_hosvd(tensor, shape).dense(), tensor)
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


@pytest.mark.parametrize("shape, ranks", [((3, 9, 4), (5, 6, 2)), SHAPES[1]])
def test_orthogonal_and_balanced_are_the_same_tensor(shape, ranks):
    tensor = random_tucker(shape, ranks)
    orthogonal = tensor.orthogonal()
    assert orthogonal.ranks == cap_ranks(tuple(ranks), shape)
    assert orthogonal.form == form_of(shape, orthogonal.ranks)
    for factor in filter_factors(orthogonal):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double())
    torch.testing.assert_close(orthogonal.dense(), tensor.dense())
    balanced = orthogonal.balanced()
    torch.testing.assert_close(balanced.dense(), tensor.dense())
    for factor, gain in zip(balanced.factors, (shape[0] ** 0.5, 1, 2, 1), strict=False):
        if factor is not None:
            torch.testing.assert_close(factor.norm(dim=0), torch.full_like(factor[0], gain))


def test_tucker_scaled_is_tucker_where_the_scale_is_one_and_finds_what_there_is_to_find():
    tensor = torch.randn(6, 5, 4, dtype=torch.float64)
    plain = tucker(tensor, (2, 2, 2)).dense()
    scaled = tucker_scaled(tensor, torch.ones_like(tensor), (2, 2, 2)).dense()
    assert (tensor - scaled).norm() <= (tensor - plain).norm() * (1 + 1e-6)
    low, scale = random_tucker((6, 5, 4), (2, 2, 2)).dense(), torch.randn(6, 5, 1, dtype=torch.float64).expand(6, 5, 4)
    found = tucker_scaled(scale * low, scale, (2, 2, 2))
    assert ((scale * (found.dense() - low)).norm() / (scale * low).norm()) < 1e-2


FULL = [((6, 5, 4), (6, 5, 1)), ((6, 5, 4), (6, 5, 4)), ((6, 5, 4, 9), (2, 5, 1, 9)), ((1, 3, 3), (1, 3, 2))]


@pytest.mark.parametrize("shape, ranks", FULL)
def test_a_rank_of_the_size_of_its_mode_has_no_factor(shape, ranks):
    square = random_tucker(shape, ranks)

    full = drop_factors(square)

    form = form_of(shape, ranks)
    assert full.form == form and full.shape == shape and full.ranks == ranks
    assert full.numel() == count_parameters(cap_ranks(form, shape), shape)
    assert {name: tuple(part.shape) for name, part in full._asdict().items()} == component_shapes(ranks, shape)
    torch.testing.assert_close(full.dense(), square.dense())
    for same in (full.orthogonal(), full.orthogonal().balanced(), tucker(square.dense(), ranks)):
        assert same.form == form
        torch.testing.assert_close(same.dense(), square.dense())
    truncated = full.orthogonal().truncated(tuple(min(rank, 2) for rank in ranks))
    assert truncated.shape == shape and max(truncated.ranks) <= 2


@pytest.mark.parametrize("shape, ranks", FULL)
@pytest.mark.parametrize("full_first", [True, False])
def test_a_mode_that_is_full_in_one_tensor_is_full_in_the_sum(shape, ranks, full_first):
    full = drop_factors(random_tucker(shape, ranks))
    other = random_tucker(shape, (1,) * len(shape))
    tensors = [full, other] if full_first else [other, full]

    total = direct_sum(tensors)

    expected = ["full" if rank == "full" else rank + 1 for rank in full.form]
    assert list(total.form) == expected
    torch.testing.assert_close(total.dense(), full.dense() + other.dense())


@pytest.mark.parametrize("ranks", [(6, 5, 4), (6, 5, 2), (2, 5, 4)])
def test_slices_paddings_and_changes_of_the_basis_mode(ranks):
    tensor = drop_factors(random_tucker((6, 5, 4), ranks))
    dense, matrix = tensor.dense(), torch.randn(7, 4, dtype=torch.float64)

    torch.testing.assert_close(tensor.sliced(slice(1, 3)).dense(), dense[:, :, 1:3])
    torch.testing.assert_close(tensor.on_basis(matrix).dense(), dense @ matrix.T)
    torch.testing.assert_close(tensor.padded(6).dense(), torch.nn.functional.pad(dense, (0, 2)))


def test_the_share_of_nothing_in_nothing_is_zero():
    zero = torch.zeros(2, 3)

    assert relative_energy(zero, zero) == 0
