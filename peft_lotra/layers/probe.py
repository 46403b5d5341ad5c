# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Whether a layer computes y = f(sum_{i,k} A[o,i,k] phi_k(x[i])), by gradients of a copy that shares its tensors.

The gradient of any function of the outputs with respect to A[o,i,k] is then d[o] phi_k(x[i]). Three things follow, and
are checked.

* With other weights of the outputs the gradient stays, up to a factor for each output, whatever f is.
* If other inputs are permuted, which no normalization of the inputs notices, the gradient in the slice of an input
  stays, up to a factor for each output.
* The output is an affine function of A, if f is.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..modules.calls import call_with_parameters
from .coefficients import CoefficientTensor


_NO_EFFECT = 1e-4  # of the largest gradient: rounding
_EFFECT = 1e-2  # of the largest gradient: a change that shows
_CURVATURE = 1e-2  # of the largest gradient: more than rounding in float32 makes of an affine function
_ROWS = 32  # inputs whose functions are compared
_SEED = 16180339  # with the seed of the layer's own initialization, noise and coefficients would be proportional
_SETTINGS = (str, FunctionType, BuiltinFunctionType, Number)  # Number: of numpy too
_FOUND: WeakKeyDictionary[type, dict[Any, Any]] = WeakKeyDictionary()

T = TypeVar("T")


class Undecided(Exception):
    """Nothing can be said about a layer now; the message is the reason."""


def remembered(layer: nn.Module, question: tuple[Any, ...], find: Callable[[], T]) -> T:
    """The result of `find`, computed once for all layers of the same class, shapes, settings and inner modules."""
    known, key = _FOUND.setdefault(type(layer), {}), [*question]
    for module in layer.modules():
        key += [type(module)] if module is not layer else []
        key += [
            (name, value.shape, value.dtype, value.requires_grad)
            for name, value in module._parameters.items()
            if value is not None
        ]
        key += [
            (name, getattr(value, "__qualname__", value))  # of a function its name
            for name, value in vars(module).items()
            if isinstance(value, _SETTINGS) and name != "training"
        ]
    if tuple(key) not in known:
        known[tuple(key)] = find()
    return known[tuple(key)]


class Verdict(NamedTuple):
    """Whether the output and the input axis are as described: `True`, `False`, or `None` if that was not checked.

    `False` alone is no contradiction: a layer may mix outputs, or inputs, e.g. by a normalization.
    """

    outputs: bool | None = None
    inputs: bool | None = None
    reason: str = "the layer has one output and fewer than three inputs"  # why nothing was checked
    contradiction: str = ""  # why no layer that mixes outputs or inputs computes this either

    @property
    def is_verified(self) -> bool:
        """Whether an axis is as described, and none is not."""
        return False not in self[:2] and True in self[:2]

    def __str__(self) -> str:
        if self.contradiction:
            return f"not as described: {self.contradiction}"
        if self[:2] == (None, None):
            return f"not checked: {self.reason}"
        words = {True: "as described", False: "mixed by the layer, or not as described", None: "not checked"}
        return f"outputs {words[self.outputs]}, inputs {words[self.inputs]}"


