# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Weights of coefficients by data: the basis functions at the inputs of a layer, and how much each output counts.

A change D (out, in basis) of the coefficients changes the outputs of the model by about ||Phi D^T M^(1/2)||. Phi
(samples, in basis) are the basis functions, and M is the sum of J^T J, with J the derivatives of the model's outputs
in the outputs of the layer, as in the Gauss-Newton matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..layers.formula import find_formula
from ..layers.recognize import is_linear
from ..modules.calls import call_with_inputs, call_with_parameters, generators_kept, modes_kept, set_mode
from ..tucker import Tucker, full_shape, project, tucker
from ..tuner.by_row import first_argument
from ..tuner.grids import warn_of_far_inputs
from ..tuner.layer import Target
from ..tuner.targets import locate_target


# a tensor, positional arguments, named ones, or a function that runs the model and returns its output
Inputs = Tensor | tuple | list | Mapping[str, Any] | Callable[[nn.Module], Any]

# The weight of a direction without samples, as a share of the mean over all directions.
RIDGE = 1e-3  # of the basis functions
OUTPUT_RIDGE = 1e-2  # of the outputs of a layer

PROBES = 16  # random directions of the model's outputs whose gradients reach the layers
TINY = 1e-300  # in place of a norm of zero
SHARED = 1e-3  # the relative error of functions that all outputs share


class DataWeights:
    """Basis functions of a layer at samples of its inputs, and weights of its outputs.

    Attributes:
        values: The basis functions (samples, in, basis), in float64.
        roots: The square roots of the second moments of the values, (in, in) and (basis, basis).
        output_root: The square root (out, out) of the metric.
    """

    def __init__(self, values: Tensor, metric: Tensor) -> None:
        self.values = values
        self.roots = []
        for mode in (1, 2):
            rows = values.movedim(mode, -1).flatten(0, -2)
            self.roots.append(_square_root(rows.T @ rows, RIDGE))
        self.output_root = _square_root(metric, OUTPUT_RIDGE)

    def weigh(self, tensor: Tensor) -> Tensor:
        """Multiply a tensor (out, in, basis) by the roots of its modes.

        The squared norm estimates how much this change of coefficients changes the outputs of the model. All layers
        have a factor in common.
        """
        # each of both roots has the norm of the values
        norm = len(self.values) ** 0.5 * self.values.norm()
        scale = 1 / norm.clamp(min=TINY)
        return Tucker(tensor, self.output_root, *self.roots).dense(scale)

    def fit(self, tensor: Tensor, ranks: tuple[int, ...]) -> Tucker:
        """Find a Tucker tensor, with orthonormal factors, that comes close to the layer's outputs by `tensor`.

        factor_in and factor_basis are the factors of the weighted tensor. Given these, the core and factor_out are
        optimal: reduced rank regression in the metric of the outputs. Full modes have no factor.
        """
        _, _, *weighted = tucker(self.weigh(tensor), ranks)
        factors: list[Tensor | None] = [None]
        for root, factor in zip(self.roots, weighted, strict=True):
            if factor is not None:
                unweighted = torch.linalg.solve(root, factor)
                factor = torch.linalg.qr(unweighted).Q
            factors.append(factor)
        features = project(self.values, factors).flatten(1)

        # there may be more features than samples: the ridge draws their weights to the projected tensor
        gram = features.T @ features
        ridge = RIDGE * gram.diagonal().mean().clamp(min=TINY)
        projected = project(tensor, factors).flatten(1).T
        right_side = features.T @ self.outputs(tensor) + ridge * projected
        gram.diagonal().add_(ridge)
        weights = torch.linalg.solve(gram, right_side)  # (ri rb, out)

        rank, *inner_ranks = ranks
        if rank < len(self.output_root):
            weights = weights @ self.output_root
            spectrum = torch.linalg.svd(features @ weights, full_matrices=len(features) < rank)
            leading = spectrum.Vh[:rank].T
            weights = weights @ leading
            factors[0] = torch.linalg.solve(self.output_root, leading)
        core = weights.T.reshape(-1, *inner_ranks)
        return Tucker(core, *factors).orthogonal()

    def outputs(self, tensor: Tensor) -> Tensor:
        """Compute the layer's outputs (samples, out) with these coefficients, without its bias."""
        return self.values.flatten(1) @ tensor.flatten(1).T

    def measure(self, tensor: Tensor) -> Tensor:
        """Compute the layer's outputs (samples, out) in the metric of the model's outputs."""
        return self.outputs(tensor) @ self.output_root


