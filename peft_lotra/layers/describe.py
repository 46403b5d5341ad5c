# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Describes KAN layers, and compares descriptions with the outputs of the layers.

A KAN layer computes y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])), where A are parameters of its own and the phi_k at
least two different functions of one input each. `describe` says which parameters A are, and the order of their axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from .coefficients import CoefficientTensor
from .description import KANLayerSpec, is_built_in, registered_spec
from .evidence import Evidence, count_inputs, run_at_sizes
from .infer import NORMS, candidate_sizes, infer
from .probe import CannotProbe, Probe, cached_by_class, isolated


NOT_LINEAR = "the output is not linear in it"
FACTOR = "it is a factor of the functions of each edge, with few of the layer's elements"
UNUSED = "the output did not depend on it when the layer was run"
OTHER = "it is not a coefficient or a weight of the base branch"


class Description(NamedTuple):
    """A module as a KAN layer, or the reason why it is none.

    Attributes:
        spec: The description. None if the module is no KAN layer.
        reason: Why it is none, in one sentence. With a description: how the layer contradicts it.
        doubts: Why parameters are left out, or what speaks against adapting them, by name. Empty for built-in kinds.
        is_linear: Whether the output is an affine function of the coefficients. None if that is not known.
    """

    spec: KANLayerSpec | None
    reason: str = ""
    doubts: Mapping[str, str] = {}
    is_linear: bool | None = None


def describe(layer: nn.Module, *args: Any, **kwargs: Any) -> Description:
    """Describe a module as a KAN layer, or say why it is none.

    The `kan_spec` of its class comes first, then the last registered kind that matches. A built-in kind is taken if
    the layer computes what it says: most KAN layers are copied files, and some copies compute something else.

    Args:
        layer: Any module. A copy of it is run if it has parameters that may be coefficients.
        *args, **kwargs: The arguments of a call of it. By default inputs are made up.

    Raises:
        ValueError: A registered kind names an attribute that the layer lacks.
    """
    spec = getattr(type(layer), "kan_spec", None)
    if isinstance(spec, KANLayerSpec):
        return Description(spec)
    spec = registered_spec(layer)
    if spec is not None:
        if spec.is_of_this_package(layer):
            return Description(spec)
        if not is_built_in(spec):
            spec.check_names(layer)
        description = compare(layer, spec, *args, **kwargs)
        if not (is_built_in(spec) and description.reason):
            return description
    inferred, reason = infer(layer, args, kwargs)
    if inferred is not None:
        return compare(layer, inferred, *args, **kwargs)
    return Description(spec, "" if spec else reason)


def compare(
    layer: nn.Module,
    spec: KANLayerSpec,
    *args: Any,
    **kwargs: Any,
) -> Description:
    """Compare a layer with a description. The `reason` says how the layer contradicts it.

    A built-in kind must fit. A user's description is taken at its word, unless gradients verify another layout.
    """
    find = partial(_compare, layer, spec, args, kwargs)
    question = "compared", spec.kind, spec.parts, tuple(spec.residual or ())
    try:
        if args or kwargs:
            description = find()
        else:
            description = cached_by_class(layer, question, find)
    except (CannotProbe, ValueError):
        # it may have values later; a pattern that does not fit raises again where the coefficients are read
        return Description(spec)
    return description._replace(spec=spec)  # other fields of a description may have changed


def is_linear(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> bool:
    """Return whether the output is an affine function of the coefficients, or that is not known."""
    if spec.is_of_this_package(layer):
        return True
    return compare(layer, spec).is_linear is not False


def _compare(
    layer: nn.Module,
    spec: KANLayerSpec,
    args: Any,
    kwargs: Any,
) -> Description:
    tensor = spec.locate(layer)
    has_lists = any(len(part) > 1 for part in tensor.parts)
    if has_lists and len(tensor.shape) == 3:
        return Description(spec, is_linear=False)  # several layers
    floating = [name for name, value in layer.named_parameters() if value.is_floating_point()]
    names = dict.fromkeys([*tensor.parameters, *floating])
    probe = Probe(layer, names, args, kwargs)
    probe.place_inputs(spec.read_grid(layer).values())
    with isolated(probe.like):
        try:
            evidence = _find_evidence(probe, tensor)
            contradicts = evidence.contradicts(tensor)
        except CannotProbe:  # the same for all layers of this class
            return Description(spec)
        if (evidence.size, evidence.outputs) != (count_inputs(tensor), tensor.shape[0]):
            contradicts = True
        reason = ""
        doubts = {}
        if is_built_in(spec):
            is_unused = any(evidence.base[name] is None for name in tensor.parameters)
            if contradicts or is_unused or OTHER in _find_doubts(evidence, spec, tensor).values():
                reason = "it computes something else"
        elif contradicts:
            reason = _find_contradiction(layer, tensor, args, kwargs)
        if not is_built_in(spec) and not reason:
            doubts = _find_doubts(evidence, spec, tensor)
        return Description(spec, reason, doubts, evidence.is_linear(tensor.parameters))


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
    raise CannotProbe(probe.error or "it takes no input that was made up")


def _find_contradiction(
    layer: nn.Module,
    tensor: CoefficientTensor,
    args: Any,
    kwargs: Any,
) -> str:
    """Return how the layout that gradients verify differs from the described one, or an empty string."""
    spec, _ = infer(layer, args, kwargs)
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


def _find_doubts(
    evidence: Evidence,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
) -> dict[str, str]:
    """Say what speaks against adapting a parameter, or why it is left out. Constants are left out without a word."""
    doubts = {}
    described = {*spec.grid, spec.bias, *(spec.edge_scale or ())}
    layer = evidence.probe.layer
    are_linear = {name: evidence.is_linear([name]) for name in tensor.parameters}
    # then nothing follows the sum that makes the output nonlinear in all of them
    has_linear = any(are_linear.values())
    # no `get_parameter`: in `functional_call` they are tensors
    requires_grad = {name: attrgetter(name)(layer).requires_grad for name in evidence.base}
    is_trained = any(requires_grad[name] for name in tensor.parameters)
    for name, gradient in evidence.base.items():
        path, _, _ = name.rpartition(".")
        is_constant = is_trained and not requires_grad[name]
        if name in described or is_constant or isinstance(layer.get_submodule(path), NORMS):
            continue
        layout = tensor.parameters.get(name)
        observed = name if layout is not None and not layout.shared else ""
        if gradient is None:
            doubts[name] = UNUSED
        elif not evidence.stays(tensor, [name], observed):
            is_factor = not observed and evidence.stays_on_edges(tensor, [name])
            doubts[name] = FACTOR if is_factor else NOT_LINEAR
        elif layout is not None and has_linear and not are_linear[name]:
            doubts[name] = NOT_LINEAR
        elif layout is None:
            may_be_bias = gradient.dim() <= 1 or evidence.is_constant(name)
            if not may_be_bias or not evidence.is_additive([name]):
                doubts[name] = OTHER
    return doubts
