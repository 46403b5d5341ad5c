# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a layer that compare its gradients with a description.

A KAN layer computes y = f(s) with the sums s[o] = sum_{i,k} A[o,i,k] phi_k(x[i]). The gradient of any function of its
outputs with respect to A[o,i,k] is then d[o] phi_k(x[i]), whatever f is. Two tests follow.

* Outputs: with other weights of the outputs, the gradient stays up to one factor for each output.
* Inputs: if other inputs are exchanged, the gradient in the slice of an input stays up to one factor for each output.
  A normalization of the inputs does not notice an exchange.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..modules.calls import call_with_parameters
from .coefficients import CoefficientTensor


_ROUNDING = 1e-3  # of the largest gradient
_EFFECT = 1e-2  # of the largest gradient: a change that shows
_ROWS = 32  # inputs whose functions are compared
_SEED = 16180339  # with the seed of the layer's own initialization, noise and coefficients would be proportional
_SETTINGS = (str, FunctionType, BuiltinFunctionType, Number)  # Number: of numpy too
_CACHE: WeakKeyDictionary[type, dict[Any, Any]] = WeakKeyDictionary()

T = TypeVar("T")
Gradients = Mapping[str, Tensor | None]


class Undecided(Exception):
    """Nothing can be said about a layer now; the message is the reason."""


@contextmanager
def _foreign_code() -> Iterator[None]:
    """Turn the errors of a layer, which may raise anything, into `Undecided`."""
    try:
        yield
    except Undecided:
        raise
    except Exception as error:
        raise Undecided(f"the layer raised {type(error).__name__}: {error!s:.120}") from error


def remembered(layer: nn.Module, question: tuple[Any, ...], answer: Callable[[], T]) -> T:
    """Return the result of `answer`, computed once for layers of the same class, shapes, settings and inner modules.

    Whether a layer is frozen as a whole makes no difference.
    """
    trains = any(parameter.requires_grad for parameter in layer.parameters())
    key = [*question]
    for module in layer.modules():
        key.append(type(module))
        for name, value in module._parameters.items():
            if value is not None:
                key.append((name, value.shape, value.dtype, trains and not value.requires_grad))
        for name, value in vars(module).items():
            if isinstance(value, _SETTINGS) and name != "training":
                key.append((name, getattr(value, "__qualname__", value)))
    answers = _CACHE.setdefault(type(layer), {})
    if tuple(key) not in answers:
        answers[tuple(key)] = answer()
    return answers[tuple(key)]


class Verdict(NamedTuple):
    """Whether the output and the input axis are as described: `True`, `False`, or `None` if that was not checked.

    `False` alone is no contradiction: a layer may mix outputs, or inputs, e.g. by a normalization.
    """

    outputs: bool | None = None
    inputs: bool | None = None
    reason: str = "the layer has one output and fewer than three inputs"  # why nothing was checked

    @property
    def is_verified(self) -> bool:
        """Whether an axis is as described, and none is not."""
        return False not in self[:2] and True in self[:2]

    def __str__(self) -> str:
        if self[:2] == (None, None):
            return f"not checked: {self.reason}"
        words = {True: "as described", False: "mixed by the layer, or not as described", None: "not checked"}
        return f"outputs {words[self.outputs]}, inputs {words[self.inputs]}"


