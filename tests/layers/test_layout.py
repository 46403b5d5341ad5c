# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Patterns: the axes of a stored parameter in the canonical order and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lotra.layers.layout import parse_layout


@st.composite
def stored_tensors(draw):
    """A layout, the lengths of its axes, and the shape of the parameter."""
    axes = ["o", "i", *draw(st.lists(st.sampled_from("kgt"), min_size=1, max_size=3, unique=True))]
    lengths = {axis: draw(st.integers(1, 4)) for axis in axes}
    order = draw(st.permutations(axes))
    cuts = sorted(draw(st.sets(st.integers(1, len(axes) - 1))))
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(axes)], strict=True)]
    words = ["(" + " ".join(group) + ")" if len(group) > 1 else group[0] for group in groups]
    sizes = [int(torch.tensor([lengths[axis] for axis in group]).prod()) for group in groups]
    packable = [place for place, group in enumerate(groups) if set(group) - {"o", "i"} == set(axes) - {"o", "i"}]
    if packable and draw(st.booleans()):
        place = draw(st.sampled_from(packable))
        rest = [axis for axis in groups[place] if axis in "oi"]
        if rest:
            words[place] = f"(({' '.join(groups[place])}) + {' '.join(rest)})"
            sizes[place] += int(torch.tensor([lengths[axis] for axis in rest]).prod())
    return parse_layout(" ".join(words)), lengths, tuple(sizes)


@given(stored_tensors())
@settings(max_examples=200, deadline=None)
def test_canonical_and_back(stored):
    layout, lengths, shape = stored
    basis = 1
    for axis in layout.basis:
        basis *= lengths[axis]
    parameter = torch.arange(torch.Size(shape).numel()).reshape(shape)
    canonical = layout.to_canonical(parameter, lengths)
    packed = layout.packed_residual is not None
    assert canonical.shape == (lengths["o"], lengths["i"], basis + packed)
    assert sorted(canonical.flatten().tolist()) == list(range(parameter.numel()))
    assert torch.equal(layout.from_canonical(canonical, lengths), parameter)
    assert layout.axis_lengths(shape, lengths) == lengths


def test_an_element_lands_where_the_pattern_says():
    o, i, t, g = torch.meshgrid(*(torch.arange(size) for size in (4, 3, 2, 5)), indexing="ij")
    value = ((o * 10 + i) * 10 + t) * 10 + g
    canonical = value.flatten(-2)
    for pattern, order in (("t o i g", (2, 0, 1, 3)), ("g i o t", (3, 1, 0, 2))):
        layout = parse_layout(pattern)
        lengths = layout.axis_lengths(value.permute(order).shape, {})
        # the basis axes keep the order in which the pattern names them
        expected = canonical if layout.basis == ("t", "g") else value.transpose(-1, -2).flatten(-2)
        assert torch.equal(layout.to_canonical(value.permute(order), lengths), expected)


def test_elements_of_a_grouped_convolution_land_where_the_pattern_says():
    g, o, k, i, h, w = torch.meshgrid(*map(torch.arange, (2, 4, 5, 3, 2, 3)), indexing="ij")
    stored = (((((g * 10 + o) * 10 + k) * 10 + i) * 10 + h) * 10 + w).flatten(2, 3)
    layout = parse_layout("g o (k i) h w", "h w", "g")
    read = layout.to_canonical(stored, layout.axis_lengths(stored.shape, {"i": 3}))
    # output 5 is the second of group 1
    assert read[5, 2, 4, 5].item() == 114212 and read.shape == (8, 3, 5, 6)


def test_a_view_of_two_flattened_axes_mixes_them_as_reshape_does():
    weight = torch.randn(4, 1, 5, 3)  # ReLU-KAN: x (B, I, K) is reshaped, not transposed, to (B, 1, K, I)
    layout = parse_layout("o () (i k):2")
    read = layout.to_canonical(weight, layout.axis_lengths(weight.shape, {"k": 5}))
    basis = torch.randn(7, 3, 5)
    expected = torch.einsum("bxhw,oxhw->bo", basis.reshape(7, 1, 5, 3), weight)
    torch.testing.assert_close(torch.einsum("bik,oik->bo", basis, read), expected)


@pytest.mark.parametrize(
    "pattern, problem",
    [
        ("o k", "`o` and `i` must appear once each"),
        ("o i k k", "no other axis twice"),
        ("o (i k", "parentheses do not match"),
        ("o i k-1", "'k-1' does not consist of axis names"),
        ("o ... i ...", "'...' does not consist of axis names"),
        ("o (i k):0", "':0' does not consist of axis names"),
        ("o (i + i)", "the residual weights, of axes `o` and `i` alone"),
        ("o ((i k) + i + i)", "at most two blocks"),
        ("o ((i k) + )", "does not consist of axis names"),
        ("o ((i k) + (i k))", "the residual weights, of axes `o` and `i` alone"),
    ],
)
def test_malformed_patterns(pattern, problem):
    with pytest.raises(ValueError) as error:
        parse_layout(pattern)
    assert repr(pattern) in str(error.value) and problem in str(error.value)


@pytest.mark.parametrize(
    "pattern, shape, known, problem",
    [
        ("o i k", (4, 3), {}, "it names 3 dimensions, the parameter has 2"),
        ("o i k", (4, 3, 5), {"k": 6}, "dimension 2 would have to be k=6, which 5 is not"),
        ("o (i k)", (4, 16), {"i": 3}, "dimension 1 would have to be i=3 * k=?, which 16 is not"),
        ("o (i k)", (4, 15), {}, "the lengths of i, k do not follow from it"),
        ("o ((i k) + i)", (4, 18), {}, "the lengths of i do not follow from it"),
        ("o ((i k) + i)", (4, 3), {"i": 3}, "i=3 * k=?, which 0 is not"),
    ],
)
def test_a_shape_that_does_not_fit(pattern, shape, known, problem):
    with pytest.raises(ValueError) as error:
        parse_layout(pattern).axis_lengths(shape, known)
    assert f"Pattern {pattern!r} does not fit a parameter of shape {shape}" in str(error.value)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "pattern, first, shared, lengths",
    [
        ("i k", "o i m", ("o",), {"o": 4, "i": 3, "k": 5}),
        ("k", "g o i m", ("g", "o", "i"), {"g": 2, "o": 2, "i": 3, "k": 5}),
        ("() o i ()", "o i m h w", ("h", "w"), {"o": 4, "i": 3, "h": 2, "w": 2}),
    ],
)
def test_a_part_that_is_shared(pattern, first, shared, lengths):
    layout = parse_layout(pattern, "h w", "g", may_share=True).beside(parse_layout(first, "h w", "g"))
    assert layout.shared == shared and layout.beside(parse_layout(first, "h w", "g")) == layout
    stored = torch.randn([lengths.get(name, 1) for name in pattern.split()])
    values = layout.to_canonical(stored, lengths)
    assert values.shape == layout.canonical_shape(lengths)
    torch.testing.assert_close(layout.from_canonical(values, lengths), stored)  # a mean is rounded
    update = torch.randn(values.shape)
    # an update of the parameter is the one whose repetition is nearest to what each edge would have
    rest = update - layout.to_canonical(layout.from_canonical(update, lengths), lengths)
    torch.testing.assert_close(layout.from_canonical(rest, lengths), torch.zeros_like(stored))
    with pytest.raises(ValueError, match="`o` and `i` must appear once"):
        parse_layout("i k")
