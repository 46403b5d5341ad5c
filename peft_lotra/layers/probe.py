# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a layer does, compared with its description: a few gradients and outputs of a copy that shares its tensors.

For one input x the output before normalizations is z[o] = sum_{i,k} A[o,i,k] phi_k(x[i]), so that the gradient of any
function of the outputs is d[o] phi_k(x[i]). Three things follow, and are checked.

* The gradient of one output is zero but in its slice of A, or, behind a normalization of the outputs, the gradient is
  of rank one when it is unfolded along the outputs.
* If two inputs are exchanged, which no normalization of the inputs notices, the gradient changes in their slices
  alone, up to a factor for each output.
* The output is an affine function of A.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modules.calls import settled
from .coefficients import CoefficientTensor


NO_EFFECT = 1e-4  # of the largest gradient: rounding
EFFECT = 1e-2
_MAX_INPUT = 1 << 22  # elements
_ROWS = 32  # outputs of which the gradients are compared
CURVATURE = 1e-2  # of the change: more than rounding in float32 makes of an affine function


class Verdict(NamedTuple):
    """What a probe found of each axis: `True` as described, `False` not so, `None` not decided.

    An axis that is not as described may also be one that the layer mixes, e.g. by a normalization.
    """

    outputs: bool | None = None
    inputs: bool | None = None
    reason: str = ""  # why nothing was decided
    contradicted: bool = False  # an output does not depend on its own slice, and does on others
    has_raised: bool = False  # the layer does not take an input of the described size

    @property
    def is_verified(self) -> bool:
        """Whether an axis is as described, and none is not."""
        return False not in self[:2] and True in self[:2]

    def __str__(self) -> str:
        words = {True: "verified", False: "not as described, or mixed", None: "not decided"}
        if self[:2] == (None, None):
            return f"not verified: {self.reason or 'all axes have the length one'}"
        return f"outputs {words[self.outputs]}, inputs {words[self.inputs]}"


