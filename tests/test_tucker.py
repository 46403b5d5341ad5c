# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import pickle

import pytest
import tensorly
import tensorly.decomposition
import torch
from helpers import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_lotra.tucker import (
    Tucker,
    cap_ranks,
    check_ranks,
    component_shapes,
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
each_shape = pytest.mark.parametrize(("shape", "ranks"), [((6, 5, 4), (2, 3, 1)), ((6, 5, 4, 9), (2, 3, 1, 4))])
each_full_shape = pytest.mark.parametrize(
    ("shape", "ranks"),
    [((6, 5, 4), (6, 5, 1)), ((6, 5, 4), (6, 5, 4)), ((6, 5, 4, 9), (2, 5, 1, 9)), ((1, 3, 3), (1, 3, 2))],
)


def random_tucker(shape=(6, 5, 4), ranks=(2, 3, 2)):
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    return Tucker(torch.randn(ranks, dtype=torch.float64), *factors)


def form_of(shape, ranks):
    """Ranks, "full" where they are the sizes."""
    return tuple("full" if rank == size else rank for size, rank in zip(shape, ranks, strict=True))


def drop_factors(tensor):
    """The same tensor, whose square factors the core takes in."""
    return tensor.raised(tensor.ranks)


def check_orthonormal(tensor):
    for factor in tensor.factors:
        if factor is not None:
            identity = torch.eye(factor.shape[1], dtype=factor.dtype)
            assert_close(factor.T @ factor, identity)


# --- Dense tensors ---


@given(shapes_and_ranks)
@settings(max_examples=60, deadline=None)
def test_the_dense_tensor_equals_tensorly(case):
    tensorly.set_backend("pytorch")
    tensor = random_tucker(*case)
    core, *factors = tensor

    dense = tensor.dense()

    assert dense.shape == tensor.shape == case[0]
    assert tensor.ranks == case[1]
    assert_close(dense, tensorly.tucker_to_tensor((core, factors)))
    if len(factors) == 3:
        assert_close(torch.tensordot(factors[0], expand_inputs(core, *factors[1:]), 1), dense)


@pytest.mark.parametrize("ranks", [(2, 3, 2), (2, 3, 2, 3)])
def test_the_dense_tensor_is_differentiable_and_of_the_dtype_of_the_components(ranks):
    tensor = random_tucker((4,) * len(ranks), ranks)

    assert torch.autograd.gradgradcheck(reconstruct, [part.requires_grad_() for part in tensor])
    assert tensor.map(torch.Tensor.bfloat16).dense(0.5).dtype == torch.bfloat16


@each_shape
def test_a_tensor_is_the_tuple_of_its_components(shape, ranks):
    tensor = random_tucker(shape, ranks)

    names = ["core", "factor_out", "factor_in", "factor_basis", "factor_kernel"]
    assert list(tensor._asdict()) == names[: len(tensor)]
    for name, part in tensor._asdict().items():
        assert getattr(tensor, name) is part
    assert tensor.numel() == sum(part.numel() for part in tensor)
    for copied in (tensor.map(torch.clone), pickle.loads(pickle.dumps(tensor))):
        assert type(copied) is Tucker
        assert_equal(tuple(copied), tuple(tensor))


@each_shape
def test_a_core_is_replaced_also_in_compiled_code(shape, ranks):
    tensor = random_tucker(shape, ranks)

    def double(*parts):
        tensor = Tucker(*parts)
        return tensor._replace(core=2 * tensor.core).dense()

    compiled = torch.compile(double, fullgraph=True, backend="eager")

    for function in (double, compiled):
        assert_close(function(*tensor), tensor.dense(scale=2.0))


# --- Ranks ---


@pytest.mark.parametrize(
    ("r", "shape", "expected"),
    [
        (4, (10, 3, 8), (4, 3, 4)),
        (100, (10, 3, 8), (10, 3, 8)),
        ((2, 9, 5), (10, 3, 8, 9), (2, 3, 5, 9)),  # the kernel is small, and stays whole
        ((2, 9, 5, 99), (10, 3, 8, 9), (2, 3, 5, 9)),
        ((2, 9, 5, 4), (10, 3, 8), (2, 3, 5)),  # a dense layer of the same network
        ("full", (10, 3, 8, 9), (10, 3, 8, 9)),
        (("full", "full", 1), (10, 3, 8), (10, 3, 1)),
    ],
)
def test_ranks_are_at_most_the_sizes(r, shape, expected):
    assert cap_ranks(r, shape) == expected


NOT_ONE_RANK = [0, 2.0, True, None, "4", "ful"]
NOT_RANKS_OF_MODES = [(), (4, 4), (4,) * 5, (4, 0, 4), (4, True, 4), (4, 4, 4, 2.0), ("full", "ful", 1)]


@pytest.mark.parametrize("r", NOT_ONE_RANK + NOT_RANKS_OF_MODES)
def test_ranks_that_are_no_positive_integers_are_refused(r):
    with pytest.raises(ValueError, match='`r` should be a positive integer or "full"') as error:
        check_ranks(r)

    assert str(r) in str(error.value)


# --- Sums, truncations and changes of a mode ---


@each_shape
def test_a_direct_sum_is_exact(shape, ranks):
    tensors = [random_tucker(shape, ranks), random_tucker(shape, (1, 1, 4, 3)[: len(ranks)])]

    total = direct_sum(tensors)

    assert total.ranks == (3, 4, 5, 7)[: len(ranks)]
    assert_close(total.dense(), tensors[0].dense() + tensors[1].dense())
    # the blocks are the cores, to the last bit, and there is nothing else
    assert_equal(total.core[tuple(slice(rank, None) for rank in ranks)], tensors[1].core)
    assert total.core.count_nonzero() == sum(tensor.core.numel() for tensor in tensors)


@given(shapes_and_ranks)
@settings(max_examples=30, deadline=None)
def test_truncation_of_orthogonal_factors_is_that_of_the_tensor(case):
    tensor = random_tucker(*case).orthogonal()
    dense = tensor.dense()

    small = tensor.truncated((2, 1, 2))

    assert small.ranks == cap_ranks((2, 1, 2), tensor.ranks)
    error = (dense - small.dense()).square().sum()
    assert_close(error, tensor.core.square().sum() - small.core.square().sum(), atol=1e-9, rtol=1e-9)
    best_error = (dense - tucker(dense, small.ranks).dense()).square().sum()
    assert error <= best_error * 1.05 + 1e-9
    assert_close(tensor.truncated(9).dense(), dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranks", [(6, 5, 4), (6, 5, 2), (2, 5, 4), (2, 3, 1)])
def test_slices_paddings_and_changes_of_the_basis_mode(ranks):
    tensor = drop_factors(random_tucker((6, 5, 4), ranks))
    dense, matrix = tensor.dense(), torch.randn(7, 4, dtype=torch.float64)

    assert_close(tensor.sliced(slice(1, 3)).dense(), dense[:, :, 1:3])
    assert_close(tensor.on_basis(matrix).dense(), dense @ matrix.T)
    assert_close(tensor.padded(6).dense(), torch.nn.functional.pad(dense, (0, 2)))


@pytest.mark.parametrize(("shape", "ranks"), [((3, 9, 4), (5, 6, 2)), ((6, 5, 4, 9), (2, 3, 1, 4))])
def test_orthogonal_and_balanced_are_the_same_tensor(shape, ranks):
    tensor = random_tucker(shape, ranks)

    orthogonal = tensor.orthogonal()
    balanced = orthogonal.balanced()

    assert orthogonal.ranks == cap_ranks(ranks, shape)
    assert orthogonal.form == form_of(shape, orthogonal.ranks)
    check_orthonormal(orthogonal)
    assert_close(orthogonal.dense(), tensor.dense())
    assert_close(balanced.dense(), tensor.dense())
    for factor, gain in zip(balanced.factors, (shape[0] ** 0.5, 1, 2, 1), strict=False):
        if factor is not None:
            assert_close(factor.norm(dim=0), torch.full_like(factor[0], gain))


@each_full_shape
def test_a_rank_of_the_size_of_its_mode_has_no_factor(shape, ranks):
    square = random_tucker(shape, ranks)

    full = drop_factors(square)

    form = form_of(shape, ranks)
    assert (full.form, full.shape, full.ranks) == (form, shape, ranks)
    assert {name: tuple(part.shape) for name, part in full._asdict().items()} == component_shapes(ranks, shape)
    for tensor in (full, full.orthogonal(), full.orthogonal().balanced(), tucker(square.dense(), ranks)):
        assert tensor.form == form
        assert_close(tensor.dense(), square.dense())
    truncated = full.orthogonal().truncated(tuple(min(rank, 2) for rank in ranks))
    assert truncated.shape == shape
    assert max(truncated.ranks) <= 2


# --- Decompositions ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((64, 16, 8), (4, 4, 4)), ((16, 1, 5), (4, 1, 4)), ((7, 13, 11), (1, 1, 1)), ((12, 9, 5, 9), (2, 3, 2, 4))],
)
def test_tucker_is_as_close_to_a_tensor_as_tensorly(shape, ranks, dtype):
    signal, noise = random_tucker(shape, ranks).dense(), torch.randn(shape).double()
    tensor = (signal / signal.norm() + 0.3 * noise / noise.numel() ** 0.5).to(dtype)
    with tensorly.backend_context("pytorch"):
        reference = tensorly.decomposition.tucker(tensor.double(), ranks, n_iter_max=20, tol=1e-6)
        expected = (tensorly.tucker_to_tensor(reference) - tensor).norm()

    approximation = tucker(tensor, ranks)

    assert approximation.ranks == ranks
    assert approximation.core.dtype == dtype
    assert approximation.form == form_of(shape, ranks)
    check_orthonormal(approximation)
    error = (approximation.dense() - tensor).double().norm()
    assert_close(error, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [(7, 1, 2), (7, 2, 3)])
def test_ranks_above_the_product_of_the_others_have_orthonormal_factors(ranks):
    factor = tucker(torch.randn(8, 2, 3), ranks).factor_out

    assert_close(factor.T @ factor, torch.eye(7))


def test_the_approximation_of_zeros_is_zero():
    assert not tucker(torch.zeros(3, 4, 5), (2, 2, 2)).dense().any()


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 9)])
def test_hosvd_is_exact_and_its_slices_have_the_singular_values_as_norms(shape):
    tensor = torch.randn(shape, dtype=torch.float64)

    decomposition, values = hosvd(tensor)

    assert_close(decomposition.dense(), tensor)
    assert_close(truncated_hosvd(tensor, shape).dense(), tensor)
    for mode, expected in enumerate(values):
        assert_close(decomposition.core.movedim(mode, 0).flatten(1).norm(dim=1), expected)


