# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs copies of a layer, with other parameters and inputs, and returns outputs and gradients."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..modules.calls import call_with_parameters, without_autocast


_SEED = 16180339  # with the seed of the layer's own initialization, noise and coefficients would be proportional
GOLDEN_RATIO = 0.6180339887498949
# The settings of a module that its forward pass may depend on. `Number` includes NumPy's.
_SETTINGS = (str, FunctionType, BuiltinFunctionType, Number)
_LONG = 64  # an axis of more is shortened
_SHORT = 17  # the shortest length of it, seldom a number of functions
_cache: WeakKeyDictionary[type, dict[Any, Any]] = WeakKeyDictionary()

T = TypeVar("T")
Gradients = Mapping[str, Tensor | None]


class CannotProbe(Exception):
    """Nothing can be said about a layer. The message is the reason."""


@contextmanager
def _reporting_errors() -> Iterator[None]:
    """Turn an error of the layer, which may raise anything, into `CannotProbe`."""
    try:
        yield
    except CannotProbe:
        raise
    except Exception as error:
        name = type(error).__name__
        # torch's own say nothing about the layer
        words = [] if isinstance(error, (RuntimeError, IndexError)) else f"{error!s:.120}".splitlines()[:1]
        raise CannotProbe(": ".join([f"the layer raised {name}", *words])) from error


def cached_by_class(
    layer: nn.Module,
    question: tuple,
    answer: Callable[[], T],
) -> T:
    """Return `answer()`, computed once for layers of the same class, shapes, settings and inner modules.

    It makes no difference whether a layer is frozen as a whole.
    """
    is_trained = any(parameter.requires_grad for parameter in layer.parameters())
    entries: list[Any] = [question]
    for module in layer.modules():
        entries.append(type(module))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                is_fixed = is_trained and not parameter.requires_grad
                entries += [name, parameter.shape, parameter.dtype, is_fixed]
        for name, setting in vars(module).items():
            settings = setting if isinstance(setting, (tuple, list)) else (setting,)
            if name != "training" and all(isinstance(value, _SETTINGS) for value in settings):
                entries += [name, tuple(getattr(value, "__qualname__", value) for value in settings)]

    answers = _cache.setdefault(type(layer), {})
    key = tuple(entries)
    if key not in answers:
        answers[key] = answer()
    return answers[key]


def describe_arguments(args: Any, kwargs: Any) -> tuple:
    """Return what a layer may tell from the arguments of a call, besides the values of tensors."""
    entries: list[Any] = []
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            entries += [leaf.shape, leaf.dtype]
        else:
            entries.append(leaf if isinstance(leaf, _SETTINGS) else type(leaf))
    return tuple(entries)


@contextmanager
def isolated(like: Tensor) -> Iterator[None]:
    """Run layers eagerly, without autocast. Restore the random generators at the end."""
    # compiling a basis, as flashkan does, would take seconds
    is_compiler_loaded = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if is_compiler_loaded else nullcontext()
    generators = torch.random.fork_rng([like.device] if like.is_cuda else [])
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(like), eager, generators:
        yield


