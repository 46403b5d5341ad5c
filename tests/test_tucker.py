# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lotra.tucker import cap_ranks, check_ranks, reconstruct


sizes = st.tuples(*[st.integers(1, 6)] * 3)


@given(sizes, sizes)
@settings(max_examples=50, deadline=None)
def test_reconstruct_equals_tensorly(shape, ranks):
    tensorly.set_backend("pytorch")
    core = torch.randn(ranks, dtype=torch.float64)
    factors = [torch.randn(size, rank, dtype=torch.float64) for size, rank in zip(shape, ranks, strict=True)]
    tensor = reconstruct(core, *factors)
    assert tensor.shape == shape
    torch.testing.assert_close(tensor, tensorly.tucker_to_tensor((core, factors)))


def test_reconstruct_is_differentiable_in_all_components():
    core = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
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
    ],
)
def test_cap_ranks(r, shape, expected):
    assert cap_ranks(r, shape) == expected


@pytest.mark.parametrize("r, expected", [(1, 1), ((1, 2, 3), (1, 2, 3)), ([1, 2, 3], (1, 2, 3))])
def test_check_ranks_accepts(r, expected):
    assert check_ranks(r) == expected and type(check_ranks(r)) is type(expected)


@pytest.mark.parametrize(
    "r",
    [0, -1, 2.0, True, None, "4", (), (4,), (4, 4), (4, 4, 4, 4), (4, 0, 4), (4, 4, -1), (4, 4, 4.0), (4, True, 4)],
)
def test_check_ranks_refuses(r):
    with pytest.raises(ValueError, match="`r` should be a positive integer value") as error:
        check_ranks(r)
    assert str(r) in str(error.value)