class Probe:
    """Runs a copy of a layer that shares its tensors, in evaluation mode, without hooks, on one input.

    The layer and the random generators are left as they are.

    Args:
        layer: The layer.
        grid: The tensors that say where the basis functions are; the input is placed there.
        args: The arguments of the layer, inputs first; by default one input is made up.
    """

    def __init__(self, layer: nn.Module, grid: Mapping[str, Any], args: tuple[Any, ...] = ()) -> None:
        self.layer, self.args = layer, args
        self.grid = [value for value in grid.values() if isinstance(value, Tensor) and value.numel() > 1]
        self._leading: dict[int, tuple[int, ...] | None] = {}  # by the number of features, see `_takes`

    def axes(self, tensor: CoefficientTensor, strict: bool = False) -> Verdict:
        """Compares the output and the input axis of the coefficients with the gradients of the layer.

        With `strict`, for a layer that nobody described, each parameter must have an effect, and the factors of A must
        be at least two functions of one input each, whatever the other inputs are: gates and attention change with
        these, and a single function makes the layer a linear map.
        """
        try:
            with self._isolated(tensor) as values:
                return self._axes(tensor, values, strict)
        except Undecided as reason:
            return Verdict(reason=str(reason))
        except Exception as error:  # foreign code, which may raise anything: it wants other arguments
            out, in_, *rest = tensor.shape
            others = () if strict or self.args or rest[1:] else (out, *rest)
            taken = next((size for size in others if size != in_ and self._takes(tensor, size)), None)
            why = f"it takes inputs of {taken} features, and not of {in_}" if taken else ""
            return Verdict(reason=f"the layer raised {type(error).__name__}: {error!s:.120}", contradiction=why)

    def is_linear(self, tensor: CoefficientTensor) -> bool | None:
        """Whether the output is an affine function of the coefficients; `None` if that is not known."""
        try:
            with self._isolated(tensor) as values:
                x = self._input(tensor, rows=2)
                # so far apart that a ReLU behind the sum is met on both sides
                others = (moved(values, values, torch.randn, factor) for factor in (-2, 2))
                low, high = (self._gradient(tensor, x, given) for given in others)
                size, change = (high.abs() + low.abs()).max(), (high - low).abs().max()
                return bool(change <= _CURVATURE * size) if change.isfinite() and size > 0 else None
        except Exception:  # as in `axes`
            return None

    def reached(self, names: Sequence[str], tensor: CoefficientTensor) -> dict[str, bool | None]:
        """Whether the output has a gradient towards each of these parameters; `None` if it is not computed from it.

        Empty if the layer cannot run.
        """
        try:
            with self._isolated(tensor):
                values = {name: _own_copy(self.layer.get_parameter(name)).requires_grad_() for name in names}
                y = self._run(values, self._input(tensor))
                found = torch.autograd.grad(y.square().sum(), [*values.values()], allow_unused=True)
            return {name: None if g is None else bool(g.any()) for name, g in zip(names, found, strict=True)}
        except Exception:  # as in `axes`
            return {}

    def is_additive(self, tensor: CoefficientTensor) -> bool:
        """Whether the gradient of the residual weights stays, up to a factor for each output, under a change of A."""
        with self._isolated(tensor) as values:
            x, others = self._input(tensor), moved(values, tensor.names)
            first, second = (self._gradient(tensor, x, given)[:, :, -1:] for given in (values, others))
            return _is_parallel(first, second)

    def values(self, tensor: CoefficientTensor) -> dict[str, Tensor]:
        """Copies of the parameters, in float32 at least; an `Undecided` if the layer cannot be run."""
        values = tensor.read_parameters(self.layer)
        for name, value in values.items():
            path, _, attribute = name.rpartition(".")
            if attribute not in self.layer.get_submodule(path)._parameters or hasattr(value, "placements"):
                raise Undecided(f"`{name}` is sharded, or computed from other parameters")
            if value.is_meta or not value.is_floating_point():
                raise Undecided(f"`{name}` has no values that could be run: {value.dtype}, {value.device.type}")
        if any(len(part) > 1 for part in tensor.parts) and len(tensor.shape) == 3:
            raise Undecided("the module consists of several layers")
        return {name: _own_copy(value).requires_grad_() for name, value in values.items()}

    @contextmanager
    def _isolated(self, tensor: CoefficientTensor) -> Iterator[dict[str, Tensor]]:
        """The `values`, while gradients are computed; the random generators are put back at the end."""
        values = self.values(tensor)
        device = values[tensor.names[0]].device
        is_compiled = "torch._dynamo" in sys.modules  # flashkan compiles its basis, which would take seconds
        stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
        plain = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), plain, stance, generators:
            yield values

    def _axes(self, tensor: CoefficientTensor, values: Mapping[str, Tensor], strict: bool) -> Verdict:
        x, (out, in_, *_) = self._input(tensor), tensor.shape
        channels = 1 - x.dim() if len(tensor.shape) == 4 else -1
        y = self._run(values, x)
        if y.dim() < max(2, -channels) or y.shape[channels] != out or y.shape[0] != x.shape[0]:
            raise Undecided(f"for an input {tuple(x.shape)} it returns {tuple(y.shape)}, and not {out} outputs")
        found = torch.autograd.grad(_weighted(y, tensor), [*values.values()], allow_unused=True, retain_graph=True)
        if strict and not all(g is not None and g.any() for g in found):
            return Verdict(False)
        gradient = _joined(found, values, tensor)
        if not gradient.any() or not gradient.isfinite().all():
            raise Undecided("the outputs have no finite gradient with respect to its coefficients")
        outputs = inputs = None
        contradiction = ""
        if out > 1:
            other = _gradient_of(_weighted(y, tensor, 2), values, tensor)
            says_little = _is_parallel(gradient.reshape(1, 1, -1), other.reshape(1, 1, -1))
            if says_little:  # as behind a softmax, or a norm, of two outputs
                other = gradient[_largest(gradient)].expand_as(gradient)
            outputs = _is_parallel(gradient, other) or (None if says_little and not strict else False)
            if outputs is False and x.numel() == in_:  # else a norm, or several rows, may mix them
                contradiction = "an output does not depend on its own slice of the coefficients alone"
        samples = [gradient]
        for kept, other in _changed_inputs(x, in_, channels, strict) if outputs is not False else ():
            samples.append(self._gradient(tensor, other, values))
            change = _change(gradient, samples[-1], kept)
            if change.max() <= _EFFECT * max(gradient.abs().max(), samples[-1].abs().max()):
                continue  # it does not show
            inputs = bool(change[:, kept].max() <= 10 * _NO_EFFECT * change.max())
            if not inputs:
                row = _largest(change[:, kept])
                if _is_elsewhere(gradient[row], samples[-1][row], tensor.shape[2]):
                    contradiction = "an input changes other slices of the coefficients than its own"
                break
        verdict = Verdict(outputs, inputs, contradiction=contradiction)
        if not strict or False in verdict[:2]:
            return verdict
        if in_ <= 3:
            samples += (self._gradient(tensor, x * factor, values) for factor in (0.3, 0.6, -0.8))
        row = _largest(gradient)  # of several functions the gradients at several inputs are of rank two at least
        singular = torch.linalg.svdvals(torch.stack([sample[row, :_ROWS] for sample in samples], dim=1).double())
        is_sum = bool((singular[:, 1:2] > _EFFECT * _EFFECT * singular.max()).any())
        is_sum = is_sum and self._is_nonlinear_map_of_rows(tensor, values)
        return Verdict(outputs, False if not is_sum else inputs if in_ > 2 else None)  # two inputs say little

    @torch.no_grad()
    def _is_nonlinear_map_of_rows(self, tensor: CoefficientTensor, values: Mapping[str, Tensor]) -> bool:
        """Whether each row of the output depends on its own row of the input alone, and not by an affine map.

        With one row attention is linear in its values. A normalization of two outputs leaves their signs, which may be
        constant.
        """
        x = self._input(tensor, rows=2)
        rows = x.view(4, -1)
        if rows.shape[1] > 1:  # that a normalization of the inputs does not make the same
            rows[2] = rows[0].roll(1)
        rows[1] = (rows[0] + rows[2]) / 2
        rows[3] = rows[2]  # one row or the other: a norm by the extremes of all rows does not notice
        values = moved(values, tensor.names)
        y = self._run(values, x).flatten(0, -2)
        rows[3] = rows[0]
        other = self._run(values, x).flatten(0, -2)
        rounding = 1e3 * torch.finfo(y.dtype).eps * y.abs().max()
        is_affine = (y[0] - 2 * y[1] + y[2]).abs().max() <= rounding < (y[0] - y[2]).abs().max()
        return bool(len(y) == 4 and (y - other)[:3].abs().max() <= rounding and not is_affine)

    def _gradient(self, tensor: CoefficientTensor, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The gradient of a weighted sum of the outputs at x, in the canonical order."""
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        return _gradient_of(_weighted(self._run(leaves, x), tensor), leaves, tensor)

    def _input(self, tensor: CoefficientTensor, rows: int = 1) -> Tensor:
        """One input, in the middle of the grid: (1, in), (1, 1, in), or (1, channels, *sizes) for a convolution.

        It has `rows` * `rows` rows if a layer that is no convolution takes them.
        """
        like, in_ = _wide(tensor.get_parameter(self.layer)), tensor.shape[1]
        if self.args:
            return self.args[0].detach().to(like)
        first, *_ = members = tensor.parts[0]
        blocks = len(members) * math.prod([first.lengths[axis] for axis in first.layout.groups])
        if len(tensor.shape) == 4:
            shape = [1, blocks * in_, *(4 * first.lengths[axis] + 3 for axis in first.layout.kernel)]
        elif blocks > 1:
            raise Undecided("the shape of its input is not known")
        else:
            leading = self._takes(tensor, in_) or (1,)  # else the layer raises its error
            shape = [*([rows, rows] if len(leading) == 2 else [rows * rows]), in_]
        ends = [(grid.min().item(), grid.max().item()) for grid in self.grid] or [(-1.0, 1.0)]
        inner = max(low for low, _ in ends), min(high for _, high in ends)
        low, high = inner if inner[0] < inner[1] else ends[0]
        steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
        share = (steps * 0.6180339887498949).frac().view(shape)  # of the golden ratio, without a repetition
        return (low + (high - low) * (0.25 + 0.5 * share)).to(like)

    def _takes(self, tensor: CoefficientTensor, size: int) -> tuple[int, ...] | None:
        """The axes in front of `size` features in an input that the layer takes, some take tokens; `None` if none."""
        for leading in ((1,), (1, 1)) if size not in self._leading else ():
            x = torch.zeros(*leading, size, device="cpu").to(_wide(tensor.get_parameter(self.layer)))
            try:
                with torch.no_grad():
                    self._run({}, x)
            except Exception as error:  # as in `axes`; perhaps an input of another size
                if not isinstance(error, Undecided):
                    self._leading[size] = None
                    continue
            self._leading[size] = leading
            break
        return self._leading[size]

    def _run(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        layer = _copy_of(self.layer, {})
        y = call_with_parameters(layer, {**values}, layer, (x, *self.args[1:]), {})
        y = y[0] if isinstance(y, (tuple, list)) and y else y
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise Undecided(f"it returns a {type(y).__name__}")
        return y


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


def _own_copy(value: Tensor) -> Tensor:
    return _wide(value.detach()).clone()


def moved(
    values: Mapping[str, Tensor], names: Collection[str], draw: Callable[..., Tensor] = torch.rand, factor: float = 1
) -> dict[str, Tensor]:
    """The parameters, to those of these names added a factor of noise of their mean size.

    By default it is positive, since widths are, and none is zero then.
    """
    generator = torch.Generator().manual_seed(_SEED)
    changed = {}
    for name in (name for name in values if name in names):
        value = values[name].detach()
        scale = factor * (float(value.abs().mean()) or 1.0)
        changed[name] = value + scale * draw(value.shape, generator=generator, device="cpu").to(value)
    return {**values, **changed}


def _weighted(y: Tensor, tensor: CoefficientTensor, seed: int = 1) -> Tensor:
    """A sum of the outputs with weights, none of which is zero; `seed` changes them by a factor for each output."""
    y = y.movedim(1, -1) if len(tensor.shape) == 4 else y
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(y.shape, generator=generator, device="cpu") - 0.5
    weights += weights.sign()  # of both signs: else the sum over a kernel's places hides what changes at each
    factors = torch.rand(y.shape[-1], generator=generator.manual_seed(seed), device="cpu") + 0.5
    return (y * (weights * factors).to(y)).sum()


def _gradient_of(y: Tensor, values: Mapping[str, Tensor], tensor: CoefficientTensor) -> Tensor:
    """The gradient of a number with respect to the parameters, as one tensor (out, in, rest)."""
    return _joined(torch.autograd.grad(y, [*values.values()], allow_unused=True, retain_graph=True), values, tensor)


def _joined(gradients: Sequence[Tensor | None], values: Mapping[str, Tensor], tensor: CoefficientTensor) -> Tensor:
    """Gradients as one tensor (out, in, rest). They are zero for parameters that all outputs share."""
    parts = [
        torch.zeros_like(value) if g is None or tensor.parameters[name].shared else g
        for g, (name, value) in zip(gradients, values.items(), strict=True)
    ]
    return tensor.join(parts).flatten(2)


def _changed_inputs(x: Tensor, count: int, channels: int, strict: bool) -> Iterator[tuple[slice, Tensor]]:
    """x with some of its `count` inputs changed as no normalization notices, and the slice of the others.

    These are two that are exchanged; with `strict` each half of them in turn.
    """
    half = max(1, count // 2)
    slices = (slice(half), slice(half, None)), (slice(count - half, None), slice(count - half))
    for kept, rest in slices if strict else [(slice(2, None), slice(2))] if count > 2 else ():
        blocks = x.unflatten(channels, (-1, count)).movedim(channels, -1)
        before, fixed = blocks[..., rest], blocks[..., kept]
        if before.shape[-1] > 1:
            changed = [before.roll(step, -1) for step in range(1, min(before.shape[-1], 3))]
        else:
            changed = [fixed + factor * (before - fixed) for factor in (0.5, 1.5, 2.5) if count > 1]
        for values in changed:
            other = blocks.clone()
            other[..., rest] = values
            yield kept, other.movedim(-1, channels).flatten(channels - 1, channels)


def _largest(gradient: Tensor) -> int:
    """The output with the largest gradient."""
    return int(gradient.flatten(1).abs().amax(1).argmax())


def _change(first: Tensor, second: Tensor, kept: slice) -> Tensor:
    """The difference of two gradients (out, in, rest), up to the factor of each output that fits some inputs best."""
    # the smaller of two rows is a multiple of the larger: a ReLU may have made it zero
    swap = (first[:, kept].flatten(1).norm(dim=1) < second[:, kept].flatten(1).norm(dim=1))[:, None, None]
    first, second = torch.where(swap, second, first), torch.where(swap, first, second)
    old, new = first[:, kept].flatten(1), second[:, kept].flatten(1)
    factors = ((old * new).sum(1) / (old * old).sum(1).clamp(min=1e-30))[:, None, None]
    return (second - factors * first).abs()


def _is_parallel(first: Tensor, second: Tensor) -> bool:
    """Whether two gradients (out, in, rest) are equal up to a factor for each output."""
    return bool(_change(first, second, slice(None)).max() <= 10 * _NO_EFFECT * first.abs().max())


def _is_elsewhere(first: Tensor, second: Tensor, basis: int) -> bool:
    """Whether a large share of the gradient of one output stays, though not where the pattern says.

    A layer that mixes inputs changes all of it, but for a constant function of `basis` functions.
    """
    ratios = (second / first)[first != 0][:512]
    is_near = (ratios[:, None] - ratios).abs() <= 10 * _NO_EFFECT * ratios.abs()
    stays = (is_near & (ratios != 0)).double().mean(1)  # splines end
    return bool(stays.max() > max(0.3, 1.4 / basis))