class Probe:
    """Runs a copy of a layer that shares its tensors, in evaluation mode, without hooks, on one input.

    Nothing of the layer itself is changed, nor the random generators. Whatever the layer raises ends in
    `Verdict.reason`.

    Args:
        layer: The layer.
        grid: The tensors that say where the basis functions are, to place the input there.
        args: The arguments of the layer, inputs first; by default one input is made up.
    """

    def __init__(self, layer: nn.Module, grid: Mapping[str, Any], args: tuple[Any, ...] = ()) -> None:
        self.layer, self.args = layer, args
        self.grid = [value for value in grid.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
        self._rows: tuple[int, ...] | None = None  # the axes of the input in front of its features

    def can_run(self, tensor: CoefficientTensor) -> bool:
        """Whether the parameters of the layer are such that it may be run."""
        try:
            self._like(tensor)
        except _Undecided:
            return False
        return True

    def axes(self, tensor: CoefficientTensor) -> Verdict:
        """Compares the output and the input mode of a reading of the coefficients with what the layer does."""
        try:
            with isolated(self._like(tensor)):
                return self._axes(tensor)
        except _Undecided as reason:
            return Verdict(reason=str(reason))
        except Exception as error:  # foreign code, which may raise anything: it wants other arguments
            return Verdict(reason=f"the layer raised {type(error).__name__}: {error!s:.120}", has_raised=True)

    def curvature(self, tensor: CoefficientTensor) -> float | None:
        """How much the output deviates from an affine function of the coefficients, as a share of its change.

        `None` if that cannot be said.
        """
        try:
            with isolated(self._like(tensor)), torch.no_grad():
                x = self._input(tensor, rows=2)
                values = {name: own_copy(value) for name, value in tensor.read_parameters(self.layer).items()}
                generator = torch.Generator().manual_seed(0)
                steps = {
                    name: torch.randn(value.shape, generator=generator, device="cpu").to(value) * mean_size(value)
                    for name, value in values.items()
                }
                # so far that a ReLU behind the sum is met on both sides
                low, middle, high = (
                    self._run({name: value + t * steps[name] for name, value in values.items()}, x) for t in (-2, 0, 2)
                )
                change, bend = (high - low).abs().max(), (high - 2 * middle + low).abs().max()
                rounding = 1e3 * torch.finfo(x.dtype).eps * max(y.abs().max().item() for y in (low, middle, high))
                if not torch.isfinite(bend) or max(change, bend) <= rounding:
                    return None
                return max(bend.item() - rounding, 0.0) / max(change, bend).item()
        except Exception:  # as above
            return None

    def is_linear(self, tensor: CoefficientTensor) -> bool:
        """Whether the output is an affine function of the coefficients, or it cannot be said."""
        return (self.curvature(tensor) or 0.0) <= CURVATURE

    def reached(self, names: Sequence[str], tensor: CoefficientTensor) -> dict[str, bool]:
        """Whether the output depends on each of these parameters."""
        found = self._gradients(names, tensor)
        return {name: g is not None and bool(g.any()) for name, g in found.items()}

    def unused(self, tensor: CoefficientTensor) -> list[str]:
        """The parameters that the output is not computed from; none if the layer cannot be run."""
        try:
            found = self._gradients(list(tensor.read_parameters(self.layer)), tensor)
        except Exception:  # as above
            return []
        return [name for name, g in found.items() if g is None]

    def _gradients(self, names: Sequence[str], tensor: CoefficientTensor) -> dict[str, torch.Tensor | None]:
        """The gradient of a function of all outputs with respect to each of these parameters, if it enters there."""
        with isolated(self._like(tensor)):
            values = {name: own_copy(self.layer.get_parameter(name)).requires_grad_() for name in names}
            y = self._run(values, self._input(tensor))
            if not y.requires_grad:
                other = self._run({name: value + 1.0 for name, value in values.items()}, self._input(tensor))
                if torch.equal(y, other):
                    return dict.fromkeys(names)
            found = torch.autograd.grad(y.square().sum(), list(values.values()), allow_unused=True)
        return dict(zip(names, found, strict=True))

    def _like(self, tensor: CoefficientTensor) -> torch.Tensor:
        """The first parameter, if the layer can be run."""
        values = tensor.read_parameters(self.layer)
        for name, value in values.items():
            path, _, attribute = name.rpartition(".")
            if attribute not in self.layer.get_submodule(path)._parameters or hasattr(value, "placements"):
                raise _Undecided(f"`{name}` is sharded, or computed from other parameters")
            if value.is_meta or not value.is_floating_point():
                raise _Undecided(f"`{name}` has no values that could be run: {value.dtype}, {value.device.type}")
        if any(len(part) > 1 for part in tensor.parts) and len(tensor.shape) == 3:
            raise _Undecided("the module consists of several layers")
        return values[tensor.name]

    def _axes(self, tensor: CoefficientTensor) -> Verdict:
        x = self._input(tensor)
        out, in_, *_ = tensor.shape
        values = {n: own_copy(v).requires_grad_() for n, v in tensor.read_parameters(self.layer).items()}
        channels = 1 if len(tensor.shape) == 4 else -1
        y = self._run(values, x)
        if y.dim() < 2 or y.shape[channels] != out or y.shape[0] != x.shape[0]:
            raise _Undecided(f"for an input {tuple(x.shape)} it returns {tuple(y.shape)}, and not {out} outputs")
        weights = output_weights(y)

        def gradient(of: torch.Tensor) -> torch.Tensor:
            return gradient_of(of, values, tensor, retain_graph=True).flatten(2)

        whole = gradient((y * weights).sum())
        if not whole.any() or not whole.isfinite().all():
            raise _Undecided("the outputs have no finite gradient with respect to its coefficients")
        outputs = inputs = None
        contradicted = False
        if out > 1:
            place = int(whole.flatten(1).abs().amax(1).argmax())
            sizes = gradient((y * weights).select(channels, place).sum()).flatten(1).abs().amax(1)
            own, others = sizes[place].item(), torch.cat([sizes[:place], sizes[place + 1 :]]).max().item()
            contradicted = own <= NO_EFFECT * others
            outputs = others <= NO_EFFECT * own
            if not outputs and x.numel() == in_ and not _is_of_rank_one(whole.transpose(0, 1).flatten(1)):
                outputs = _is_of_rank_one(whole.flatten(1))
        if in_ > 2:
            order = torch.arange(x.shape[channels], device=x.device)
            order[:2] = order[:2].flip(0)
            other = x.index_select(channels if channels == 1 else x.dim() - 1, order)
            y = self._run(values, other)
            rows = whole.flatten(1).abs().amax(1).topk(min(out, _ROWS)).indices
            inputs = _changes_in(whole[rows], gradient((y * weights).sum())[rows], 2)
        return Verdict(outputs, inputs, contradicted=contradicted)

    def _input(self, tensor: CoefficientTensor, rows: int = 1) -> torch.Tensor:
        """One input, in the middle of the grid: (1, in), (1, 1, in), or (1, channels, *sizes) for a convolution.

        It has `rows` * `rows` rows if a layer that is no convolution takes them.
        """
        like = _wide(tensor.get_parameter(self.layer))
        if self.args:
            return self.args[0].detach().to(like)
        if self._rows is None and len(tensor.shape) == 3:
            self._rows = self._find_rows(tensor)
        shape, blocks = [*(self._rows or (1,)), tensor.shape[1]], _blocks(tensor)
        if len(tensor.shape) == 3:
            shape[:-1] = [rows] * (len(shape) - 1) if len(shape) == 3 else [rows * rows]
        if len(tensor.shape) == 4:
            member = tensor.parts[0][0]
            shape[1] *= blocks
            shape += [4 * member.lengths[axis] + 3 for axis in member.layout.kernel]
        elif blocks > 1:
            raise _Undecided("the shape of its input is not known")
        if math.prod(shape) > _MAX_INPUT:
            raise _Undecided(f"an input {tuple(shape)} would be large")
        low, high = -1.0, 1.0
        if self.grid:
            low = max(grid.min().item() for grid in self.grid)
            high = min(grid.max().item() for grid in self.grid)
            if low >= high:
                low, high = self.grid[0].min().item(), self.grid[0].max().item()
        # steps of the golden ratio, without a repetition
        share = (
            torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
            .mul(0.6180339887498949)
            .frac()
            .view(shape)
        )
        return (low + (high - low) * (0.25 + 0.5 * share)).to(like)

    def _find_rows(self, tensor: CoefficientTensor) -> tuple[int, ...] | None:
        """The axes in front of the features in an input that the layer takes: some take (batch, tokens, features)."""
        for rows in ((1,), (1, 1)):
            try:
                with torch.no_grad():
                    self._run(
                        {},
                        torch.zeros(*rows, tensor.shape[1], device="cpu").to(_wide(tensor.get_parameter(self.layer))),
                    )
            except _Undecided:
                return rows
            except Exception:  # as in `axes`; perhaps an input of another size
                continue
            return rows
        return None

    def _run(self, values: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        copy = _copy_of(self.layer, {})
        # in float32 at least, as `values` are
        for name, value in values.items():
            path, _, attribute = name.rpartition(".")
            copy.get_submodule(path)._parameters[attribute] = value  # pyright: ignore[reportArgumentType]
        y = copy(x, *self.args[1:])
        y = y[0] if isinstance(y, (tuple, list)) and y else y
        if not isinstance(y, torch.Tensor) or not y.is_floating_point():
            raise _Undecided(f"it returns a {type(y).__name__}")
        return y


class _Undecided(Exception):
    """Nothing can be said of a layer, with the reason."""


def isolated(like: torch.Tensor) -> ExitStack:
    """A context in which gradients are computed, and the random generators are put back at the end."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast(like.device.type, enabled=False))
    if "torch._dynamo" in sys.modules:  # flashkan compiles its basis, which would take seconds
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    stack.enter_context(torch.random.fork_rng([like.device] if like.device.type == "cuda" else []))
    return stack


def _copy_of(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy in evaluation mode, without hooks, that shares the parameters and has buffers of its own.

    It is in float32 if the module is in half precision.
    """
    if id(module) in made:
        return made[id(module)]
    copy = made[id(module)] = object.__new__(settled(type(module), tuple(module._parameters)))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update({name: OrderedDict() for name, value in vars(module).items() if name.endswith("_hooks")})
    copy.__dict__.update(
        training=False,
        _parameters={name: None if value is None else _wide(value) for name, value in module._parameters.items()},
        _buffers={name: None if value is None else _wide(value).clone() for name, value in module._buffers.items()},
        _modules={n: None if child is None else _copy_of(child, made) for n, child in module._modules.items()},
    )
    return copy


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def own_copy(value: torch.Tensor) -> torch.Tensor:
    return _wide(value.detach()).clone()


def output_weights(y: torch.Tensor) -> torch.Tensor:
    """A weight of each output, none of which is zero."""
    return torch.rand(y.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(y) + 0.5


def gradient_of(
    y: torch.Tensor, values: Mapping[str, torch.Tensor], tensor: CoefficientTensor, retain_graph: bool = False
) -> torch.Tensor:
    """The gradient of a number with respect to the parameters, as one canonical tensor.

    It is zero for parameters that all outputs share, which say nothing of the axes.
    """
    found = torch.autograd.grad(y, list(values.values()), allow_unused=True, retain_graph=retain_graph)
    return tensor.join(
        [
            torch.zeros_like(value) if g is None or tensor.parameters[name].shared else g
            for g, (name, value) in zip(found, values.items(), strict=True)
        ]
    )


def _blocks(tensor: CoefficientTensor) -> int:
    """The number of blocks that have inputs of their own."""
    first, *others = tensor.parts[0]
    return 1 + len(others) if others else math.prod(first.lengths[axis] for axis in first.layout.groups)


def mean_size(value: torch.Tensor) -> float:
    return float(value.detach().abs().mean()) or 1.0


def _is_of_rank_one(matrix: torch.Tensor) -> bool:
    """Whether each row (outputs, rest) is a multiple of the largest row."""
    largest = matrix[matrix.abs().amax(1).argmax()]
    rest = matrix - torch.outer(matrix @ largest / largest.dot(largest), largest)
    return bool(rest.abs().max() <= 10 * NO_EFFECT * matrix.abs().max()) and int((matrix.abs().amax(1) > 0).sum()) > 1


def _changes_in(first: torch.Tensor, second: torch.Tensor, count: int) -> bool | None:
    """Whether two gradients (out, in, rest) differ in the first `count` inputs alone, up to a factor by output."""
    others, new = first[:, count:].flatten(1), second[:, count:].flatten(1)
    factors = ((others * new).sum(1) / (others * others).sum(1).clamp(min=1e-30))[:, None, None]
    change = (second - factors * first).abs()
    scale = max(first.abs().max().item(), second.abs().max().item())
    if change.max() <= EFFECT * scale:
        return None  # the exchange does not show
    return bool(change[:, count:].max() <= 10 * NO_EFFECT * change.max())
