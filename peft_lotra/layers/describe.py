# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Describes KAN layers by what they compute: which parameters are coefficients, and in which order of axes.

A KAN layer computes y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])), where A are parameters of its own and the phi_k at
least two different functions of one input each. Modules with parameters of the same shapes do not: in a mixture of
experts, in attention and in a bilinear map the factor of A[o,i,k] depends on other inputs, or is the same function for
each k; embeddings do not depend on the input.

A layer is run to learn how many inputs it takes and how many outputs it returns. Shapes then say what A may be, and
gradients decide, see probe.py. Names do not count.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .coefficients import CoefficientTensor, Described, get_or_none, named_size
from .description import REGISTERED, KANLayerSpec, is_built_in, matches_nothing, registered_spec
from .layout import axis_patterns
from .probe import Evidence, Probe, Undecided, Verdict, remembered, width


KIND = "generic"
_LARGEST = 2**26  # elements of a parameter that is copied to be probed
_MOST_AXES = 4  # of a parameter; more have too many orders to be tried
_FUNCTIONS = 2  # that a layer must have at least
_CHANCE = math.log(1e5)  # random rows increase in one of so many tensors
_MOVES_GRID = "(update|refine|initialize|adapt|move|reset|set)_\\w*(grid|knots)"
_SMALL = 0.125  # factors of the edges up to this share of the coefficients are not adapted
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Modules that are no KAN layers, nor are classes that are derived from them.
_OTHERS = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, *_NORMS),
    *(nn.modules.conv._ConvNd, torch.jit.ScriptModule),
)
# Libraries whose modules with large parameters are attention, experts and the like.
_LIBRARIES = {"torch", "torchvision", "transformers", "timm", "diffusers", "peft"}

NOT_LINEAR = "it shapes the functions: the output is not linear in it"
FACTOR = "a factor of the functions of each edge, and few of the layer's elements"
UNUSED = "the output did not depend on it when the layer was run"
OTHER = "it has no part in the sum that was recognized"

Tensors = Mapping[str, Tensor]
_hypothesis = partial(KANLayerSpec, KIND, matches_nothing)


class Description(NamedTuple):
    """What is known of a module.

    Attributes:
        spec: Its description; `None` if it is no KAN layer.
        reason: Why it is none, in one sentence; with a description, why the layer contradicts it.
        doubts: Words on parameters of a layer of no built-in kind, by name: why they are left out, or what speaks
            against adapting them.
    """

    spec: KANLayerSpec | None
    reason: str = ""
    doubts: Mapping[str, str] = {}


def describe(layer: nn.Module, *args: Any, **kwargs: Any) -> Description:
    """Describe a module as a KAN layer, or say why it is none.

    The `kan_spec` of its class comes first, then the last registered kind that matches. A built-in kind is taken if
    the layer computes what it says, since most KAN layers are copied files, and some copies compute something else.

    Args:
        layer: Any module. It is run, as a copy, if it has parameters that may be coefficients.
        *args, **kwargs: The arguments of a call of it; by default inputs are made up.

    Raises:
        ValueError: A registered kind names what the layer does not have.
    """
    spec = getattr(type(layer), "kan_spec", None)
    if isinstance(spec, KANLayerSpec):
        return Description(spec)
    spec = registered_spec(layer)
    if spec is None:
        return _infer(layer, args, kwargs)
    if spec.is_of_this_package(layer):
        return Description(spec)
    if not is_built_in(spec):
        spec.check_names(layer)
        return compare(layer, spec, *args, **kwargs)
    try:
        if compare(layer, spec, *args, **kwargs).reason:
            inferred = _infer(layer, args, kwargs)
            return inferred if inferred.spec is not None else Description(spec)
    except ValueError:  # a pattern does not fit, which is said where the coefficients are read
        pass
    return Description(spec)


