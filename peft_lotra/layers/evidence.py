# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Tells from gradients whether a tensor A is the coefficients of a KAN layer.

A KAN layer computes y = f(s) with the sums s[o] = sum_{i,k} A[o,i,k] phi_k(x[i]). Whatever f is, the gradient of any
function of y with respect to A[o,i,k] is d[o] phi_k(x[i]). Two tests follow.

* Outputs: with other weights of the outputs, the gradient changes only by one factor for each output.
* Inputs: if other inputs are exchanged, the gradient in the slice of an input changes only by one factor for each
  output. A normalization of the inputs does not notice an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .coefficients import CoefficientTensor
from .probe import CannotProbe, Gradients, Probe, perturbed


_ROUNDING = 1e-3  # of the largest gradient
_EFFECT = 1e-2  # of the largest gradient: a change that shows
_ROWS = 32  # inputs whose functions are compared


class Verdict(NamedTuple):
    """Whether the axes of outputs and inputs are as described: True, False, or None if that was not checked.

    One False is no contradiction: a layer may mix its outputs or inputs, e.g. by a normalization.

    Attributes:
        reason: Why nothing was checked.
    """

    outputs: bool | None = None
    inputs: bool | None = None
    reason: str = "the layer has one output and fewer than three inputs"

    def __str__(self) -> str:
        if self.outputs is None and self.inputs is None:
            return f"not checked: {self.reason}"
        words = {True: "as described", False: "mixed by the layer, or not as described", None: "not checked"}
        return f"outputs {words[self.outputs]}, inputs {words[self.inputs]}"