@pytest.mark.parametrize("shape", [(6, 5, 4), (4, 4, 3, 3)])
@torch.no_grad()
def test_fit_finds_the_minimum_and_leaves_the_start_as_it_is(shape):
    ranks = (2,) * len(shape)
    target, weights = random_tucker(shape, ranks).dense(), torch.rand(shape, dtype=torch.float64) + 0.1
    start = tucker(weights * target, ranks)
    before = start.map(torch.clone)

    fitted = fit(start, lambda tensor: (weights * (tensor - target)).square().sum())

    assert (fitted.dense() - target).norm() < 1e-3 * target.norm()
    assert_equal(tuple(start), tuple(before))
    assert not any(part.requires_grad for part in (*fitted, *start))


def test_tucker_scaled_finds_a_tensor_of_low_rank_behind_its_scales():
    low = random_tucker((6, 5, 4), (2, 2, 2)).dense()
    scale = torch.randn(6, 5, 1, dtype=torch.float64).expand(6, 5, 4)

    fitted = tucker_scaled(scale * low, scale, (2, 2, 2))

    error = (scale * (fitted.dense() - low)).norm()
    assert error < 1e-2 * (scale * low).norm()


def test_the_share_of_nothing_in_nothing_is_zero():
    zero = torch.zeros(2, 3)

    assert relative_energy(zero, zero) == 0
