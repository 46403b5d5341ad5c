# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Tells from gradients whether a tensor A is the coefficients of a KAN layer.

A KAN layer computes y = f(s) with the sums s[o] = sum_{i,k} A[o,i,k] phi_k(x[i]). Whatever f is, the gradient of any
function of y with respect to A[o,i,k] is d[o] phi_k(x[i]). Two tests follow.

* Outputs: with other weights of the outputs, the gradient changes only by one factor for each output.
* Inputs: if other inputs are exchanged, the gradient in the slice of an input changes only by one factor for each
  output. A normalization of the inputs does not notice an exchange.

The first test compares all outputs at some inputs, the second one all inputs at some outputs. In a layer with many
inputs and outputs both are small parts of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .coefficients import CoefficientTensor
from .probe import GOLDEN_RATIO, CannotProbe, Gradients, Probe, perturbed


_ROUNDING = 1e-3  # of the largest gradient
_EFFECT = 1e-2  # of the largest gradient: a change that shows
_SAMPLE = 32  # outputs or inputs that are compared
_ELEMENTS = 2**16  # of a gradient that are compared


@dataclass
class Evidence:
    """The gradients of a layer at one input and at changed ones, shared by all comparisons.

    Attributes:
        x: The input with its features in the last axis. It is one sample, unless the user gives it.
        channel: The axis of the features in the layer's own order, counted from the end.
        outputs: The number of output features.
        is_broadcast: Whether the layer also takes inputs of other sizes, over which it sums.
    """

    probe: Probe
    x: Tensor
    channel: int
    outputs: int
    is_broadcast: bool = False
    _exchanged: dict[int, list[tuple[slice, Gradients]]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of input features."""
        return self.x.shape[-1]

    def gradients(self, x: Tensor, **options: Any) -> Gradients:
        """Return the gradients at an input. See `Probe.gradients` for the options."""
        return self.probe.gradients(x, self.channel, **options)

    def perturb(self, names: Collection[str]) -> Gradients:
        """Return the gradients at perturbed parameters."""
        return self.gradients(self.x, parameters=perturbed(self.probe.parameters, names))

    @cached_property
    def base(self) -> Gradients:
        """The gradients that all others are compared with."""
        gradients = self.gradients(self.x)
        for gradient in gradients.values():
            if gradient is not None and not _size_of(gradient).isfinite():
                raise CannotProbe("the outputs have no finite gradient with respect to its parameters")
        return gradients

    @cached_property
    def reweighted(self) -> Gradients:
        """The gradients with other weights of the outputs."""
        return self.gradients(self.x, seed=2)

    @cached_property
    def scaled(self) -> list[Gradients]:
        """The gradients at multiples of the input."""
        return [self.gradients(self.x * factor) for factor in (0.3, 0.6, -0.8)]

    def exchanged(self, count: int) -> list[tuple[slice, Gradients]]:
        """Return gradients after half of `count` inputs were exchanged, each with the slice of the other half."""
        if count not in self._exchanged:
            self._exchanged[count] = list(self._exchange(count))
        return self._exchanged[count]

    def _exchange(self, count: int) -> Iterator[tuple[slice, Gradients]]:
        blocks = self.x.unflatten(-1, (-1, count))
        half = count // 2
        for constant in (slice(half), slice(count - half, count)):
            varied = list(range(count))
            del varied[constant]
            values = blocks[..., varied]
            changes = [values.roll(step, -1) for step in (1, 2) if step < len(varied)]
            # a single one is exchanged with nothing
            for change in changes or [blocks.mean(-1, keepdim=True)]:
                x = blocks.clone()
                x[..., varied] = change
                yield constant, self.gradients(x.flatten(-2))

    # What a description says

    def contradicts(self, tensor: CoefficientTensor) -> bool:
        """Return whether the gradients may contradict the axes of described coefficients.

        A layer may also mix its outputs or inputs, e.g. by a normalization.
        """
        if not self._has_effect(tensor):
            return False
        if self._compare_outputs(tensor) is False:
            return True
        # a normalization notices each change of one of two inputs
        has_inputs = self.size == count_inputs(tensor) and tensor.shape[1] > 2
        return has_inputs and self._compare_inputs(tensor) is False

    def is_sum(self, tensor: CoefficientTensor) -> bool:
        """Return whether the layer is a sum with these coefficients, of at least two functions of one input each.

        This is stricter than `contradicts`. Gates and attention change the functions of an input with the other
        inputs, and a single function makes the layer a linear map.
        """
        out, inputs, *_ = tensor.shape
        gradients = [self.base[name] for name in tensor.parameters]
        if any(gradient is None or not gradient.any() for gradient in gradients):
            return False
        has_outputs = self._compare_outputs(tensor)
        if out > 1 and not has_outputs:
            return False
        if inputs > 1:
            has_inputs = self._compare_inputs(tensor)
            if has_inputs is None:
                has_inputs = inputs == 2 and has_outputs  # a norm of two inputs hides their changes
            if not has_inputs:
                return False
        return self._has_functions(tensor) and self.is_nonlinear

    def is_by_output(self, tensor: CoefficientTensor) -> bool:
        """Return whether the gradient has one factor for each output: those parameters change no other one."""
        return self._has_effect(tensor) and self._compare_outputs(tensor) is not False

    def _has_effect(self, tensor: CoefficientTensor) -> bool:
        for member in tensor.members:
            gradient = self.base[member.name]
            if gradient is not None and not member.layout.shared and gradient.any():
                return True
        return False

    def _compare_outputs(self, tensor: CoefficientTensor) -> bool | None:
        if tensor.shape[0] == 1:
            return None
        gradient = join_inputs(self.base, tensor)
        reweighted = join_inputs(self.reweighted, tensor)
        if not _is_parallel(gradient, reweighted):
            return False
        if not _is_parallel(gradient.reshape(1, 1, -1), reweighted.reshape(1, 1, -1)):
            return True
        # one factor for all outputs says little, as behind a softmax, or a norm of two outputs
        largest = gradient[_largest_row(gradient)]
        return _is_parallel(gradient, largest.expand_as(gradient)) or None

    def _compare_inputs(self, tensor: CoefficientTensor) -> bool | None:
        gradient = join_outputs(self.base, tensor)
        result = None
        for constant, gradients in self.exchanged(tensor.shape[1]):
            exchanged = join_outputs(gradients, tensor)
            size = torch.maximum(gradient.abs().max(), exchanged.abs().max())
            change = _change(gradient, exchanged, constant)
            largest = change.max()
            if largest > _EFFECT * size:
                result = True
                if change[:, constant].max() > _ROUNDING * largest:
                    return False
        return result

    def _has_functions(self, tensor: CoefficientTensor) -> bool:
        """Return whether an input has at least two functions: gradients at several inputs have rank two at least."""
        inputs = tensor.shape[1]
        samples = self.scaled
        if inputs >= 4:
            samples = [gradients for _, gradients in self.exchanged(inputs)]
        row = _largest_row(join_outputs(self.base, tensor))
        functions = [join_outputs(gradients, tensor)[row, :_SAMPLE] for gradients in (self.base, *samples)]
        matrices = torch.stack(functions, dim=1)
        if not matrices.isfinite().all():
            return False
        singular = torch.linalg.svdvals(matrices.double())
        return bool((singular[:, 1:2] > _EFFECT**2 * singular.max()).any())

    @cached_property
    def is_nonlinear(self) -> bool:
        """Whether each row of the output depends on its own row of the input only, and not by an affine map.

        With one row, attention is linear in its values. A normalization of two outputs leaves their signs, which may
        be constant: the parameters are perturbed.
        """
        leading = self.x.shape[:-1]
        if math.prod(leading) < 4:
            leading = (4,) if len(leading) == 1 else (2, 2, *leading[2:])
        rows = self.probe.make_input((math.prod(leading), self.size))
        if self.size > 1:
            rows[2] = rows[0].roll(1)  # a normalization does not make them equal
        rows[1] = (rows[0] + rows[2]) / 2

        parameters = perturbed(self.probe.parameters, self.probe.parameters)
        outputs = []
        for last in (2, 0):  # one row or the other: a norm by the extremes of all rows does not notice
            rows[3] = rows[last]
            y = self.probe.attempt(rows.view(*leading, -1), self.channel, parameters)
            if y is None or y.shape[:-1] != leading:
                return False
            outputs.append(y.flatten(0, -2)[:3])
        y, again = outputs
        rounding = 1e3 * torch.finfo(y.dtype).eps * y.abs().max()
        if not (y - again).abs().max() <= rounding:
            return False
        start, middle, end = y
        curvature = (start - 2 * middle + end).abs().max()
        is_affine = curvature <= rounding < (start - end).abs().max()
        return not is_affine

    # What parameters do

    def stays(
        self,
        tensor: CoefficientTensor,
        names: Collection[str],
        observed: str = "",
    ) -> bool:
        """Return whether perturbed parameters change a gradient only by a factor for each output.

        Args:
            tensor: The coefficients whose gradient is compared.
            names: The parameters that are perturbed.
            observed: Compare only the part of the coefficients with this parameter.
        """
        for part in tensor.parts:
            if observed in {member.name for member in part}:
                tensor = CoefficientTensor(tensor.kind, (part,))
        changed = self.perturb(names)
        return _is_parallel(join_inputs(self.base, tensor), join_inputs(changed, tensor))

    def is_additive(self, names: Collection[str]) -> bool:
        """Return whether parameters add to the output: if they are perturbed, no other gradient changes."""
        perturbed_gradients: Any = self.perturb(names) if names else self.base
        for name, gradient in self.base.items():
            if gradient is None or name in names:
                continue
            change = gradient - perturbed_gradients[name]
            if not _size_of(change) <= _ROUNDING * _size_of(gradient):
                return False
        return True

    def is_constant(self, name: str) -> bool:
        """Return whether the gradient of a parameter is the same at all inputs, as that of a bias."""
        base = self.base[name]
        if base is None:
            return True
        largest = _ROUNDING * _size_of(base)
        for gradients in self.scaled:
            gradient = gradients[name]
            # a layer may use a parameter at some inputs only
            if gradient is None or not _size_of(gradient - base) <= largest:
                return False
        return True

    def is_linear(self, names: Collection[str]) -> bool | None:
        """Return whether the output is an affine function of parameters. None if their gradient says nothing."""
        x = self.x
        if self.probe.x is None:
            x = self.probe.make_input((4, *x.shape[1:]))
        ends = []
        for factor in (-2.0, 2.0):  # so far apart that a ReLU behind the sum is met on both sides
            parameters = perturbed(self.probe.parameters, names, torch.randn, factor)
            gradients = self.gradients(x, parameters=parameters)
            # `join` leaves out what the outputs share, in which a sum is seldom linear
            named = [gradients[name] for name in names]
            flat = [_sample_elements(gradient) for gradient in named if gradient is not None]
            if not flat:
                return None
            ends.append(torch.cat(flat))
        first, second = ends
        size = (first.abs() + second.abs()).max()
        if not 0 < size < math.inf:
            return None
        return bool((first - second).abs().max() <= _EFFECT * size)


def run_at_sizes(
    probe: Probe,
    size: int,
    kernel: Sequence[int] = (),
) -> Iterator[Evidence]:
    """Yield the outputs of the layer for inputs of `size` features, or channels of a convolution, if it takes them."""
    for x, channel in _make_inputs(probe, size, kernel):
        y = probe.attempt(x, channel)
        if y is None:
            continue
        # in channels, one point must not be taken for one feature
        if channel == -2 and not kernel:
            three_points = x.repeat(1, 3, 1)
            if probe.attempt(three_points, channel) is None:
                continue
        if kernel:
            has_rows = y.dim() == x.dim()
        else:
            has_rows = y.shape[:-1] == x.shape[:-1]
        if not has_rows:
            x_shape = tuple(x.movedim(-1, channel).shape)
            y_shape = tuple(y.movedim(-1, channel).shape)
            probe.error = probe.error or f"for an input {x_shape} it returns {y_shape}"
            continue
        evidence = Evidence(probe, x, channel, y.shape[-1])
        yield evidence
        if x.dim() == 2 and evidence.is_nonlinear:  # tokens would say the same
            return


def _make_inputs(
    probe: Probe,
    size: int,
    kernel: Sequence[int],
) -> list[tuple[Tensor, int]]:
    """Return inputs with `size` features in the last axis, and the axis of the features in the layer's own order."""
    if probe.x is not None:
        inputs = []
        for channel in (-1, 1 - probe.x.dim()):
            if channel < 0 and probe.x.shape[channel] == size:
                inputs.append((probe.x.movedim(channel, -1), channel))
        return inputs
    if kernel:
        lengths = [4 * length + 3 for length in kernel]
        image = probe.make_input((1, *lengths, size))
        return [(image, -1 - len(kernel))]
    tokens = probe.make_input((1, 1, size))
    return [(tokens[0], -1), (tokens, -1), (tokens, -2)]


def count_inputs(tensor: CoefficientTensor) -> int:
    """Return the number of inputs of a layer: of all blocks of a convolution with groups."""
    first, *others = tensor.parts[0]
    groups = math.prod([first.lengths[axis] for axis in first.layout.groups])
    return (1 + len(others)) * groups * tensor.shape[1]


def join_inputs(gradients: Gradients, tensor: CoefficientTensor) -> Tensor:
    """Return gradients as one tensor (out, some inputs, rest). See `_join`."""
    return _join(gradients, tensor, 1)


def join_outputs(gradients: Gradients, tensor: CoefficientTensor) -> Tensor:
    """Return gradients as one tensor (some outputs, in, rest). See `_join`."""
    return _join(gradients, tensor, 0)


def _join(gradients: Gradients, tensor: CoefficientTensor, axis: int) -> Tensor:
    """Join a sample of the gradients. They are zero for parameters that all outputs share."""
    like = next(gradient for gradient in gradients.values() if gradient is not None)
    tensors = []
    for member in tensor.members:
        gradient = gradients[member.name]
        if gradient is None or member.layout.shared:
            gradient = like.new_zeros(()).expand(member.stored)
        tensors.append(gradient)
    positions = _sample_positions(tensor.shape[axis], _SAMPLE).to(like.device)
    return tensor.join_sample(tensors, axis, positions).flatten(2)


def _sample_positions(length: int, count: int) -> Tensor:
    """Return `count` positions of an axis, with both ends, or all. Steps of the golden ratio meet no period of it."""
    if length <= count:
        return torch.arange(length, device="cpu")
    steps = torch.arange(1, count - 1, dtype=torch.float64, device="cpu")
    positions = (steps * GOLDEN_RATIO).frac().mul(length).long()
    ends = torch.tensor([0, length - 1], device="cpu")
    return torch.cat([ends, positions]).unique()


def _size_of(gradient: Tensor) -> Tensor:
    """Return the largest absolute value, in one pass and without a copy."""
    return torch.linalg.vector_norm(gradient, math.inf)


def _sample_elements(gradient: Tensor) -> Tensor:
    flat = gradient.flatten()
    return flat[_sample_positions(len(flat), _ELEMENTS).to(flat.device)]


def _largest_row(gradient: Tensor) -> int:
    """Return the output with the largest gradient."""
    sizes = gradient.flatten(1).abs().amax(1)
    return int(sizes.argmax())


def _change(first: Tensor, second: Tensor, fitted: slice) -> Tensor:
    """Return the difference of two gradients (out, in, rest), up to the factor of each output that fits a slice."""
    size = _multiply(first, first, fitted)
    other_size = _multiply(second, second, fitted)
    # the smaller of two rows is a multiple of the larger one: a ReLU may have made it zero
    is_smaller = size < other_size
    larger = torch.where(is_smaller, second, first)
    smaller = torch.where(is_smaller, first, second)
    # by least squares
    factors = _multiply(first, second, fitted) / torch.maximum(size, other_size).clamp(min=1e-30)
    return (smaller - factors * larger).abs()


def _multiply(first: Tensor, second: Tensor, fitted: slice) -> Tensor:
    """Return the products (out, 1, 1) of the rows of two gradients, in a slice of the inputs."""
    return (first * second)[:, fitted].sum((1, 2), keepdim=True)


def _is_parallel(first: Tensor, second: Tensor) -> bool:
    """Return whether two gradients (out, in, rest) are equal up to a factor for each output."""
    change = _change(first, second, slice(None))
    return bool(change.max() <= _ROUNDING * first.abs().max())