class Evidence:
    """The gradients of a layer at one input and at changed ones, shared by all comparisons.

    Attributes:
        x: The input: one sample, unless the user gives it.
        channel: The axis of its features, counted from the end.
        size: The number of input features.
        outputs: The number of output features.
        is_broadcast: Whether the layer also takes inputs of other sizes, over which it sums.
    """

    def __init__(self, probe: Probe, x: Tensor, channel: int, outputs: int) -> None:
        self.probe = probe
        self.x = x
        self.channel = channel
        self.size = x.shape[channel]
        self.outputs = outputs
        self.is_broadcast = False
        self._exchanged: dict[int, list[tuple[slice, Gradients]]] = {}

    def gradients(self, x: Tensor | None = None, **options: Any) -> Gradients:
        """Return the gradients at an input, by default at `x`. See `Probe.gradients` for the options."""
        return self.probe.gradients(self.x if x is None else x, self.channel, **options)

    @cached_property
    def base(self) -> Gradients:
        """The gradients that all others are compared with."""
        gradients = self.gradients()
        if not all(gradient is None or gradient.isfinite().all() for gradient in gradients.values()):
            raise CannotProbe("the outputs have no finite gradient with respect to its parameters")
        return gradients

    @cached_property
    def reweighted(self) -> Gradients:
        """The gradients with other weights of the outputs."""
        return self.gradients(seed=2)

    @cached_property
    def scaled(self) -> list[Gradients]:
        """The gradients at multiples of the input."""
        return [self.gradients(self.x * factor) for factor in (0.3, 0.6, -0.8)]

    def exchanged(self, count: int) -> list[tuple[slice, Gradients]]:
        """Return gradients after half of `count` inputs were exchanged, each with the slice of the other half."""
        if count not in self._exchanged:
            half = count // 2
            blocks = self.x.movedim(self.channel, -1).unflatten(-1, (-1, count))
            pairs = self._exchanged[count] = []
            for constant, varied in ((slice(half), slice(half, None)), (slice(-half, None), slice(-half))):
                values = blocks[..., varied]
                changes = [values.roll(step, -1) for step in range(1, min(values.shape[-1], 3))]
                if count == 2:  # there is nothing to exchange
                    changes = [blocks.mean(-1, keepdim=True)]
                for change in changes:
                    x = blocks.clone()
                    x[..., varied] = change
                    pairs.append((constant, self.gradients(x.flatten(-2).movedim(-1, self.channel))))
        return self._exchanged[count]

    def perturb(self, names: Collection[str]) -> Gradients:
        """Return the gradients at perturbed parameters."""
        return self.gradients(parameters=perturbed(self.probe.parameters, names))

    # What a description says

    def compare_axes(self, tensor: CoefficientTensor) -> Verdict:
        """Compare the axes of described coefficients with the gradients."""
        if not join(self.base, tensor).any():
            return Verdict(reason="the outputs do not depend on its coefficients")
        outputs = self._compare_outputs(tensor)
        if self.size != count_inputs(tensor) or outputs is False:
            return Verdict(outputs, reason=f"it takes inputs of {self.size} features")
        # a normalization notices each change of one of two inputs
        inputs = self._compare_inputs(tensor) if tensor.shape[1] > 2 else None
        return Verdict(outputs, inputs)

    def is_sum(self, tensor: CoefficientTensor) -> bool:
        """Return whether the layer is a sum with these coefficients, of at least two functions of one input each.

        This is stricter than `compare_axes`. Gates and attention change the functions of an input with the other
        inputs, and a single function makes the layer a linear map.
        """
        out, inputs, *_ = tensor.shape
        gradients = [self.base[name] for name in tensor.parameters]
        if not all(gradient is not None and gradient.any() for gradient in gradients):
            return False
        of_outputs = self._compare_outputs(tensor)
        if out > 1 and not of_outputs:
            return False
        of_inputs = self._compare_inputs(tensor) if inputs > 1 else True
        if of_inputs is None:
            of_inputs = inputs == 2 and of_outputs  # a norm of two inputs hides their changes
        return bool(of_inputs) and self._has_functions(tensor) and self.is_nonlinear

    def _compare_outputs(self, tensor: CoefficientTensor) -> bool | None:
        if tensor.shape[0] == 1:
            return None
        gradient, reweighted = join(self.base, tensor), join(self.reweighted, tensor)
        if not is_parallel(gradient, reweighted):
            return False
        if not is_parallel(gradient.reshape(1, 1, -1), reweighted.reshape(1, 1, -1)):
            return True
        # one factor for all outputs says little, as behind a softmax, or a norm of two outputs
        return is_parallel(gradient, gradient[_largest_row(gradient)].expand_as(gradient)) or None

    def _compare_inputs(self, tensor: CoefficientTensor) -> bool | None:
        gradient = join(self.base, tensor)
        result = None
        for constant, gradients in self.exchanged(tensor.shape[1]):
            exchanged = join(gradients, tensor)
            change = _change(gradient, exchanged, constant)
            if change.max() > _EFFECT * max(gradient.abs().max(), exchanged.abs().max()):
                result = bool(change[:, constant].max() <= _ROUNDING * change.max())
                if not result:
                    return False
        return result

    def _has_functions(self, tensor: CoefficientTensor) -> bool:
        """Return whether an input has at least two functions: gradients at several inputs have rank two at least."""
        inputs = tensor.shape[1]
        changed = self.scaled if inputs < 4 else [gradients for _, gradients in self.exchanged(inputs)]
        row = _largest_row(join(self.base, tensor))
        samples = torch.stack([join(gradients, tensor)[row, :_ROWS] for gradients in (self.base, *changed)], dim=1)
        if not samples.isfinite().all():
            return False
        singular = torch.linalg.svdvals(samples.double())
        return bool((singular[:, 1:2] > _EFFECT * _EFFECT * singular.max()).any())

    @cached_property
    def is_nonlinear(self) -> bool:
        """Whether each row of the output depends on its own row of the input only, and not by an affine map.

        With one row, attention is linear in its values. A normalization of two outputs leaves their signs, which may
        be constant: the parameters are perturbed.
        """
        parameters = perturbed(self.probe.parameters, self.probe.parameters)
        *leading, _ = self.x.movedim(self.channel, -1).shape
        if math.prod(leading) < 4:
            leading = [4] if len(leading) == 1 else [2, 2, *[1] * (len(leading) - 2)]
        rows = self.probe.make_input((math.prod(leading), self.size))
        if self.size > 1:
            rows[2] = rows[0].roll(1)  # a normalization does not make them equal
        rows[1] = (rows[0] + rows[2]) / 2

        outputs = []
        for last in (2, 0):  # one row or the other: a norm by the extremes of all rows does not notice
            rows[3] = rows[last]
            y = self.probe.attempt(rows.view(*leading, -1).movedim(-1, self.channel), parameters)
            if y is None or y.dim() != self.x.dim() or y.numel() != y.shape[self.channel] * len(rows):
                return False
            outputs.append(y.movedim(self.channel, -1).flatten(0, -2)[:3])
        first, second = outputs
        rounding = 1e3 * torch.finfo(first.dtype).eps * first.abs().max()
        curvature = (first[0] - 2 * first[1] + first[2]).abs().max()
        is_affine = curvature <= rounding < (first[0] - first[2]).abs().max()
        return bool((first - second).abs().max() <= rounding and not is_affine)

    # What one parameter does

    def stays(
        self, tensor: CoefficientTensor, names: Collection[str], observed: str = "", of_edges: bool = False
    ) -> bool:
        """Return whether perturbed parameters change a gradient only by a factor for each output.

        Args:
            tensor: The coefficients whose gradient is compared.
            names: The parameters that are perturbed.
            observed: Compare only the part of the coefficients with this parameter.
            of_edges: Allow a factor for each edge and branch. The residual branch may have its own factors.
        """
        if observed:
            parts = [part for part in tensor.parts if any(member.name == observed for member in part)]
            tensor = CoefficientTensor(tensor.family, tuple(parts))
        before, after = join(self.base, tensor), join(self.perturb(names), tensor)
        if not of_edges:
            return is_parallel(before, after)
        has_branches = tensor.has_residual and len(tensor.shape) == 3
        sizes = [tensor.shape[2], 1] if has_branches else [before.shape[2]]
        edges = [gradient.flatten(0, 1).unsqueeze(1).split(sizes, -1) for gradient in (before, after)]
        return all(map(is_parallel, *edges))

    def is_additive(self, names: Collection[str]) -> bool:
        """Return whether parameters add to the output: if they are perturbed, no other gradient changes."""
        after: Any = self.perturb(names) if names else self.base
        for name, gradient in self.base.items():
            if gradient is not None and name not in names:
                if not (gradient - after[name]).abs().max() <= _ROUNDING * gradient.abs().max():
                    return False
        return True

    def is_linear(self, names: Collection[str]) -> bool | None:
        """Return whether the output is an affine function of parameters. None if their gradient says nothing."""
        x = self.x if self.probe.x is not None else self.probe.make_input((4, *self.x.shape[1:]))
        ends = []
        for factor in (-2.0, 2.0):  # so far apart that a ReLU behind the sum is met on both sides
            gradients = self.gradients(x, parameters=perturbed(self.probe.parameters, names, torch.randn, factor))
            ends.append(torch.cat([gradients[name].flatten() for name in names if gradients[name] is not None]))
        first, second = ends
        size = (first.abs() + second.abs()).max()
        return bool((first - second).abs().max() <= _EFFECT * size) if 0 < size < math.inf else None


