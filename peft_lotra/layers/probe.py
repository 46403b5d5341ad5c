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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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


class Trial(NamedTuple):
    """An input that a layer takes.

    Attributes:
        x: The input: one sample, unless the user gives it.
        channel: The axis of its features, -1 or 1, counted from the end where that is possible.
        size: The number of features.
        outputs: The number of outputs.
    """

    x: Tensor
    channel: int
    size: int
    outputs: int


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
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs or {}
        self.values = {name: _copy_parameter(layer, name) for name in names}
        self.like = next(iter(self.values.values()))
        self.error = ""  # of the first run that failed
        ends = [(value.min().item(), value.max().item()) for value in grid if _is_spread(value)] or [(-1.0, 1.0)]
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

    def trials(self, size: int, kernel: Iterable[int] = ()) -> Iterator[Trial]:
        """Yield the inputs of `size` features, or channels of a convolution, that the layer takes."""
        if kernel := tuple(kernel):
            forms = [((1, size, *(4 * length + 3 for length in kernel)), -1 - len(kernel))]
        else:  # samples; tokens; channels
            forms = [((1, size), -1), ((1, 1, size), -1), ((1, size, 1), -2)]
        if self.args:
            x = _as_input(self.args[_place(self.args)], self.like)
            forms = [(x.shape, channel) for channel in (-1, 1 - x.dim()) if x.dim() > 1 and x.shape[channel] == size]
        for shape, channel in forms:
            x = _as_input(self.args[_place(self.args)], self.like) if self.args else self.place(shape)
            y = self._try(x)
            if channel == -2 and y is not None and not self.args and self._try(self.place((1, size, 3))) is None:
                continue  # the last axis is the one of its features
            if y is not None and y.dim() == len(shape):
                kept = [axis for axis in range(-y.dim(), 0) if axis != channel and not kernel]
                if all(y.shape[axis] == shape[axis] for axis in kept):
                    yield Trial(x, channel, size, y.shape[channel])
                    continue
            if y is not None:
                self.error = self.error or f"for an input {tuple(shape)} it returns {tuple(y.shape)}"

    def _try(self, x: Tensor) -> Tensor | None:
        try:
            with torch.no_grad():
                return self.run({}, x)
        except Undecided:
            raise
        except Exception as error:  # foreign code, which may raise anything: it wants other arguments
            self.error = self.error or f"the layer raised {type(error).__name__}: {error!s:.120}"
            return None

    def place(self, shape: Iterable[int]) -> Tensor:
        """Return points of this shape in the middle of the grid, none of which is repeated."""
        shape = tuple(shape)
        steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
        share = (steps * 0.6180339887498949).frac().view(shape)  # of the golden ratio
        return (self.low + (self.high - self.low) * (0.25 + 0.5 * share)).to(self.like)

    def run(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the output, of several the first, with these values of parameters."""
        args = [x]
        if self.args:
            args = [*self.args]
            args[_place(self.args)] = x
        layer = _copy_of(self.layer, {})
        y = call_with_parameters(layer, {**values}, layer, tuple(args), {**self.kwargs})
        y = y[0] if isinstance(y, (tuple, list)) and y else y
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise Undecided(f"it returns a {type(y).__name__}")
        return y

    def moved(self, names: Collection[str], draw: Callable[..., Tensor] = torch.rand, factor: float = 1) -> Any:
        """Return the values of all parameters, with noise added to those of these names, see `moved`."""
        return moved(self.values, names, draw, factor)


class Evidence:
    """The gradients of a layer at one input, at changed inputs, and with other weights of the outputs.

    They are computed once for all descriptions that are compared with them.
    """

    def __init__(self, probe: Probe, trial: Trial) -> None:
        self.probe, self.trial = probe, trial
        self.takes_others = False  # inputs of other sizes too, over which it sums
        self._changed: dict[tuple[int, bool], list[tuple[slice, Gradients]]] = {}

    def gradients(self, x: Tensor | None = None, seed: int = 1, values: Any = None) -> Gradients:
        """Return the gradients of a weighted sum of the outputs with respect to the parameters of the probe."""
        leaves = {name: value.requires_grad_() for name, value in (values or self.probe.values).items()}
        y = self.probe.run(leaves, self.trial.x if x is None else x)
        if not y.requires_grad:
            raise Undecided("the outputs have no gradient with respect to its parameters")
        # `allow_unused` since a layer may not use each of its parameters
        found = torch.autograd.grad(_weighted(y, self.trial.channel, seed), [*leaves.values()], allow_unused=True)
        return dict(zip(leaves, found, strict=True))

    @cached_property
    def base(self) -> Gradients:
        return self.gradients()

    @cached_property
    def reweighted(self) -> Gradients:
        """With weights that differ by a factor for each output."""
        return self.gradients(seed=2)

    @cached_property
    def scaled(self) -> list[Gradients]:
        return [self.gradients(self.trial.x * factor) for factor in (0.3, 0.6, -0.8)]

    def changed(self, count: int, strict: bool) -> list[tuple[slice, Gradients]]:
        """The inputs that stay, and the gradients, where the others of `count` inputs are exchanged."""
        if (count, strict) not in self._changed:
            inputs = _changed_inputs(self.trial.x, count, self.trial.channel, strict)
            self._changed[count, strict] = [(kept, self.gradients(x)) for kept, x in inputs]
        return self._changed[count, strict]

    def has_sizes(self, tensor: CoefficientTensor) -> bool:
        """Whether a description has as many inputs and outputs as the layer."""
        return (self.trial.size, self.trial.outputs) == (width(tensor), tensor.shape[0])

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
        if out > 1:
            other = join(self.reweighted, tensor)
            says_little = _is_parallel(gradient.reshape(1, 1, -1), other.reshape(1, 1, -1))
            if says_little:  # as behind a softmax, or a norm, of two outputs
                other = gradient[_largest(gradient)].expand_as(gradient)
            outputs = _is_parallel(gradient, other) or (None if says_little and not strict else False)
        if self.trial.size != width(tensor) or outputs is False:
            return Verdict(outputs, reason=f"it takes inputs of {self.trial.size} features")
        samples = [gradient]
        for kept, gradients in self.changed(in_, strict):
            samples.append(join(gradients, tensor))
            change = _change(gradient, samples[-1], kept)
            if change.max() > _EFFECT * max(gradient.abs().max(), samples[-1].abs().max()):  # else it does not show
                inputs = bool(change[:, kept].max() <= _ROUNDING * change.max())
                if not inputs:
                    break
        verdict = Verdict(outputs, inputs)
        if not strict or False in verdict[:2]:
            return verdict
        if in_ <= 3:
            samples += [join(gradients, tensor) for gradients in self.scaled]
        row = _largest(gradient)  # of several functions the gradients at several inputs are of rank two at least
        singular = torch.linalg.svdvals(torch.stack([sample[row, :_ROWS] for sample in samples], dim=1).double())
        has_functions = (singular[:, 1:2] > _EFFECT * _EFFECT * singular.max()).any()
        # a norm of two inputs hides their changes
        says_nothing = not inputs and (in_ > 2 or (in_ == 2 and not outputs))
        return Verdict(outputs, False) if says_nothing or not has_functions or not self.is_nonlinear else verdict

    @cached_property
    def is_nonlinear(self) -> bool:
        """Whether each row of the output depends on its own row of the input alone, and not by an affine map.

        With one row attention is linear in its values. A normalization of two outputs leaves their signs, which may be
        constant: the parameters are moved.
        """
        shape, channel = [*self.trial.x.shape], self.trial.channel
        values = self.probe.moved([*self.probe.values])
        with torch.no_grad():
            if self.probe.args:
                x = self.trial.x
                ends = x, x.roll(1, channel) * 0.9
                low, middle, high = (self.probe.run(values, z) for z in (ends[0], (ends[0] + ends[1]) / 2, ends[1]))
                return not _is_affine(low, middle, high)
            leading = [axis for axis in range(len(shape)) if axis - len(shape) != channel]
            for axis in leading:
                shape[axis] = 4 if len(leading) == 1 else 2
            rows = self.probe.place(shape).movedim(channel, -1).reshape(4, -1)
            if rows.shape[1] > 1:  # that a normalization of the inputs does not make the same
                rows[2] = rows[0].roll(1)
            rows[1] = (rows[0] + rows[2]) / 2
            results = []
            for last in (2, 0):  # one row or the other: a norm by the extremes of all rows does not notice
                rows[3] = rows[last]
                x = rows.view(*(shape[axis] for axis in leading), -1).movedim(-1, channel)
                results.append(self.probe.run(values, x).movedim(channel, -1).flatten(0, -2))
        y, other = results
        if len(y) != 4 or (y - other)[:3].abs().max() > _tolerance(y):
            return False
        return not _is_affine(*y[:3])

    def is_additive(self, tensor: CoefficientTensor) -> bool:
        """Whether the gradient of the residual weights stays, up to a factor for each output, under a change of A."""
        others = self.gradients(values=self.probe.moved(tensor.names))
        first, second = (join(gradients, tensor)[:, :, -1:] for gradients in (self.base, others))
        return _is_parallel(first, second)

    def stays(self, tensor: CoefficientTensor, name: str, by_edge: bool = False) -> bool:
        """Whether the gradient of coefficients stays, up to factors of outputs or edges, if a parameter is moved."""
        others = self.gradients(values=self.probe.moved([name]))
        first, second = (join(gradients, tensor) for gradients in (self.base, others))
        if not by_edge:
            return _is_parallel(first, second)
        first, second = (gradient.flatten(0, 1).unsqueeze(1) for gradient in (first, second))
        basis = tensor.shape[2]  # the residual branch may have factors of its own
        slices = (
            [slice(basis), slice(basis, None)] if tensor.has_residual and len(tensor.shape) == 3 else [slice(None)]
        )
        return all(_is_parallel(first[..., each], second[..., each]) for each in slices)

    def is_symmetric(self) -> bool:
        """Whether the gradients do not notice an exchange of the inputs: the layer sums over them by broadcasting."""
        rolled = self.gradients(self.trial.x.roll(1, self.trial.channel))
        for name, gradient in self.base.items():
            other = rolled[name]
            if gradient is not None and other is not None:
                is_same = (gradient - other).abs().max() <= _ROUNDING * gradient.abs().max()
                if not is_same or (gradient.dim() > 1 and not gradient.any()):
                    return False
        return True

    def is_linear(self, names: Collection[str]) -> bool | None:
        """Whether the output is an affine function of parameters; `None` if their gradient says nothing."""
        x = self.trial.x
        if not self.probe.args:
            shape = [4 if axis == 0 else length for axis, length in enumerate(x.shape)]
            x = self.probe.place(shape)
        # so far apart that a ReLU behind the sum is met on both sides
        results = [self.gradients(x, values=self.probe.moved(names, torch.randn, factor)) for factor in (-2, 2)]
        low, high = (torch.cat([g[n].flatten() for n in names if g[n] is not None]) for g in results)  # pyright: ignore
        size, change = (high.abs() + low.abs()).max(), (high - low).abs().max()
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
    parts = []
    for members in tensor.parts:
        for member in members:
            gradient = gradients[member.name]
            is_zero = gradient is None or member.layout.shared
            parts.append(torch.zeros(member.stored) if is_zero else gradient)
    like = next((gradient for gradient in gradients.values() if gradient is not None), parts[0])
    return tensor.join([part.to(like) for part in parts]).flatten(2)


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


def _is_spread(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and not value.is_meta


def _place(args: tuple[Any, ...]) -> int:
    """Return the place of the input among arguments: the first tensor of a floating type."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    raise Undecided("none of its arguments is a tensor of a floating type")


def _as_input(x: Tensor, like: Tensor) -> Tensor:
    return x.detach().to(like)


def _weighted(y: Tensor, channel: int, seed: int = 1) -> Tensor:
    """A sum of the outputs with weights, none of which is zero; `seed` changes them by a factor for each output."""
    y = y.movedim(channel, -1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(y.shape, generator=generator, device="cpu") - 0.5
    weights += weights.sign()  # of both signs: else the sum over a kernel's places hides what changes at each
    factors = torch.rand(y.shape[-1], generator=generator.manual_seed(seed), device="cpu") + 0.5
    return (y * (weights * factors).to(y)).sum()


def _changed_inputs(x: Tensor, count: int, channel: int, strict: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield x with some of its `count` inputs changed as no normalization notices, and the slice of the others.

    These are two that are exchanged; with `strict` each half of them in turn.
    """
    half = max(1, count // 2)
    slices = (slice(half), slice(half, None)), (slice(count - half, None), slice(count - half))
    for kept, rest in slices if strict else [(slice(2, None), slice(2))] if count > 2 else ():
        blocks = x.unflatten(channel, (-1, count)).movedim(channel, -1)
        before, fixed = blocks[..., rest], blocks[..., kept]
        if before.shape[-1] > 1:
            changed = [before.roll(step, -1) for step in range(1, min(before.shape[-1], 3))]
        else:
            changed = [fixed + factor * (before - fixed) for factor in (0.5, 1.5, 2.5) if count > 1]
        for values in changed:
            other = blocks.clone()
            other[..., rest] = values
            yield kept, other.movedim(-1, channel).flatten(channel - 1, channel)


def _tolerance(y: Tensor) -> float:
    return 1e3 * torch.finfo(y.dtype).eps * float(y.abs().max())


def _is_affine(low: Tensor, middle: Tensor, high: Tensor) -> bool:
    """Whether a function changes from one point to another, and is in their middle the mean of both ends."""
    rounding = max(map(_tolerance, (low, high)))
    return bool((low - 2 * middle + high).abs().max() <= rounding < (low - high).abs().max())


def _largest(gradient: Tensor) -> int:
    """Return the output with the largest gradient."""
    return int(gradient.flatten(1).abs().amax(1).argmax())


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
