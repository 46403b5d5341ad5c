# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Whether a layer that nobody described is a sum of functions of one input each, by its gradients.

With y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])) the gradient with respect to A[o,i,k] is d[o] phi_k(x[i]): at one value
of x[i] it is the same, up to the factor of each output, whatever the other inputs are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .coefficients import CoefficientTensor
from .probe import EFFECT, NO_EFFECT, Probe, gradient_of, isolated, mean_size, output_weights, own_copy


_SEED = 16180339  # none with which a layer may have been made: the noise would be a multiple of its coefficients


class FunctionProbe(Probe):
    """A probe for layers that nobody described."""

    def is_sum_of_functions(self, tensor: CoefficientTensor) -> bool:
        """Whether the factors of A are at least two functions of one input each, whatever the other inputs are.

        The other inputs are permuted, which no normalization of the inputs notices. Factors that depend on them, as
        gates and attention give, change then. If all factors are multiples of one function, the layer is a linear map
        of it: no KAN layer.
        """
        try:
            with isolated(self._like(tensor)):
                x = self._input(tensor)
                inputs = x.shape[-1]
                rest = list(range(1, inputs))
                others = [x[..., [0, *rest[step:], *rest[:step]]] for step in range(1, min(inputs - 1, 5))]
                if inputs == 2:
                    others = [torch.stack([x[..., 0], 0.5 * (x[..., 0] + x[..., 1])], dim=-1)]
                first = self._gradient(tensor, x)
                if any(not _is_parallel(first[:, 0], self._gradient(tensor, other)[:, 0]) for other in others):
                    return False
                samples = (
                    [first] if inputs > 3 else [first, *(self._gradient(tensor, x * f) for f in (0.3, 0.6, -0.8))]
                )
                largest = int(first.flatten(1).abs().amax(1).argmax())
                functions = torch.cat([sample[largest] for sample in samples])  # (inputs, basis)
                singular = torch.linalg.svdvals(functions.double())
                return bool(len(singular) > 1 and singular[1] > EFFECT * EFFECT * singular[0])
        except Exception:  # as in `axes`
            return False

    def is_additive(self, tensor: CoefficientTensor) -> bool:
        """Whether the factors of the residual weights stay, up to one of each output, if the coefficients change."""
        try:
            with isolated(self._like(tensor)):
                x = self._input(tensor)
                values = {name: own_copy(value) for name, value in tensor.read_parameters(self.layer).items()}
                generator = torch.Generator().manual_seed(_SEED)
                for name in tensor.names:
                    noise = torch.randn(values[name].shape, generator=generator, device="cpu")
                    values[name] += noise.to(values[name]) * mean_size(values[name])
                first, second = self._gradient(tensor, x), self._gradient(tensor, x, values)
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


def _is_parallel(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether each row of two matrices is a multiple of the other's."""
    factors = ((first * second).sum(1) / (first * first).sum(1).clamp(min=1e-30))[:, None]
    rest = (second - factors * first).abs().max()
    return bool(rest <= 10 * NO_EFFECT * max(first.abs().max().item(), second.abs().max().item()))
