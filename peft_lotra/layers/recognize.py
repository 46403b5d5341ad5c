# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Recognizes KAN layers: each module has a description, or one reason why it has none.

A KAN layer computes y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])), where A are parameters of its own and the phi_k at
least two different functions of one input each. Shapes say what the coefficients A may be, and gradients decide. Names
do not count. Modules with parameters of the same shapes are no KAN layers: in a mixture of experts, in attention and
in a bilinear map the factor of A[o,i,k] depends on other inputs, or is the same function for each k. Embeddings do not
depend on the input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import permutations
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.slim_kan import SlimKANLinear
from ..modules.checks import list_first
from .coefficients import CoefficientTensor, Described
from .evidence import Evidence, count_inputs, run_at_sizes
from .formula import find_formula
from .kinds import KANLayerSpec, get_registered, is_built_in, matches_nothing, registered_spec, spec_from_file
from .probe import CannotProbe, Probe, ask_short_copy, cached_by_class, describe_arguments, isolated, shorter_lengths


KIND = "generic"
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Modules that are no KAN layers. Neither are classes that are derived from them.
_NO_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    *NORMS,
    nn.modules.conv._ConvNd,
    torch.jit.ScriptModule,
    SlimKANLinear,  # its coefficients are a product
)
# Libraries whose modules with large parameters are attention, experts and the like.
_LIBRARIES = {"torch", "torchvision", "transformers", "timm", "diffusers", "peft"}
_LARGEST = 2**26  # elements of a parameter that is copied to be probed
_SMALL = 0.125  # factors of the edges up to this share of the coefficients are not adapted
_PATTERNS_OF_MATRICES = "o (i k)|o (k i)|(i k) o|(k i) o|k (i o)|k (o i)|(i o) k|(o i) k".split("|")
_MOVES_GRID = "(update|refine|initialize|adapt|move|reset|set)_\\w*(grid|knots)"

Tensors = Mapping[str, Tensor]
Answer = tuple[KANLayerSpec | None, str]  # a description, or the reason why there is none, in one sentence
_hypothesis = partial(KANLayerSpec, KIND, matches_nothing)


def recognize(layer: nn.Module) -> Answer:
    """Return the description of a KAN layer; None and the reason for any other module.

    The `kan_spec` of its class comes first, then the last registered kind that matches. A built-in kind is taken if
    the layer computes what it says: most KAN layers are copied files, and some copies compute something else.

    Raises:
        ValueError: A registered kind names an attribute that the layer lacks.
    """
    spec = getattr(type(layer), "kan_spec", None)
    if isinstance(spec, KANLayerSpec):
        return spec, ""
    spec = registered_spec(layer)
    if spec is not None:
        if spec.is_of_this_package(layer):
            return spec, ""
        if not is_built_in(spec):
            spec.check_names(layer)
            return spec, ""
        contradiction, _ = compare(layer, spec)
        if not contradiction:
            return spec, ""
    inferred, reason = infer(layer)
    if inferred is None and spec is not None:
        return spec, ""
    return inferred, reason


def get_kan_spec(module: nn.Module) -> KANLayerSpec | None:
    """Return the description of a module, `None` if it is no KAN layer."""
    spec, _ = recognize(module)
    return spec


def get_recorded_spec(
    layer: nn.Module,
    record: Mapping[str, Any] | None,
) -> KANLayerSpec | None:
    """Return the kind of a layer of an adapter from a file: as registered, else as the file describes it.

    Args:
        layer: The layer.
        record: The entry of the layer: its `kind` and, for a kind of a user, its `description`.

    Raises:
        ValueError: The kind is neither registered nor described, or the description is damaged.
    """
    spec, _ = recognize(layer)
    if record is None:
        return spec
    name = record["kind"]
    description = record.get("description")
    if spec is not None and spec.kind == name:
        is_registered = spec.matches is not matches_nothing
        if description is None or is_registered:
            return spec
    if description is not None:  # of a layer of no registered kind, as the version read it that wrote the file
        return spec_from_file(name, description)
    # a kind that was registered later takes the layer too
    return registered_spec(layer, [get_registered(name)]) or spec