def perturbed(
    parameters: Mapping[str, Tensor],
    names: Collection[str],
    draw: Callable[..., Tensor] = torch.rand,
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """Return the parameters with noise, `factor` times their mean size, added to the named ones.

    By default the noise is positive: widths stay positive, and no parameter stays zero.
    """
    generator = torch.Generator().manual_seed(_SEED)
    result = dict(parameters)
    for name, parameter in parameters.items():
        if name not in names or not parameter.is_floating_point():
            continue
        parameter = parameter.detach()
        size = float(parameter.abs().mean()) or 1.0
        noise = draw(parameter.shape, generator=generator, device="cpu")
        result[name] = parameter + factor * size * noise.to(parameter)
    return result


class Probe:
    """Runs copies of a layer, in evaluation mode and without hooks. The layer stays unchanged.

    Attributes:
        parameters: Copies of the named parameters. Gradients are taken with respect to them.
        x: The input that the user gives, the first argument of a floating type that has dimensions. By default inputs
            are made up.
        error: The reason why the first run failed.

    Raises:
        CannotProbe: A parameter has no values.
    """

    @torch.inference_mode(False)  # copies made in that mode have no gradients
    def __init__(
        self,
        layer: nn.Module,
        names: Iterable[str],
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> None:
        self.layer = layer
        self.args = [*args]
        self.kwargs = dict(kwargs or {})
        self.parameters = {name: _copy_parameter(layer, name) for name in names}
        self.like = next(iter(self.parameters.values()))
        self.error = ""
        self.low = -1.0
        self.high = 1.0

        self._position = 0  # of the input among the arguments
        self.x: Tensor | None = None
        for position, arg in enumerate(args):
            if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dim():
                self._position = position
                self.x = arg.detach().to(self.like, copy=True)
                break

    def place_inputs(self, grid: Iterable[Any]) -> None:
        """Make up inputs where all grids overlap, or on the first grid. Without a grid they are in [-1, 1]."""
        tensors = [value for value in grid if isinstance(value, Tensor) and value.numel() > 1]
        lows = [value.min().item() for value in tensors] or [-1.0]
        highs = [value.max().item() for value in tensors] or [1.0]
        self.low = max(lows)
        self.high = min(highs)
        if not self.low < self.high:
            self.low = lows[0]
            self.high = highs[0]

    def make_input(self, shape: Sequence[int]) -> Tensor:
        """Return points of this shape in the middle of the grid. None of them is repeated."""
        count = math.prod(shape)
        steps = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
        share = (steps * GOLDEN_RATIO).frac().view(*shape)
        middle_share = 0.25 + 0.5 * share
        points = self.low + (self.high - self.low) * middle_share
        return points.to(self.like)

    @_reporting_errors()
    def run(
        self,
        x: Tensor,
        channel: int,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the first output of the layer, with its features in the last axis.

        Args:
            x: The input, with its features in the last axis.
            channel: The axis of the features in the layer's own order.
            parameters: Replacements of parameters of the layer.
        """
        args = [*self.args] or [x]
        args[self._position] = x.movedim(-1, channel)
        layer = _copy_module(self.layer, {})
        # the layer's own parameters are never used: it may initialize them in place at its first input
        copies = dict(parameters or self.parameters)
        y = call_with_parameters(layer, copies, layer, tuple(args), self.kwargs)
        if isinstance(y, (tuple, list)) and y:
            y = y[0]
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise CannotProbe(f"it returns a {type(y).__name__}")
        return y.movedim(channel, -1)

    def attempt(self, *args: Any) -> Tensor | None:
        """Return the output as `run` does; None if the layer does not take this input."""
        try:
            with torch.no_grad():
                return self.run(*args)
        except CannotProbe as reason:
            self.error = self.error or str(reason)
            return None

    @_reporting_errors()
    def gradients(
        self,
        x: Tensor,
        channel: int,
        parameters: Mapping[str, Tensor] | None = None,
        seed: int = 1,
    ) -> Gradients:
        """Return the gradient of a weighted sum of the outputs with respect to each parameter.

        Each `seed` multiplies the weights by other factors, one for each output. See `run` for the other arguments.
        """
        values = parameters or self.parameters
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        y = self.run(x, channel, leaves)

        generator = torch.Generator().manual_seed(0)
        # none is zero; both signs, so that the positions of a kernel do not cancel
        weights = torch.rand(y.shape, generator=generator, device="cpu") - 0.5
        weights += weights.sign()
        generator.manual_seed(seed)
        factors = torch.rand(y.shape[-1], generator=generator, device="cpu")
        weights *= factors + 0.5
        total = (y * weights.to(y)).sum()
        gradients = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
        return dict(zip(leaves, gradients, strict=True))


def _copy_parameter(layer: nn.Module, name: str) -> Tensor:
    """Return a copy of a parameter, in float32 at least."""
    path, _, attribute = name.rpartition(".")
    parameter = layer.get_submodule(path)._parameters.get(attribute)
    if parameter is None or hasattr(parameter, "placements"):
        raise CannotProbe(f"`{name}` is sharded, or computed from other parameters")
    if parameter.is_meta or not parameter.is_floating_point():
        raise CannotProbe(f"`{name}` has no values that could be run: {parameter.dtype}, {parameter.device.type}")
    return _widen(parameter.detach()).clone()


def _copy_module(
    module: nn.Module,
    copies: dict[nn.Module, nn.Module],
) -> nn.Module:
    """Return a copy in evaluation mode, without hooks, that shares the parameters and has its own buffers."""
    if module in copies:
        return copies[module]
    copy = copies[module] = object.__new__(type(module))
    attributes = vars(copy)
    for name, value in vars(module).items():
        attributes[name] = OrderedDict() if name.endswith("_hooks") else value

    buffers = dict(module._buffers)
    for name, buffer in buffers.items():
        if buffer is not None:
            buffers[name] = _widen(buffer).clone()
    children = dict(module._modules)
    for name, child in children.items():
        if child is not None:
            children[name] = _copy_module(child, copies)
    attributes.update(
        training=False,
        _parameters=dict(module._parameters),
        _buffers=buffers,
        _modules=children,
    )
    return copy


def ask_short_copy(layer: nn.Module, ask: Callable[[nn.Module], T]) -> T | None:
    """Return `ask(copy)` for a copy of a wide layer with fewer inputs and outputs.

    Most layers compute the same function at all sizes. Return None if no axis is long, or if the copy raises an error:
    the size may be a constant in the code.
    """
    lengths = shorter_lengths(layer)
    if not lengths:
        return None
    with suppress(Exception):
        return ask(_shorten(layer, lengths))


def shorter_lengths(layer: nn.Module) -> dict[int, int]:
    """Return the shorter length for each long axis. All have the same ratio, so that products stay products."""
    tensors = (*layer.parameters(), *layer.buffers())
    long = {length for tensor in tensors for length in tensor.shape if length > _LONG}
    for module in layer.modules():
        for setting in vars(module).values():
            if type(setting) is int and setting > _LONG and any(length % setting == 0 for length in long):
                long.add(setting)
    divisor = math.gcd(*long)
    factor = math.ceil(_SHORT * divisor / min(long, default=1))
    if factor >= divisor:
        return {}
    return {length: length // divisor * factor for length in long}


def _shorten(layer: nn.Module, lengths: Mapping[int, int]) -> nn.Module:
    """Return a copy of a layer with shorter axes, also where the lengths are settings."""
    copies: dict[nn.Module, nn.Module] = {}
    short = _copy_module(layer, copies)
    parameters: dict[Any, nn.Parameter] = {}  # tied ones stay tied
    for module, copy in copies.items():
        for name, setting in vars(copy).items():
            if type(setting) in (tuple, list, torch.Size):
                vars(copy)[name] = type(setting)(_replace_length(value, lengths) for value in setting)
            else:
                vars(copy)[name] = _replace_length(setting, lengths)
        for name, value in module._parameters.items():
            if value is not None:
                copy._parameters[name] = parameters.setdefault(value, nn.Parameter(_cut(value, lengths)))
        for name, value in copy._buffers.items():
            copy._buffers[name] = value if value is None else _cut(value, lengths)
        copy.training = module.training
    for value, parameter in parameters.items():
        parameter.requires_grad_(value.requires_grad)
    return short


def _replace_length(value: Any, lengths: Mapping[int, int]) -> Any:
    return lengths.get(value, value) if type(value) is int else value


def _cut(value: Tensor, lengths: Mapping[int, int]) -> Tensor:
    shape = [lengths.get(length, length) for length in value.shape]
    return value.detach()[tuple(map(slice, shape))].clone()


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