def run_at_sizes(probe: Probe, size: int, kernel: Sequence[int] = ()) -> Iterator[Evidence]:
    """Yield what the layer gives for inputs of `size` features, or channels of a convolution, if it takes them."""
    if probe.x is not None:
        dims = probe.x.dim()
        forms = [(probe.x.shape, channel) for channel in (-1, 1 - dims) if dims > 1 and probe.x.shape[channel] == size]
    elif kernel:
        forms = [((1, size, *(4 * length + 3 for length in kernel)), -1 - len(kernel))]
    else:  # samples; tokens; channels of one point
        forms = [((1, size), -1), ((1, 1, size), -1), ((1, size, 1), -2)]
    for shape, channel in forms:
        x = probe.make_input(shape) if probe.x is None else probe.x
        y = probe.attempt(x)
        takes_points = channel == -1 or bool(kernel) or probe.attempt(x.repeat(1, 1, 3)) is not None
        if y is None or not takes_points:
            continue
        is_row_by_row = y.dim() == x.dim() and x.select(channel, 0).shape == y.select(channel, 0).shape
        if not (is_row_by_row or (kernel and y.dim() == x.dim())):
            probe.error = probe.error or f"for an input {tuple(shape)} it returns {tuple(y.shape)}"
            continue
        evidence = Evidence(probe, x, channel, y.shape[channel])
        yield evidence
        if len(shape) == 2 and evidence.is_nonlinear:  # tokens would say the same
            return


def count_inputs(tensor: CoefficientTensor) -> int:
    """Return the number of inputs of a layer: of all blocks of a convolution with groups."""
    first, *_ = members = tensor.parts[0]
    groups = math.prod([first.lengths[axis] for axis in first.layout.groups])
    return len(members) * groups * tensor.shape[1]


def join(gradients: Gradients, tensor: CoefficientTensor) -> Tensor:
    """Return gradients as one tensor (out, in, rest). They are zero for parameters that all outputs share."""
    like = next(gradient for gradient in gradients.values() if gradient is not None)
    tensors = []
    for member in (member for part in tensor.parts for member in part):
        gradient = gradients[member.name]
        if gradient is None or member.layout.shared:
            gradient = like.new_zeros(member.stored)
        tensors.append(gradient)
    return tensor.join(tensors).flatten(2)


def _largest_row(gradient: Tensor) -> int:
    """Return the output with the largest gradient."""
    return int(gradient.flatten(1).abs().amax(1).argmax())


def _change(first: Tensor, second: Tensor, fitted: slice) -> Tensor:
    """Return the difference of two gradients (out, in, rest), up to the factor of each output that fits a slice."""
    # the smaller of two rows is a multiple of the larger one: a ReLU may have made it zero
    sizes = [gradient[:, fitted].flatten(1).norm(dim=1) for gradient in (first, second)]
    is_smaller = (sizes[0] < sizes[1])[:, None, None]
    larger, smaller = torch.where(is_smaller, second, first), torch.where(is_smaller, first, second)
    x, y = larger[:, fitted].flatten(1), smaller[:, fitted].flatten(1)
    factors = (x * y).sum(1) / (x * x).sum(1).clamp(min=1e-30)
    return (smaller - factors[:, None, None] * larger).abs()


def is_parallel(first: Tensor, second: Tensor) -> bool:
    """Return whether two gradients (out, in, rest) are equal up to a factor for each output."""
    return bool(_change(first, second, slice(None)).max() <= _ROUNDING * first.abs().max())