def compare(layer: nn.Module, spec: KANLayerSpec) -> tuple[str, bool | None]:
    """Compare a layer with a description.

    Returns:
        How the layer contradicts it, and whether its output is an affine function of the coefficients. They are "" and
        None if that is not known. A built-in kind must fit. A user's description is taken at its word, unless
        gradients verify another layout.
    """
    question = "compared", spec.kind, spec.parts, tuple(spec.residual or ())
    try:
        return cached_by_class(layer, question, partial(_compare, layer, spec))
    except (CannotProbe, ValueError):
        # it may have values later; a pattern that does not fit raises again where the coefficients are read
        return "", None


def is_linear(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> bool:
    """Return whether the output is an affine function of the coefficients, or that is not known."""
    if spec.is_of_this_package(layer):
        return True
    _, answer = compare(layer, spec)
    return answer is not False


def _compare(layer: nn.Module, spec: KANLayerSpec) -> tuple[str, bool | None]:
    tensor = spec.locate(layer)
    has_lists = any(len(part) > 1 for part in tensor.parts)
    if has_lists and len(tensor.shape) == 3:
        return "", False  # several layers
    # the formula says all that gradients would, and is needed anyway
    if is_built_in(spec) and find_formula(layer, spec, tensor) is not None:
        return "", True
    answer = ask_short_copy(layer, partial(_compare_gradients, spec=spec))
    if answer in (("", True), ("", False)):
        return answer
    return _compare_gradients(layer, spec)


def _compare_gradients(layer: nn.Module, spec: KANLayerSpec) -> tuple[str, bool | None]:
    tensor = spec.locate(layer)
    floating = [name for name, value in layer.named_parameters() if value.is_floating_point()]
    names = dict.fromkeys([*tensor.parameters, *floating])
    probe = Probe(layer, names)
    probe.place_inputs(spec.read_grid(layer).values())
    with isolated(probe.like):
        try:
            evidence = _find_evidence(probe, tensor)
            contradicts = evidence.contradicts(tensor)
        except CannotProbe:  # the same for all layers of this class
            return "", None
        if (evidence.size, evidence.outputs) != (count_inputs(tensor), tensor.shape[0]):
            contradicts = True
        contradiction = ""
        if is_built_in(spec):
            is_unused = any(evidence.base[name] is None for name in tensor.parameters)
            if contradicts or is_unused or _has_more_weights(evidence, spec, tensor):
                contradiction = "it computes something else"
        elif contradicts:
            contradiction = _find_contradiction(layer, tensor)
        return contradiction, evidence.is_linear(tensor.parameters)


def _find_evidence(probe: Probe, tensor: CoefficientTensor) -> Evidence:
    """Return the first run that succeeds.

    The layer may take another number of inputs than the description has: a projection precedes the sum, or ones are
    appended to the inputs.
    """
    first = tensor.members[0]
    kernel = [first.lengths[axis] for axis in first.layout.kernel]
    sizes = [count_inputs(tensor)]
    if not kernel:
        sizes += [*candidate_sizes(probe.layer), 1]
    for size in dict.fromkeys(sizes):
        for evidence in run_at_sizes(probe, size, kernel):
            return evidence
    raise CannotProbe


def _find_contradiction(layer: nn.Module, tensor: CoefficientTensor) -> str:
    """Return how the layout that gradients verify differs from the described one, or an empty string."""
    spec, _ = infer(layer)
    if spec is None:
        return ""
    verified = {member.name: member for member in spec.locate(layer).members}
    for member in tensor.members:
        other = verified.get(member.name, member)
        positions = torch.arange(math.prod(member.stored)).view(member.stored)
        canonical = member.layout.to_canonical(positions, member.lengths)
        if not torch.equal(canonical, other.layout.to_canonical(positions, other.lengths)):
            return (
                f"`{member.name}` {member.stored} is not laid out as {member.layout.pattern!r}, its gradients are "
                f"those of {other.layout.pattern!r}"
            )
    return ""


def _has_more_weights(
    evidence: Evidence,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
) -> bool:
    """Return whether a parameter that is not described is a weight: no constant or bias, and not in the functions."""
    layer = evidence.probe.layer
    # no `get_parameter`: in `functional_call` they are tensors
    is_trained = any(attrgetter(name)(layer).requires_grad for name in tensor.parameters)
    described = {*tensor.parameters, *spec.grid, spec.bias, *(spec.edge_scale or ())}
    for name, gradient in evidence.base.items():
        path, _, _ = name.rpartition(".")
        is_constant = is_trained and not attrgetter(name)(layer).requires_grad
        if gradient is None or name in described or is_constant or isinstance(layer.get_submodule(path), NORMS):
            continue
        if not evidence.stays(tensor, [name]):
            continue
        may_be_bias = gradient.dim() <= 1 or evidence.is_constant(name)
        if not may_be_bias or not evidence.is_additive([name]):
            return True
    return False


def infer(
    layer: nn.Module,
    args: Any = (),
    kwargs: Any = None,
) -> Answer:
    """Infer the description of a layer of no registered kind from its outputs and gradients.

    Args:
        layer: Any module. A copy of it is run if it has parameters that may be coefficients.
        args, kwargs: The arguments of a call of it. By default inputs are made up.
    """
    if is_no_layer(layer):
        return None, f"{type(layer).__name__} is a container, a module of a library, or derived from one."
    try:
        find = partial(_find_spec, layer, _find_candidates(layer), args, kwargs)
        return cached_by_class(layer, (KIND, describe_arguments(args, kwargs)), find)
    except CannotProbe as reason:
        return None, f"{reason}."


def is_no_layer(module: nn.Module) -> bool:
    """Return whether a module is no KAN layer by its class, or holds the formulas of pykan's networks."""
    library, *_ = type(module).__module__.split(".")
    if library in _LIBRARIES or isinstance(module, _NO_LAYERS):
        return True
    return "funs_sympy" in vars(module)


def _find_candidates(layer: nn.Module) -> Tensors:
    """Return the matrices and larger parameters that may be coefficients, by name.

    They belong to the layer, or to linear layers that it holds, also in a list or a `Sequential`. A module of a user's
    class may make the functions. If such a module may be a layer, or is larger, there are no candidates.

    Raises:
        CannotProbe: There are none.
    """
    candidates: dict[str, Tensor] = {}
    size_of_functions = 0
    for path, module in layer.named_modules():
        parent_path, _, _ = path.rpartition(".")
        is_in_list = type(layer.get_submodule(parent_path)) in (nn.Sequential, nn.ModuleList)
        is_near = "." not in path or (is_in_list and "." not in parent_path)
        if path and is_near and registered_spec(module) is not None:
            raise CannotProbe(f"its part `{path}` is a KAN layer")
        matrices = {}
        for name, value in module.named_parameters(path, recurse=False):
            if value.numel() > _LARGEST:
                raise CannotProbe(f"`{name}` {tuple(value.shape)} is too large to be compared")
            if value.dim() > 1 and value.numel():
                matrices[name] = value
        if not matrices or "parametrizations" in path or isinstance(module, NORMS):
            continue

        if not path or (is_near and isinstance(module, (nn.Linear, nn.ParameterList))):
            candidates |= matrices
            continue
        is_of_torch = type(module).__module__.startswith("torch.")
        if is_of_torch or "." in path or any(value.dim() > 2 for value in matrices.values()):
            raise CannotProbe(f"its part `{path}` has matrices, and may be a layer of its own")
        size_of_functions += _count_elements(matrices)
    if size_of_functions > _count_elements(candidates):
        raise CannotProbe("its parts have more parameters than the layer, and may be layers of their own")
    real = {name: value for name, value in candidates.items() if value.is_floating_point()}
    if candidates and not real:
        raise CannotProbe(f"`{next(iter(candidates))}` is complex or of integers, to which adapters add nothing")
    if not real:
        raise CannotProbe("it has no parameter of two axes or more, nor linear layers that it adds up")
    return real


def _count_elements(tensors: Tensors) -> int:
    return sum(value.numel() for value in tensors.values())


def _find_spec(
    layer: nn.Module,
    candidates: Tensors,
    args: Any,
    kwargs: Any,
) -> Answer:
    if not args and not kwargs:
        spec = _find_in_short_copy(layer, candidates)
        if spec is not None:
            return spec, ""
    return _find_at_size(layer, candidates, args, kwargs)


def _find_in_short_copy(layer: nn.Module, names: Collection[str]) -> KANLayerSpec | None:
    """Return the description of a short copy of a layer, with the lengths of the layer."""

    def ask(copy: nn.Module) -> tuple[KANLayerSpec, int] | None:
        spec, _ = _find_at_size(copy, names)
        return spec and (spec, spec.locate(copy).shape[2])

    answer = ask_short_copy(layer, ask)
    if answer is None:
        return None
    spec, basis = answer
    long, short = next(iter(shorter_lengths(layer).items()))
    for axes in (spec.axes, {axis: length * long // short for axis, length in spec.axes_of(layer).items()}):
        described = replace(spec, axes=axes)
        with suppress(ValueError):
            if described.locate(layer).shape[2] == basis:
                return described
    return None


def _find_at_size(
    layer: nn.Module,
    names: Collection[str],
    args: Any = (),
    kwargs: Any = None,
) -> Answer:
    candidates = {name: layer.get_parameter(name) for name in names}
    parameters = {name: value for name, value in layer.named_parameters() if value.is_floating_point()}
    probe = Probe(layer, parameters, args, kwargs)
    knots = {name for name, value in parameters.items() if _has_increasing_rows(value)}
    fixed = {name for name, value in parameters.items() if not value.requires_grad}
    if len(fixed) == len(parameters):  # the layer is frozen as a whole, which says nothing
        fixed = set()
    fixed |= knots

    # inputs are tried where these tensors are; statistics of a normalization say nothing about the grid
    grid = {}
    for name, value in layer.named_buffers():
        if value.is_floating_point() and "running" not in name:
            grid[name] = value
    grid |= {name: value for name, value in parameters.items() if name in fixed}

    reason = ""
    with isolated(probe.like):
        for evidence in _run_everywhere(probe, grid.values()):
            names = list_first([f"`{name}`" for name in candidates])
            reason = reason or (
                f"{names} are not coefficients of a sum, over its inputs, of at least two functions of each "
                "(coefficients that are computed, such as normalized ones, or mixed by gates, do not count)."
            )
            # a grid is coefficients if nothing else is: of a layer whose functions start as increasing ones
            for excluded in (fixed, knots, ()):
                tensors = {name: value for name, value in candidates.items() if name not in excluded}
                spec = _find_coefficients(evidence, tensors)
                if spec is not None:
                    return _add_grid(spec, layer, grid), ""
            name = _find_edge_parameter(evidence, candidates)
            if name:
                reason = (
                    f"each element of `{name}` makes a function of one input: register it with "
                    f'coefficients=("{name}", "o i").'
                )
    return None, reason or f"{probe.error or 'it takes no input of any size that was tried'}."


def _add_grid(spec: KANLayerSpec, layer: nn.Module, grid: Iterable[str]) -> KANLayerSpec:
    """Add the tensors that are no coefficients as a grid, and the methods that move it."""
    adapted = spec.locate(layer).parameters
    names = [name for name in grid if name not in adapted]
    methods = []
    if names:
        methods = [name for name in dir(type(layer)) if re.match(_MOVES_GRID, name)]
    return replace(spec, grid=tuple(names), grid_methods=tuple(methods))


def _has_increasing_rows(value: Tensor) -> bool:
    """Return whether all rows of a tensor increase, as knots do, and are too many and long to do so by chance."""
    if value.dim() < 2 or value.shape[-1] < 4:
        return False
    steps = value.detach().diff()
    if steps.numel() < 8 or (steps < 0).any():
        return False
    rises = steps.sum(-1)
    return bool((rises > 0).all())


def candidate_sizes(layer: nn.Module) -> list[int]:
    """Return the numbers of inputs that a layer may have: lengths of its tensors, divisors, and one less."""
    shapes = [value.shape for value in (*layer.parameters(), *layer.buffers())]
    lengths = sorted({2, 3}.union(*shapes), reverse=True)
    sizes = [length for length in lengths if length > 1]
    for length in lengths:
        sizes += [size for size in range(length // 2, 1, -1) if length % size == 0]
    sizes += [length - 1 for length in lengths if length > 2]  # ones may be appended to the inputs
    return list(dict.fromkeys(sizes))


def _run_everywhere(probe: Probe, grid: Collection[Tensor]) -> Iterator[Evidence]:
    """Yield the outputs of the layer for inputs of each size that it takes, on its grid and around zero.

    One input comes last: many a layer of more inputs takes one by broadcasting, and a layer of one input takes more.
    """
    first = []
    for name, child in probe.layer.named_children():
        if isinstance(child, nn.Linear) and child.in_features == 1:
            first.append(f"{name}.weight")
    grids = [grid, ()] if grid else [()]
    for tensors in grids:
        probe.place_inputs(tensors)
        is_broadcast = False
        for size in candidate_sizes(probe.layer):
            for evidence in run_at_sizes(probe, size):
                is_broadcast = True
                yield evidence
        for evidence in run_at_sizes(probe, 1):
            if evidence.is_additive(first):  # a perceptron of one input is such a sum too
                evidence.is_broadcast = is_broadcast
                yield evidence


def _find_coefficients(evidence: Evidence, tensors: Tensors) -> KANLayerSpec | None:
    """Describe the coefficients of a layer, its base branch, and the factors of its edges if they are many."""
    spec = None
    parts: tuple[Described, ...] = ()
    for name in sorted(tensors, key=lambda name: tensors[name].dim() == 2):  # matrices come last
        value = tensors[name]
        letter = "kmnpqrst"[len(parts) % 8]
        axes = spec and spec.axes
        if value.dim() == 2:
            axes = {"i": evidence.size}
        for pattern in _patterns(value.shape, evidence, letter):
            extended = _hypothesis((*parts, (name, pattern)), axes=axes)
            if _fits(evidence, extended) and _is_coefficient(evidence, extended, name, tensors):
                spec, parts = extended, extended.parts
                break
    spec = spec or _find_matrices(evidence, tensors)
    if spec is None:
        return None
    return _add_branches(evidence, spec, tensors)


def _find_edge_parameter(evidence: Evidence, tensors: Tensors) -> str:
    """Return the name of a matrix (out, in) with a nonlinear parameter of each edge, or an empty string.

    Ones may be appended to the inputs. The gradient of a perturbed matrix changes by other factors than that of an
    output, as it does not behind an activation.
    """
    edges = [(evidence.outputs, evidence.size), (evidence.outputs, evidence.size + 1)]
    for name, value in tensors.items():
        if value.shape in edges and evidence.base[name] is not None:
            tensor = _hypothesis((name, "o i")).locate(evidence.probe.layer)
            if evidence.is_by_output(tensor) and not evidence.stays(tensor, [name]):
                return name
    return ""


def _patterns(shape: torch.Size, evidence: Evidence, letter: str) -> Iterator[str]:
    """Yield the layouts of coefficients: each in its own axis, or two of the three in one axis of a matrix."""
    if len(shape) == 2:
        if shape.numel() >= 2 * evidence.outputs * evidence.size:  # at least two functions
            for pattern in _PATTERNS_OF_MATRICES:
                yield pattern.replace("k", letter)
    elif len(shape) in (3, 4):  # more axes have too many orders
        axes = range(len(shape))
        for o, i in permutations(axes, 2):
            if (shape[o], shape[i]) != (evidence.outputs, evidence.size):
                continue
            names = {o: "o", i: "i"}
            basis = [axis for axis in axes if shape[axis] > 1 and axis not in names]
            for axis in basis:
                names[axis] = letter if len(basis) == 1 else f"{letter}{axis}"
            words = [names.get(axis, "()") for axis in axes]
            yield " ".join(words)


def _fits(evidence: Evidence, spec: KANLayerSpec) -> bool:
    """Return whether a hypothesis fits the shapes of the parameters, and the gradients of the layer."""
    try:
        tensor = spec.locate(evidence.probe.layer)
        out, inputs, basis = tensor.shape
        has_size = (out, inputs) == (evidence.outputs, evidence.size)
        return has_size and basis >= 2 and evidence.is_sum(tensor)
    except (CannotProbe, ValueError):
        return False


def _is_coefficient(
    evidence: Evidence,
    spec: KANLayerSpec,
    name: str,
    tensors: Tensors,
) -> bool:
    """Return whether a matrix has an axis of outputs.

    For one output, shapes do not tell: centers of functions have the same, and so have functions of each unit, which a
    linear layer follows. The layer is then not linear in the matrix, or another matrix is a factor of each edge.
    """
    if tensors[name].dim() > 2:
        return True
    tensor = spec.locate(evidence.probe.layer)
    if evidence.is_broadcast or not evidence.stays(tensor, [name], observed=name):
        return False
    if evidence.outputs > 1 or any("o" in pattern.split() for _, pattern in spec.parts):
        return True
    for edges, value in tensors.items():
        has_edges = edges != name and sorted(value.shape) == [1, evidence.size]
        if has_edges and evidence.base[edges] is not None and not evidence.stays(tensor, [edges]):
            return False
    return True


def _find_matrices(evidence: Evidence, tensors: Tensors) -> KANLayerSpec | None:
    """Describe coefficients in several matrices: one for each function, or scale, shift and weight of wavelets."""
    used = [name for name in tensors if evidence.base[name] is not None]
    edges = (evidence.outputs, evidence.size)
    for pattern, shape in (("o i", edges), ("i o", edges[::-1])):
        coefficients = [(name, pattern) for name in used if tensors[name].shape == shape]
        if len(coefficients) > 1:
            spec = _hypothesis(coefficients)
            if _fits(evidence, spec):
                return spec
    return None


def _add_branches(evidence: Evidence, spec: KANLayerSpec, tensors: Tensors) -> KANLayerSpec:
    """Add the base branch, and factors of the edges where they are together a large share of the layer."""
    coefficients = dict(spec.parts)
    factors: dict[str, str] = {}
    for name, value in tensors.items():
        if value.dim() != 2 or name in coefficients or evidence.is_constant(name):
            continue
        for pattern in ("o i", "i o"):
            extended = replace(spec, residual=(name, pattern))
            if _fits(evidence, extended):
                tensor = extended.locate(evidence.probe.layer)
                if spec.residual is None and evidence.stays(tensor, coefficients, observed=name):
                    spec = extended
                else:
                    factors[name] = pattern
                break
    size = sum(tensors[name].numel() for name in coefficients)
    size_of_factors = sum(tensors[name].numel() for name in factors)
    if size_of_factors > _SMALL * size:
        spec = replace(spec, coefficients=(*spec.parts, *factors.items()))
    return spec