def _square_root(moments: Tensor, ridge: float) -> Tensor:
    """Compute the symmetric square root of second moments, with a share of their mean added in every direction."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0)
    values = values + ridge * values.mean().clamp(min=TINY)
    roots = values.sqrt()
    return vectors * roots @ vectors.T


def gather_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
) -> dict[str, DataWeights]:
    """Compute the data weights of the layers that `sample_layers` samples, by name.

    Layers whose outputs have functions of their own are left out.

    Args:
        model: The model.
        tensors: The tensors (out, in, basis) to weigh, by layer; their basis may end before the base branch.
        inputs: Samples of the model's input.
    """
    modules = {name: model.get_submodule(name) for name in tensors}
    weights = {}
    samples = sample_layers(model, modules, inputs, _second_moments, PROBES)
    for name, (_, functions, metric) in samples.items():
        if functions is None:
            continue
        out, _, basis = tensors[name].shape
        values = functions[..., :basis].double()
        if metric is None or not metric.isfinite().all() or not metric.any():
            metric = torch.eye(out, device="cpu").to(values)
        weights[name] = DataWeights(values, metric)
    return weights


def _second_moments(derivative: Tensor) -> Tensor:
    derivative = derivative.double()
    return derivative.T @ derivative


class LayerSamples(NamedTuple):
    """What reaches a layer in a call of a model.

    Attributes:
        inputs: The inputs (rows, in) of the layer.
        functions: The functions (rows, in, basis) that its coefficients multiply, see `functions_at`; None if they
            differ between the outputs.
        moments: A moment of the derivatives of the model's output in the outputs of the layer, see `sample_layers`;
            None without a graph.
    """

    inputs: Tensor
    functions: Tensor | None
    moments: Tensor | None


@torch.inference_mode(False)  # enables gradients, too
def sample_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Inputs,
    moment: Callable[[Tensor], Tensor],
    probes: int,
) -> dict[str, LayerSamples]:
    """Run a model in evaluation mode, and sample its layers, adapted or not, by name.

    Convolutions are left out, and layers whose output is not linear in their coefficients.

    Args:
        model: The model.
        modules: The layers.
        inputs: Samples of the model's input.
        moment: A quadratic function of s^T J (rows, out), with J the derivatives of all entries of the model's output
            and s random signs. Its mean over the draws of s, divided by the number of entries, is the moment.
        probes: The number of draws of s.

    Raises:
        ValueError: A value that reaches a layer is not finite, no value reaches it, or one sample without a batch.
        TypeError: The model returns no tensor.
    """
    targets = {}
    for name, module in modules.items():
        target = locate_target(name, module)
        if len(target.tensor.shape) == 3 and is_linear(*target):
            targets[name] = target
    received = defaultdict(list)
    returned = defaultdict(list)

    def record(name: str, x: Tensor, y: Any) -> None:
        if x.dim() < 2:
            raise ValueError(f"`inputs` reach `{name}` as one sample of shape {tuple(x.shape)}: pass a batch.")
        if not x.isfinite().all():
            raise ValueError(f"`inputs` lead to NaN or infinite values at `{name}`.")
        received[name].append(x.detach().flatten(0, -2))
        returned[name].append(first_output(y).requires_grad_())  # the model may be frozen

    if isinstance(inputs, Tensor) and inputs.is_inference():
        inputs = inputs.clone()
    with recorded_calls({name: modules[name] for name in targets}, record):
        output = model_outputs(model, inputs)

    if output.shape[1:] == (1,):
        probes = min(probes, 1)  # signs of a single output square to one
    moments = {}
    if returned and probes and output.requires_grad:
        moments = _mean_moments(output, returned, moment, probes)
    samples = {}
    for name, target in targets.items():
        if not received[name]:
            raise ValueError(
                f"None of `inputs` reaches `{name}`: the forward pass does not call this layer, or calls the layer of "
                "another model in its place (a function that holds it is not copied with a model)."
            )
        x = torch.cat(received[name])
        grid = target.spec.read_grid(target.layer)
        warn_of_far_inputs(name, grid, target.tensor.shape, x)
        samples[name] = LayerSamples(x, functions_at(target, x), moments.get(name))
    return samples


def _mean_moments(
    output: Tensor,
    returned: Mapping[str, list[Tensor]],
    moment: Callable[[Tensor], Tensor],
    probes: int,
) -> dict[str, Tensor]:
    """Return the mean moment of s^T J (rows, out) by layer, see `sample_layers`, given what the layers returned."""
    leaves, structure = tree_flatten(dict(returned))
    generator = torch.Generator().manual_seed(0)
    moments: dict[str, Any] = dict.fromkeys(returned, 0.0)
    count = probes * output.numel()
    for _ in range(probes):
        bits = torch.randint(0, 2, output.shape, generator=generator, device="cpu")
        signs = bits.to(output) * 2 - 1
        gradients = torch.autograd.grad(output, leaves, signs, retain_graph=True, materialize_grads=True)
        for name, of_calls in tree_unflatten(gradients, structure).items():
            rows = [gradient.flatten(0, -2) for gradient in of_calls]
            moments[name] += moment(torch.cat(rows)) / count
    return moments


@torch.no_grad()
def functions_at(target: Target, x: Tensor) -> Tensor | None:
    """Return the functions (samples, in, basis) that the coefficients of a layer multiply at x (samples, in).

    The function of the base branch is the last one. Scales of the edges are not contained. None if the outputs do not
    share the functions: of a layer with a gate for each output, or with masks of edges.
    """
    layer, spec, tensor = target
    reader = find_formula(layer, spec, tensor)
    if reader is not None:
        return reader.read(layer).functions(x)
    out, *shape = full_shape(tensor)

    # A layer is linear in its coefficients: unit tensors give the functions, one for each output at a time.
    zeros = tensor.get_parameter(layer).new_zeros(out, math.prod(shape))
    bias = _run_linear(target, zeros, x)
    columns = []
    for start in range(0, zeros.shape[1], out):
        unit = zeros.clone()
        diagonal = unit[:, start : start + out].fill_diagonal_(1)
        functions = _run_linear(target, unit, x) - bias
        columns.append(functions[:, : diagonal.shape[1]])
    functions = torch.cat(columns, dim=1)

    generator = torch.Generator().manual_seed(0)
    random = torch.randn(zeros.shape, generator=generator, device="cpu").to(zeros)
    expected = functions @ random.T
    error = _run_linear(target, random, x) - bias - expected
    if error.norm() > SHARED * expected.norm():
        return None
    return functions.unflatten(1, shape)


@torch.no_grad()
def edge_values(target: Target, coefficients: Tensor, x: Tensor) -> Tensor:
    """Return the function on each edge (samples, out, in) by coefficients (out, in, basis), at x (samples, in).

    The layer runs once for each input. Where the outputs share the functions, `functions_at` costs less. Scales of the
    edges are not contained.
    """
    layer, _, tensor = target
    coefficients = coefficients.to(tensor.get_parameter(layer))
    zeros = torch.zeros_like(coefficients)
    bias = _run_linear(target, zeros, x)
    values = []
    for index in range(coefficients.shape[1]):
        of_input = zeros.clone()
        of_input[:, index] = coefficients[:, index]
        y = _run_linear(target, of_input, x)
        values.append(y - bias)
    return torch.stack(values, -1)


def _run_linear(target: Target, coefficients: Tensor, x: Tensor) -> Tensor:
    """Run a layer with coefficients (out, in, basis), or a matrix of these, and scales of one.

    Returns:
        (samples, out).
    """
    layer, spec, tensor = target
    coefficients = coefficients.view(full_shape(tensor))
    parameters = tensor.split(coefficients)
    scale = spec.find_edge_scale(layer)
    if scale is not None:
        parameters[scale] = torch.ones_like(getattr(layer, scale))
    y = call_with_parameters(layer, parameters, layer, (x,), {})
    return first_output(y).flatten(0, -2)


@contextmanager
def recorded_calls(
    layers: Mapping[str, nn.Module],
    record: Callable[[str, Tensor, Any], None],
) -> Iterator[None]:
    """Call `record(name, x, y)` with the first argument and the output of each call of a layer.

    Unlike a hook, it also sees calls of `layer.forward`, as Convolutional-KANs makes them.
    """

    def run(name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        record(name, first_argument(args, kwargs), y)
        return y

    former = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["forward"] = partial(run, name, layer.forward)
    try:
        yield
    finally:
        for name, layer in layers.items():
            del vars(layer)["forward"]
            if former[name] is not None:
                vars(layer)["forward"] = former[name]


def model_outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the output (..., out) of the model in evaluation mode. The random generators are restored."""
    with modes_kept(model), generators_kept(model):
        set_mode(model, False)
        if callable(inputs):
            return first_output(inputs(model))
        return first_output(call_with_inputs(model, inputs))


def first_output(result: Any) -> Tensor:
    """Return the first tensor (..., out) of nested tuples and dicts; it skips a loss, which has no dimensions."""
    for value in tree_leaves(result):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value.unsqueeze(-1) if value.dim() == 1 else value
    raise TypeError(
        "The model must return a floating point tensor, or a tuple or dict that contains one, but it returned "
        f"{type(result).__name__}. Pass a function that runs the model and returns such a tensor."
    )
