# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Whether a layer that nobody described is a sum of functions of one input each, by its gradients.

With y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])) the gradient with respect to A[o,i,k] is d[o] phi_k(x[i]): at one value
of x[i] it is the same, up to the factor of each output, whatever the other inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .coefficients import CoefficientTensor
from .probe import EFFECT, NO_EFFECT, Probe, gradient_of, isolated, mean_size, output_weights, own_copy


_SEED = 16180339  # none with which a layer may have been made: the noise would be a multiple of its coefficients
_INPUTS = 32  # of which the functions are compared


class FunctionProbe(Probe):
    """A probe for layers that nobody described."""

    def is_sum_of_functions(self, tensor: CoefficientTensor) -> bool:
        """Whether the factors of A are at least two functions of one input each, whatever the other inputs are.

        Factors that depend on other inputs, as gates and attention give, change with these. If all factors are
        multiples of one function, the layer is a linear map of it: no KAN layer.
        """
        try:
            with isolated(self._like(tensor)):
                if not self._is_nonlinear_map_of_rows(tensor):
                    return False
                x = self._input(tensor)
                first, samples = self._gradient(tensor, x), []
                for kept, other in _changed(x):
                    samples.append(self._gradient(tensor, other))
                    if not _is_parallel(first[:, kept].flatten(1), samples[-1][:, kept].flatten(1)):
                        return False
                if x.shape[-1] <= 3:
                    samples += [self._gradient(tensor, x * factor) for factor in (0.3, 0.6, -0.8)]
                largest = int(first.flatten(1).abs().amax(1).argmax())
                # of each input, the functions at several values of it
                functions = torch.stack([sample[largest, :_INPUTS] for sample in (first, *samples)], dim=1)
                singular = torch.linalg.svdvals(functions.double())
                return bool((singular[:, 1:2] > EFFECT * EFFECT * singular.max()).any())
        except Exception:  # as in `axes`
            return False

    @torch.no_grad()
    def _is_nonlinear_map_of_rows(self, tensor: CoefficientTensor) -> bool:
        """Whether each row of the output depends on its own row of the input alone, and not by an affine map.

        With one row attention is linear in its values. A normalization of two outputs leaves their signs, which may be
        constant.
        """
        x = self._input(tensor, rows=2)
        rows = x.view(4, -1)
        if rows.shape[1] > 1:  # that a normalization of the inputs does not make the same
            rows[2] = rows[0].roll(1)
        rows[1] = (rows[0] + rows[2]) / 2
        values = self._moved(tensor)
        y = self._run(values, x).flatten(0, -2)
        rows[3] = rows[0]
        other = self._run(values, x).flatten(0, -2)
        rounding = 1e3 * torch.finfo(y.dtype).eps * y.abs().max()
        is_affine = (y[0] - 2 * y[1] + y[2]).abs().max() <= rounding < (y[0] - y[2]).abs().max()
        return bool(len(y) == 4 and (y - other)[:3].abs().max() <= rounding and not is_affine)

    def _moved(self, tensor: CoefficientTensor) -> dict[str, torch.Tensor]:
        """The parameters with other coefficients, none of which is zero: larger ones, since widths are positive."""
        values = {name: own_copy(value) for name, value in tensor.read_parameters(self.layer).items()}
        generator = torch.Generator().manual_seed(_SEED)
        for name in tensor.names:
            noise = torch.rand(values[name].shape, generator=generator, device="cpu")
            values[name] += noise.to(values[name]) * mean_size(values[name])
        return values

    def is_additive(self, tensor: CoefficientTensor) -> bool:
        """Whether the factors of the residual weights stay, up to one of each output, if the coefficients change."""
        try:
            with isolated(self._like(tensor)):
                x = self._input(tensor)
                first, second = self._gradient(tensor, x), self._gradient(tensor, x, self._moved(tensor))
                return _is_parallel(first[:, :, -1], second[:, :, -1])
        except Exception:  # as in `axes`
            return False

    def _gradient(
        self, tensor: CoefficientTensor, x: torch.Tensor, values: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The gradient (out, in, basis) of a weighted sum of the outputs."""
        read = values or tensor.read_parameters(self.layer)
        leaves = {name: own_copy(value).requires_grad_() for name, value in read.items()}
        y = self._run(leaves, x)
        return gradient_of((y * output_weights(y)).sum(), leaves, tensor)


def _changed(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each half of the inputs, with x changed in the other half as no normalization of the inputs notices."""
    count = x.shape[-1]
    half = max(1, count // 2)
    for kept, rest in ((slice(half), slice(half, None)), (slice(count - half, None), slice(count - half))):
        before = x[..., rest]
        if before.shape[-1] > 1:
            changed = [before.roll(step, -1) for step in range(1, min(before.shape[-1], 3))]
        else:
            changed = [x[..., kept] + factor * (before - x[..., kept]) for factor in (0.5, 1.5, 2.5) if count > 1]
        for values in changed:
            other = x.clone()
            other[..., rest] = values
            yield kept, other


def _is_parallel(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether of each row of two matrices the smaller is a multiple of the larger: a ReLU may have made it zero."""
    exchange = (first.norm(dim=1) < second.norm(dim=1))[:, None]
    first, second = torch.where(exchange, second, first), torch.where(exchange, first, second)
    factors = ((first * second).sum(1) / (first * first).sum(1).clamp(min=1e-30))[:, None]
    return bool((second - factors * first).abs().max() <= 10 * NO_EFFECT * first.abs().max())