def compare(layer: nn.Module, spec: KANLayerSpec, *args: Any, **kwargs: Any) -> Description:
    """Compare a layer with a description; the `reason` says what contradicts it.

    A built-in kind must fit. A user's description is taken at its word, unless gradients verify another layout.
    """
    if spec.is_of_this_package(layer):
        return Description(spec)
    layouts = () if is_built_in(spec) else spec.locate(layer).parameters.values()
    find = partial(_compare, layer, spec, args, kwargs)
    try:
        answer = find() if args or kwargs else remembered(layer, ("compared", spec.family, *layouts), find)
    except Undecided:  # it has no values now, and may have some later
        return Description(spec)
    return answer._replace(spec=spec)  # a user may have changed other fields of it


def _compare(layer: nn.Module, spec: KANLayerSpec, args: Any, kwargs: Any) -> Description:
    tensor = spec.locate(layer)
    probe = Probe(layer, _probed(layer, tensor), spec.read_grid(layer).values(), args, kwargs)
    with probe.isolated():
        evidence, verdict = find_evidence(probe, tensor)
        if evidence is None:
            return Description(spec)
        unused = [name for name in tensor.parameters if evidence.base[name] is None]
        is_likely = evidence.has_sizes(tensor) and False not in verdict[:2]
        if is_built_in(spec):
            return Description(spec, "" if is_likely and not unused else "it computes something else")
        if not is_likely:
            name, pattern = spec.parts[0]
            shape = tuple(tensor.get_parameter(layer).shape)
            for other in _other_patterns(pattern, shape):
                if _is_verified(
                    probe, replace(spec, coefficients=(name, other), residual=None, edge_scale=None), verdict
                ):
                    reason = f"`{name}` {shape} is not laid out as {pattern!r}, its gradients are those of {other!r}"
                    return Description(spec, reason)
        return Description(spec, "", _find_doubts(evidence, spec, tensor))


def find_evidence(probe: Probe, tensor: CoefficientTensor) -> tuple[Evidence | None, Verdict]:
    """Return the gradients of a described layer, and whether its axes are as described.

    The layer may take another number of inputs than the description has: a projection precedes the sum, or ones are
    appended to the inputs.
    """
    if any(len(part) > 1 for part in tensor.parts) and len(tensor.shape) == 3:
        raise Undecided("the module consists of several layers")
    first = tensor.parts[0][0]
    kernel = [first.lengths[axis] for axis in first.layout.kernel]
    try:
        sizes: list[int] = [width(tensor), *([] if kernel else _lengths(probe.layer))]
        for size in dict.fromkeys(sizes):
            for evidence in probe.trials(size, kernel):
                return evidence, evidence.axes(tensor)
    except Undecided as reason:
        return None, Verdict(reason=str(reason))
    return None, Verdict(reason=probe.error or "it takes no input that was made up")