class Probe:
    """Runs copies of a layer, in evaluation mode and without hooks, whose named parameters are replaced.

    The layer and the random generators are left as they are.

    Args:
        layer: The layer.
        names: The parameters whose gradients are asked for.
        grid: The tensors that say where the basis functions are; inputs are placed there.
        args, kwargs: The arguments of the layer; by default one input is made up.

    Raises:
        Undecided: A parameter has no values that could be run.
    """

    def __init__(
        self,
        layer: nn.Module,
        names: Iterable[str],
        grid: Iterable[Any] = (),
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.layer, self.args, self.kwargs = layer, [*args], kwargs or {}
        self.values = {name: _copy_parameter(layer, name) for name in names}
        self.like = next(iter(self.values.values()))
        self.error = ""  # of the first run that failed
        # the input is the first argument of a floating type
        tensors = [n for n, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
        self.place = tensors[0] if tensors else 0
        self.x: Tensor | None = self.args[self.place].detach().to(self.like) if tensors else None
        spread = [value for value in grid if isinstance(value, Tensor) and value.numel() > 1]
        ends = [(value.min().item(), value.max().item()) for value in spread] or [(-1.0, 1.0)]
        common = max(low for low, _ in ends), min(high for _, high in ends)
        self.low, self.high = common if common[0] < common[1] else ends[0]

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Compute gradients eagerly, without autocast; put the random generators back at the end."""
        device = self.like.device
        is_compiled = "torch._dynamo" in sys.modules  # flashkan compiles its basis, which would take seconds
        stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
        plain = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), plain, stance, generators:
            yield

    def trials(self, size: int, kernel: Sequence[int] = ()) -> Iterator[Evidence]:
        """Yield what the layer gives for inputs of `size` features, or channels of a convolution, if it takes them."""
        if self.x is not None:
            shape = self.x.shape
            forms = [(shape, channel) for channel in (-1, 1 - len(shape)) if len(shape) > 1 and shape[channel] == size]
        elif kernel:
            forms = [((1, size, *(4 * length + 3 for length in kernel)), -1 - len(kernel))]
        else:  # samples; tokens; channels of one point, and of more
            forms = [((1, size), -1), ((1, 1, size), -1), ((1, size, 1), -2)]
        for shape, channel in forms:
            x = self.make_input(shape) if self.x is None else self.x
            y = self.attempt(x)
            if y is None or (channel == -2 and not kernel and self.attempt(x.repeat(1, 1, 3)) is None):
                continue
            shapes = [[*value.movedim(channel, -1).shape] for value in (x, y) if value.dim() == x.dim()]
            if len(shapes) == 2 and (kernel or shapes[0][:-1] == shapes[1][:-1]):
                evidence = Evidence(self, x, channel, size, shapes[1][-1])
                yield evidence
                if len(shape) == 2 and evidence.is_nonlinear:  # tokens would say the same
                    return
            else:
                self.error = self.error or f"for an input {tuple(shape)} it returns {tuple(y.shape)}"

    def attempt(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """Return the output, or `None` if there is none."""
        try:
            with torch.no_grad():
                # never with those of the layer, which it may initialize in place at its first input
                return self.run(values or self.values, x)
        except Undecided as reason:  # it wants another input
            self.error = self.error or str(reason)
            return None

    def make_input(self, shape: Sequence[int]) -> Tensor:
        """Return points of this shape in the middle of the grid, none of which is repeated."""
        steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
        share = (steps * 0.6180339887498949).frac().view(*shape)  # of the golden ratio
        return (self.low + (self.high - self.low) * (0.25 + 0.5 * share)).to(self.like)

    @_foreign_code()
    def run(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the output, of several the first, with these values of parameters."""
        args = [*self.args] or [x]
        args[self.place] = x
        layer = _copy_of(self.layer, {})
        y = call_with_parameters(layer, {**values}, layer, tuple(args), {**self.kwargs})
        y = y[0] if isinstance(y, (tuple, list)) and y else y
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise Undecided(f"it returns a {type(y).__name__}")
        return y


class Evidence:
    """The gradients of a layer at one input, at changed inputs, and with other weights of the outputs.

    They are computed once for all descriptions that are compared with them.

    Attributes:
        x: The input: one sample, unless the user gives it.
        channel: The axis of its features, counted from the end.
        size: The number of features.
        outputs: The number of outputs.
        takes_others: Whether the layer also takes inputs of other sizes, over which it sums.
    """

    def __init__(self, probe: Probe, x: Tensor, channel: int, size: int, outputs: int) -> None:
        self.probe, self.x, self.channel, self.size, self.outputs = probe, x, channel, size, outputs
        self.takes_others = False
        self._exchanged: dict[int, list[tuple[slice, Gradients]]] = {}

    @_foreign_code()
    def gradients(self, x: Tensor | None = None, seed: int = 1, values: Any = None) -> Gradients:
        """Return the gradients of a sum of the outputs, with weights that depend on a seed by a factor for each."""
        leaves = {name: value.requires_grad_() for name, value in (values or self.probe.values).items()}
        y = self.probe.run(leaves, self.x if x is None else x).movedim(self.channel, -1)
        if not y.requires_grad:
            raise Undecided("the outputs have no gradient with respect to its parameters")
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(y.shape, generator=generator, device="cpu") - 0.5
        weights += weights.sign()  # none is zero; of both signs, so that a kernel's places do not cancel
        factors = torch.rand(y.shape[-1], generator=generator.manual_seed(seed), device="cpu") + 0.5
        total = (y * (weights * factors).to(y)).sum()
        return dict(zip(leaves, torch.autograd.grad(total, [*leaves.values()], allow_unused=True), strict=True))

    @cached_property
    def base(self) -> Gradients:
        return self.gradients()

    @cached_property
    def reweighted(self) -> Gradients:
        return self.gradients(seed=2)

    @cached_property
    def scaled(self) -> list[Gradients]:
        return [self.gradients(self.x * factor) for factor in (0.3, 0.6, -0.8)]

    def exchanged(self, count: int) -> list[tuple[slice, Gradients]]:
        """Exchange half of `count` inputs, which no normalization notices; return the slice of the others, too."""
        if count not in self._exchanged:
            self._exchanged[count] = []
            half = max(1, count // 2)
            for kept, rest in ((slice(half), slice(half, None)), (slice(count - half, None), slice(count - half))):
                blocks = self.x.movedim(self.channel, -1).unflatten(-1, (-1, count))
                before, fixed = blocks[..., rest], blocks[..., kept]
                if count == 2:  # nothing can be exchanged
                    changes = [fixed + factor * (before - fixed) for factor in (0.5, 1.5, 2.5)]
                else:
                    changes = [before.roll(step, -1) for step in range(1, min(before.shape[-1], 3))]
                for change in changes:
                    other = blocks.clone()
                    other[..., rest] = change
                    gradients = self.gradients(other.flatten(-2).movedim(-1, self.channel))
                    self._exchanged[count].append((kept, gradients))
        return self._exchanged[count]

    def has_sizes(self, tensor: CoefficientTensor) -> bool:
        """Whether a description has as many inputs and outputs as the layer."""
        return (self.size, self.outputs) == (width(tensor), tensor.shape[0])

    def axes(self, tensor: CoefficientTensor, strict: bool = False) -> Verdict:
        """Compare the output and the input axis of coefficients with the gradients.

        With `strict`, for a layer that nobody described, each parameter must have an effect, and the factors of A must
        be at least two functions of one input each, whatever the other inputs are: gates and attention change with
        these, and a single function makes the layer a linear map.
        """
        out, in_, *_ = tensor.shape
        if strict and not all(g is not None and g.any() for g in map(self.base.get, tensor.parameters)):
            return Verdict(False)
        gradient = join(self.base, tensor)
        if not gradient.any() or not gradient.isfinite().all():
            return Verdict(reason="the outputs have no finite gradient with respect to its coefficients")
        outputs = inputs = None
        row = int(gradient.flatten(1).abs().amax(1).argmax())  # of the output with the largest gradient
        if out > 1:
            other = join(self.reweighted, tensor)
            outputs = _is_parallel(gradient, other)
            if outputs and _is_parallel(gradient.reshape(1, 1, -1), other.reshape(1, 1, -1)):
                # it says little, as behind a softmax, or a norm, of two outputs
                outputs = _is_parallel(gradient, gradient[row].expand_as(gradient)) or (False if strict else None)
        if self.size != width(tensor) or outputs is False:
            return Verdict(outputs, reason=f"it takes inputs of {self.size} features")
        samples = [gradient]
        for kept, gradients in self.exchanged(in_) if in_ > 2 or (strict and in_ > 1) else ():
            samples.append(join(gradients, tensor))
            change = _change(gradient, samples[-1], kept)
            if change.max() > _EFFECT * max(gradient.abs().max(), samples[-1].abs().max()):  # else it does not show
                inputs = bool(change[:, kept].max() <= _ROUNDING * change.max())
                if not inputs:
                    return Verdict(outputs, False)
        if not strict:
            return Verdict(outputs, inputs)
        if in_ <= 3:
            samples += [join(gradients, tensor) for gradients in self.scaled]
        # the gradients at several inputs of several functions are of rank two at least
        singular = torch.linalg.svdvals(torch.stack([sample[row, :_ROWS] for sample in samples], dim=1).double())
        has_functions = (singular[:, 1:2] > _EFFECT * _EFFECT * singular.max()).any()
        # a norm of two inputs hides their changes
        says_nothing = not inputs and (in_ > 2 or (in_ == 2 and not outputs))
        return Verdict(outputs, inputs if has_functions and not says_nothing and self.is_nonlinear else False)

    @cached_property
    def is_nonlinear(self) -> bool:
        """Whether each row of the output depends on its own row of the input alone, and not by an affine map.

        With one row attention is linear in its values. A normalization of two outputs leaves their signs, which may be
        constant: the parameters are moved.
        """
        values = moved(self.probe.values, self.probe.values)
        shape = [*self.x.movedim(self.channel, -1).shape]
        if math.prod(shape[:-1]) < 4:
            shape[:-1] = [4] if len(shape) == 2 else [2, 2, *[1] * (len(shape) - 3)]
        rows = self.probe.make_input(shape).flatten(0, -2)
        rows[2] = rows[0].roll(1) if shape[-1] > 1 else rows[2]  # which a normalization does not make the same
        rows[1] = (rows[0] + rows[2]) / 2
        results = []
        for last in (2, 0):  # one row or the other: a norm by the extremes of all rows does not notice
            rows[3] = rows[last]
            y = self.probe.attempt(rows.view(*shape).movedim(-1, self.channel), values)
            if y is None or y.dim() != len(shape) or y.numel() != y.shape[self.channel] * len(rows):
                return False
            results.append(y.movedim(self.channel, -1).flatten(0, -2))
        y, other = results
        rounding = 1e3 * torch.finfo(y.dtype).eps * y.abs().max()
        is_affine = (y[0] - 2 * y[1] + y[2]).abs().max() <= rounding < (y[0] - y[2]).abs().max()
        return bool((y - other)[:3].abs().max() <= rounding and not is_affine)

    def stays(self, tensor: CoefficientTensor, name: str, of_edges: bool = False) -> bool:
        """Whether the gradient of coefficients stays, up to factors of outputs or edges, if a parameter is moved."""
        others = self.gradients(values=moved(self.probe.values, [name]))
        pair = [join(gradients, tensor) for gradients in (self.base, others)]
        if not of_edges:
            return _is_parallel(*pair)
        pair = [gradient.flatten(0, 1).unsqueeze(1) for gradient in pair]
        basis = tensor.shape[2]  # the residual branch may have factors of its own
        slices = (
            [slice(basis), slice(basis, None)] if tensor.has_residual and len(tensor.shape) == 3 else [slice(None)]
        )
        return all(_is_parallel(*(gradient[..., each] for gradient in pair)) for each in slices)

    def is_additive(self, tensor: CoefficientTensor) -> bool:
        """Whether the gradient of the residual weights stays, up to a factor for each output, under a change of A."""
        others = self.gradients(values=moved(self.probe.values, tensor.names))
        return _is_parallel(*(join(gradients, tensor)[:, :, -1:] for gradients in (self.base, others)))

    def is_beside(self, names: Collection[str]) -> bool:
        """Whether parameters add to the output: no gradient of another notices that they are moved."""
        if not names:
            return True
        others = self.gradients(values=moved(self.probe.values, names))
        pairs = [(g, others[name]) for name, g in self.base.items() if g is not None and name not in names]
        return all(other is not None and _is_same(g, other) for g, other in pairs)

    def is_symmetric(self) -> bool:
        """Whether the gradients do not notice an exchange of the inputs: the layer sums over them by broadcasting."""
        rolled = self.gradients(self.x.roll(1, self.channel))
        pairs = [(g, rolled[name]) for name, g in self.base.items() if g is not None and g.dim() > 1]
        return all(g.any() and other is not None and _is_same(g, other) for g, other in pairs)

    def is_linear(self, names: Collection[str]) -> bool | None:
        """Whether the output is an affine function of parameters; `None` if their gradient says nothing."""
        x = self.x if self.probe.x is not None else self.probe.make_input((4, *self.x.shape[1:]))
        ends = []
        for factor in (-2, 2):  # so far apart that a ReLU behind the sum is met on both sides
            gradients = self.gradients(x, values=moved(self.probe.values, names, torch.randn, factor))
            ends.append(torch.cat([gradient.flatten() for n in names if (gradient := gradients[n]) is not None]))
        size, change = (ends[0].abs() + ends[1].abs()).max(), (ends[0] - ends[1]).abs().max()
        return bool(change <= _EFFECT * size) if change.isfinite() and size > 0 else None


def moved(
    values: Mapping[str, Tensor], names: Collection[str], draw: Callable[..., Tensor] = torch.rand, factor: float = 1
) -> dict[str, Tensor]:
    """Return the parameters, to those of these names added a factor of noise of their mean size.

    By default it is positive, since widths are, and none is zero then.
    """
    generator = torch.Generator().manual_seed(_SEED)
    changed = {}
    for name in (name for name in values if name in names):
        value = values[name].detach()
        scale = factor * (float(value.abs().mean()) or 1.0)
        changed[name] = value + scale * draw(value.shape, generator=generator, device="cpu").to(value)
    return {**values, **changed}


def width(tensor: CoefficientTensor) -> int:
    """Return the number of inputs of a layer: of all blocks of a convolution with groups."""
    first, *_ = members = tensor.parts[0]
    return len(members) * math.prod([first.lengths[axis] for axis in first.layout.groups]) * tensor.shape[1]


def join(gradients: Gradients, tensor: CoefficientTensor) -> Tensor:
    """Return gradients as one tensor (out, in, rest). They are zero for parameters that all outputs share."""
    like = next(gradient for gradient in gradients.values() if gradient is not None)
    parts = []
    for member in (member for members in tensor.parts for member in members):
        gradient = gradients[member.name]
        is_zero = gradient is None or member.layout.shared
        parts.append(like.new_zeros(member.stored) if is_zero else gradient)
    return tensor.join(parts).flatten(2)


def _copy_parameter(layer: nn.Module, name: str) -> Tensor:
    """Return a copy of a parameter, in float32 at least."""
    path, _, attribute = name.rpartition(".")
    value = layer.get_submodule(path)._parameters.get(attribute)
    if value is None or hasattr(value, "placements"):
        raise Undecided(f"`{name}` is sharded, or computed from other parameters")
    if value.is_meta or not value.is_floating_point():
        raise Undecided(f"`{name}` has no values that could be run: {value.dtype}, {value.device.type}")
    return _wide(value.detach()).clone().requires_grad_()


def _copy_of(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy in evaluation mode, without hooks, that shares the parameters and has buffers of its own.

    It is in float32 if the module is in half precision.
    """
    if id(module) in made:
        return made[id(module)]
    copy = made[id(module)] = object.__new__(type(module))
    copy.__dict__.update(
        {n: OrderedDict() if n.endswith("_hooks") else value for n, value in vars(module).items()},
        training=False,
        _parameters={name: None if value is None else _wide(value) for name, value in module._parameters.items()},
        _buffers={name: None if value is None else _wide(value).clone() for name, value in module._buffers.items()},
        _modules={n: None if child is None else _copy_of(child, made) for n, child in module._modules.items()},
    )
    return copy


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _is_same(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= _ROUNDING * first.abs().max())


def _change(first: Tensor, second: Tensor, kept: slice) -> Tensor:
    """Return the difference of two gradients (out, in, rest), up to the factor of each output that fits `kept`."""
    # the smaller of two rows is a multiple of the larger: a ReLU may have made it zero
    swap = (first[:, kept].flatten(1).norm(dim=1) < second[:, kept].flatten(1).norm(dim=1))[:, None, None]
    first, second = torch.where(swap, second, first), torch.where(swap, first, second)
    old, new = first[:, kept].flatten(1), second[:, kept].flatten(1)
    factors = ((old * new).sum(1) / (old * old).sum(1).clamp(min=1e-30))[:, None, None]
    return (second - factors * first).abs()


def _is_parallel(first: Tensor, second: Tensor) -> bool:
    """Return whether two gradients (out, in, rest) are equal up to a factor for each output."""
    return bool(_change(first, second, slice(None)).max() <= _ROUNDING * first.abs().max())