def is_linear(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> bool:
    """Whether the output is an affine function of the coefficients, or that cannot be found out now."""
    if spec.is_of_this_package(layer):
        return True

    def find() -> bool:
        probe = Probe(layer, _probed(layer, tensor), spec.read_grid(layer).values())
        with probe.isolated():
            evidence, _ = find_evidence(probe, tensor)
            return evidence is None or evidence.is_linear([*tensor.parameters]) is not False

    try:
        return remembered(layer, ("linear", spec.family, *tensor.parameters.values()), find)
    except Undecided:
        return all(len(part) == 1 for part in tensor.parts)  # not several layers in one module


def _probed(layer: nn.Module, tensor: CoefficientTensor) -> dict[str, None]:
    """The parameters whose gradients are compared: the coefficients first, then all others that can be."""
    others = [n for n, value in layer.named_parameters() if value.is_floating_point() and value.numel() <= _LARGEST]
    return dict.fromkeys([*tensor.parameters, *others])


def _other_patterns(pattern: str, shape: tuple[int, ...]) -> list[str]:
    """Return the layouts that may be meant instead of one."""
    if "(" in pattern:
        return [re.sub(r"\((\w+) (\w+)\)", r"(\2 \1)", pattern)]
    return [other for other in axis_patterns(shape) if other != pattern] if "..." not in pattern else []


def _is_verified(probe: Probe, spec: KANLayerSpec, former: Verdict) -> bool:
    """Whether gradients verify a description, and in it what they do not verify in the former one."""
    try:
        tensor = spec.locate(probe.layer)
        evidence, verdict = find_evidence(probe, tensor)
    except (Undecided, ValueError):
        return False
    if evidence is None or not evidence.has_sizes(tensor):
        return False
    mended = [is_right for was_right, is_right in zip(former, verdict[:2], strict=False) if was_right is False]
    return verdict.is_verified and all(mended or [verdict.inputs])


def _find_doubts(evidence: Evidence, spec: KANLayerSpec, tensor: CoefficientTensor) -> dict[str, str]:
    """Say what speaks against adapting a parameter, or why it is left out: shapes of functions, and no effect."""
    doubts = {}
    described = {*spec.grid, spec.bias, *(spec.edge_scale or ())}
    is_finite = all(gradient is None or gradient.isfinite().all() for gradient in evidence.base.values())
    for name, gradient in evidence.base.items() if is_finite else ():
        path = name.rpartition(".")[0]
        if name in described or isinstance(evidence.probe.layer.get_submodule(path), _NORMS):
            continue
        layout = tensor.parameters.get(name)
        if gradient is None:
            doubts[name] = UNUSED
        elif layout is not None and not layout.shared:
            if not _is_linear_in(evidence, name, tensor):
                doubts[name] = NOT_LINEAR
        elif not evidence.stays(tensor, name):
            doubts[name] = FACTOR if evidence.stays(tensor, name, of_edges=True) else NOT_LINEAR
        elif gradient.dim() > 1 and layout is None:
            doubts[name] = OTHER
    return doubts


def _is_linear_in(evidence: Evidence, name: str, tensor: CoefficientTensor) -> bool:
    """Whether the gradient of a part stays if the part is moved."""
    parts = tuple(part for part in tensor.parts if any(member.name == name for member in part))
    return evidence.stays(CoefficientTensor(tensor.family, parts), name)


# Layers of no registered kind


def _infer(layer: nn.Module, args: Any, kwargs: Any) -> Description:
    if is_other(layer):
        return Description(None, f"{type(layer).__name__} is a container, a module of a library, or derived from one.")
    tensors = _tensors(layer)
    if not tensors:
        return Description(None, "it has no matrices of its own, or parts that may be layers of their own.")
    find = partial(_find_description, layer, tensors, args, kwargs)
    try:
        return find() if args or kwargs else remembered(layer, (KIND,), find)
    except Undecided as reason:
        return Description(None, f"{reason}.")


def is_other(module: nn.Module) -> bool:
    """Whether a module is no KAN layer by its class, or stands for formulas beside one, as in pykan's networks."""
    is_of_library = type(module).__module__.partition(".")[0] in _LIBRARIES
    return is_of_library or isinstance(module, _OTHERS) or "funs_sympy" in vars(module)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The matrices and larger parameters that may be coefficients, by name.

    They are the layer's own, and those of linear layers that it holds, in a list or a `Sequential` too. A module of a
    user's class may make the functions. There are none if such a module may be a layer of its own, or is larger.
    """
    own: dict[str, Tensor] = {}
    others = 0
    for path, module in layer.named_modules():
        holder = layer.get_submodule(path.rpartition(".")[0])
        is_near = "." not in path or (path.count(".") == 1 and type(holder) in (nn.Sequential, nn.ModuleList))
        weights = [(n, value) for n, value in module._parameters.items() if value is not None and value.dim() > 1]
        if module is layer or (is_near and isinstance(module, (nn.Linear, nn.ParameterList))):
            own |= {f"{path}.{n}".lstrip("."): value for n, value in weights}
        elif weights and "parametrizations" not in path and not isinstance(module, _NORMS):
            is_of_torch = type(module).__module__.startswith("torch.")
            if is_of_torch or "." in path or any(value.dim() > 2 for _, value in weights):
                return {}
            others += sum(value.numel() for _, value in weights)
        if path and is_near and registered_spec(module) is not None:
            return {}
    if others > sum(value.numel() for value in own.values()):
        return {}
    return {n: value for n, value in own.items() if value.is_floating_point() and 0 < value.numel() <= _LARGEST}


def _find_description(layer: nn.Module, tensors: Tensors, args: Any, kwargs: Any) -> Description:
    if any(value.is_meta or hasattr(value, "placements") for value in tensors.values()):
        raise Undecided("its parameters have no values")
    parameters = {name: value for name, value in layer.named_parameters() if value.is_floating_point()}
    knots = [name for name, value in parameters.items() if _has_increasing_rows(value)]
    frozen = [name for name, value in parameters.items() if not value.requires_grad]
    fixed = [*knots, *(frozen if len(frozen) < len(parameters) else ())]
    buffers = [name for name, value in layer.named_buffers() if value.is_floating_point() and "running" not in name]
    grid = {name: get_or_none(layer, name) for name in (*buffers, *fixed)}
    names = [name for name, value in parameters.items() if value.numel() <= _LARGEST]
    reason = ""
    for places in (grid, {}) if grid else ({},):
        probe = Probe(layer, names, places.values(), args, kwargs)
        with probe.isolated():
            for evidence in _find_trials(probe):
                reason = "its output is no sum, over its inputs, of at least two functions of each of them."
                # a grid is a part if nothing else is: of a layer whose functions start as increasing ones
                for left_out in dict.fromkeys((frozenset(fixed), frozenset(knots), frozenset())):
                    choice = {name: value for name, value in tensors.items() if name not in left_out}
                    spec = _find_coefficients(evidence, choice)
                    if spec is not None:
                        tensor = spec.locate(layer)
                        grid = tuple(name for name in grid if name not in tensor.parameters)
                        methods = tuple(name for name in dir(type(layer)) if re.match(_MOVES_GRID, name))
                        spec = replace(spec, grid=grid, grid_methods=methods if grid else ())
                        return Description(spec, "", _find_doubts(evidence, spec, tensor))
    return Description(None, reason or f"{probe.error or 'it takes no input of any size that was tried'}.")


def _has_increasing_rows(value: Tensor) -> bool:
    """Return whether a tensor has the form of knots: all rows increase, which is no chance."""
    if value.dim() < 2 or not value.numel():
        return False
    rows = value.detach().flatten(0, -2)
    orders = len(rows) * math.lgamma(rows.shape[1] + 1)  # the logarithm of their number
    return orders >= _CHANCE and bool((rows.diff() >= 0).all() and (rows[:, 0] < rows[:, -1]).all())


def _lengths(layer: nn.Module) -> Iterator[int]:
    """Yield numbers that may be that of the inputs of a layer: attributes, lengths of tensors, and their divisors."""
    named = named_size(layer, "i")[1]
    tensors = [*layer.parameters(), *layer.buffers()]
    settings = [value for module in layer.modules() for value in vars(module).values()]
    shapes = [value.shape for value in (*tensors, *settings) if isinstance(value, Tensor)]
    lengths = sorted({length for shape in shapes for length in shape} | {2, 3}, reverse=True)
    flat = {length for value in layer.parameters() if value.dim() == 2 for length in value.shape}
    yield from [named] if named else ()
    yield from lengths
    for length in sorted(flat, reverse=True):
        yield from (size for size in range(length // 2, 1, -1) if length % size == 0)


def _find_trials(probe: Probe) -> Iterator[Evidence]:
    """Yield what the layer gives for inputs of each size that it takes.

    Many a layer of more inputs takes one by broadcasting. A layer of one input takes no others, or it sums over them.
    """
    is_single, takes_others = True, False
    for size in dict.fromkeys(_lengths(probe.layer)):
        for evidence in probe.trials(size) if size > 1 else ():
            yield evidence
            takes_others = True
            is_single = is_single and evidence.is_symmetric()
    linear = [(name, child) for name, child in probe.layer.named_children() if isinstance(child, nn.Linear)]
    weights = [f"{name}.weight" for name, child in linear if child.in_features == 1]
    for evidence in probe.trials(1) if is_single else ():
        if evidence.is_beside(weights):  # a perceptron of one input is such a sum too
            evidence.takes_others = takes_others
            yield evidence


def _find_coefficients(evidence: Evidence, tensors: Tensors) -> KANLayerSpec | None:
    """Describe the coefficients of a layer, its residual branch, and the factors of its edges if they are many."""
    in_, out = evidence.size, evidence.outputs
    spec, parts = None, ()
    for name, value in sorted(tensors.items(), key=lambda item: item[1].dim() == 2):
        letter = "kmnpqrst"[len(parts) % 8]
        for pattern in _patterns(value.shape, in_, out, letter):
            axes = {"i": in_} if value.dim() == 2 else spec and spec.axes
            extended = _hypothesis((*parts, (name, pattern)), axes=axes)
            if _fits(evidence, extended) and _is_coefficient(evidence, extended, name, tensors):
                spec, parts = extended, extended.parts
                break
    spec = spec or _find_matrices(evidence, tensors)
    return spec and _find_branches(evidence, spec, tensors)


def _patterns(shape: torch.Size, in_: int, out: int, letter: str) -> Iterator[str]:
    """Yield the layouts of coefficients: each axis by itself, or two of the three in one axis of a matrix."""
    if 2 < len(shape) <= _MOST_AXES:
        for pattern in axis_patterns(shape, letter, (out, in_)):
            names = pattern.split()
            if (shape[names.index("o")], shape[names.index("i")]) == (out, in_):
                yield pattern
    for axis in (1, 0) if len(shape) == 2 else ():
        flat, rest = shape[axis], shape[1 - axis]
        if rest == out and flat % in_ == 0 and flat >= _FUNCTIONS * in_:
            for inner in (f"(i {letter})", f"({letter} i)"):
                yield f"o {inner}" if axis else f"{inner} o"
        if flat == in_ * out and in_ > 1 and rest >= _FUNCTIONS:
            for inner in ("(i o)", "(o i)"):
                yield f"{letter} {inner}" if axis else f"{inner} {letter}"


def _fits(evidence: Evidence, spec: KANLayerSpec) -> bool:
    """Whether a hypothesis fits the shapes of the parameters, and the gradients of the layer."""
    try:
        tensor = spec.locate(evidence.probe.layer)
        return tensor.shape[2] >= _FUNCTIONS and False not in evidence.axes(tensor, strict=True)[:2]
    except (Undecided, ValueError):
        return False


def _is_coefficient(evidence: Evidence, spec: KANLayerSpec, name: str, tensors: Tensors) -> bool:
    """Whether a matrix has an axis of outputs.

    For one output, shapes do not tell: centers of functions have the same, and so have functions of each unit, which a
    linear layer follows. The layer is then not linear in the matrix, or another matrix is a factor of each edge.
    """
    tensor = spec.locate(evidence.probe.layer)
    if tensors[name].dim() > 2:
        return True
    if evidence.takes_others or not _is_linear_in(evidence, name, tensor):
        return False
    in_, out = evidence.size, evidence.outputs
    edges = [n for n, value in tensors.items() if n != name and sorted(value.shape) == sorted((in_, out))]
    has_axis = out > 1 or any("o" in part.split() for _, part in spec.parts)
    return has_axis or all(evidence.base[n] is None or evidence.stays(tensor, n) for n in edges)


def _find_matrices(evidence: Evidence, tensors: Tensors) -> KANLayerSpec | None:
    """Coefficients in several matrices: one for each function, or scale, shift and weight of the wavelets of edges."""
    in_, out = evidence.size, evidence.outputs
    own = {name: value for name, value in tensors.items() if value.dim() == 2 and re.search(r"^[^.]*$|\.\d", name)}
    for pattern, shape in (("o i", (out, in_)), ("i o", (in_, out))):
        names = [name for name, value in own.items() if value.shape == shape and evidence.base[name] is not None]
        if len(names) >= _FUNCTIONS and _fits(evidence, spec := _hypothesis([(name, pattern) for name in names])):
            return spec
    return None


def _find_branches(evidence: Evidence, spec: KANLayerSpec, tensors: Tensors) -> KANLayerSpec:
    """Add the residual branch, and factors of the edges where they are together a large share of the layer."""
    factors: list[Described] = []
    taken = {name for name, _ in spec.parts}
    for name in (name for name, value in tensors.items() if value.dim() == 2 and name not in taken):
        for pattern in ("o i", "i o"):
            with_residual = replace(spec, residual=(name, pattern))
            if not _fits(evidence, with_residual):
                continue
            if spec.residual is None and evidence.is_additive(with_residual.locate(evidence.probe.layer)):
                spec = with_residual
            else:
                factors.append((name, pattern))
            break
    elements = [sum(tensors[name].numel() for name, _ in names) for names in (factors, spec.parts)]
    if elements[0] > _SMALL * elements[1]:
        spec = replace(spec, coefficients=(*spec.parts, *factors))
    return spec


# Modules that may be KAN layers


class UnrecognizedModule(NamedTuple):
    """A module that may be a KAN layer.

    Attributes:
        name (`str`): Its name in the model.
        cls (`str`): The name of its class.
        reason (`str`): Why it was not recognized.
        registration (`str`): A call that describes it, to be corrected and pasted.
        is_verified (`bool`): Whether the layer, when it was run, computed what the call says.
    """

    name: str
    cls: str
    reason: str
    registration: str
    is_verified: bool


def suggest_registration(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[str, bool]:
    """Return a call that registers the kind of a module, and whether gradients verify it; "" without an idea."""
    large = {name: value for name, value in module._parameters.items() if value is not None and value.dim() > 2}
    spec = _infer(module, args, kwargs).spec
    if spec is not None:
        return _registration(module, spec), True
    if not large:
        return "", False
    name, value = next(iter(large.items()))
    return _registration(module, KANLayerSpec("", nn.Module, (name, next(axis_patterns(value.shape))))), False


def _registration(module: nn.Module, spec: KANLayerSpec) -> str:
    cls, pairs = type(module).__name__, [_pair(part) for part in spec.parts]
    (axis, _), axes = named_size(module, "i"), spec.axes
    if axes:
        axes = f'lambda m: {{"i": m.{axis}}}' if axis else json.dumps(axes)
    lines = [
        f'"{cls}",',
        f'matches=lambda m: type(m).__name__ == "{cls}",',
        f"coefficients={pairs[0] if len(pairs) == 1 else '[' + ', '.join(pairs) + ']'},",
        f"residual={_pair(spec.residual)}," if spec.residual else "",
        f"axes={axes}," if axes else "",
        f"grid=({''.join(f'{json.dumps(name)}, ' for name in spec.grid).strip()})," if spec.grid else "",
    ]
    return "register_kan_layer(\n" + "".join(f"    {line}\n" for line in lines if line) + ")"


def _pair(described: Described) -> str:
    return f"({', '.join(map(json.dumps, described))})"


def may_be_kan(module: nn.Module) -> bool:
    """Whether a module looks like a KAN layer; it is not run.

    It is then of a user's class, with own parameters of three axes, or with one that is named as in a known kind. An
    axis of length one in front is that of a batch: position embeddings and class tokens.
    """
    own = {name: value for name, value in module._parameters.items() if value is not None}
    if not own or is_other(module):
        return False
    names = {name for spec in REGISTERED.values() for name, _ in spec.parts} - {"weight", "scale", "coefficients"}
    return any(name in names or (value.dim() > 2 and len(value) > 1) for name, value in own.items())
