# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Regions of the plane with straight and circular edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules.checks import check_count, check_number


SLACK = 1e-6  # relative to a length: points that are closer are one
STEP = 1e-7  # relative to the length of an edge: from its middle to both sides
FAR = 1e3  # relative to the diameter of a circle: where its ends are


class Edges(NamedTuple):
    """Line segments and arcs of circles, in complex numbers, by the length s from their start:

        p(s) = start + integral_0^s direction exp(i curvature r) dr.

    Attributes:
        start, direction: The first point and the unit tangent there, (E,) complex128.
        curvature, length: (E,) float64. A positive curvature turns left.
    """

    start: Tensor
    direction: Tensor
    curvature: Tensor
    length: Tensor

    def points(self, s: Tensor) -> Tensor:
        """Return p(s)."""
        turn = self.curvature * s
        return self.start + self.direction * s * torch.sinc(turn / (2 * math.pi)) * torch.exp(0.5j * turn)

    def directions(self, s: Tensor) -> Tensor:
        """Return the unit tangents p'(s)."""
        return self.direction * torch.exp(1j * self.curvature * s)

    def select(self, index: Any) -> Edges:
        """Return some of the edges."""
        return Edges(*(column[index] for column in self))

    def reversed(self) -> Edges:
        """Return the edges from their ends to their starts."""
        return Edges(self.points(self.length), -self.directions(self.length), -self.curvature, self.length)

    def discs(self) -> tuple[Tensor, Tensor]:
        """Return the middle of each edge and the distance to its ends: no point of the edge is further away."""
        middle = self.points(self.length / 2)
        reach = (self.points(self.length) - middle).abs()
        is_circle = self.curvature.abs() * self.length > 2 * math.pi - SLACK
        return middle, torch.where(is_circle, FAR * reach, reach)

    def cut(self, others: Edges) -> Edges:
        """Return the edges in pieces that end where they meet others."""
        column = self.select((slice(None), None))  # (E, 1)
        curvature, length = column.curvature, column.length

        # with r = 2 tan(curvature s / 2) / curvature, p = start + direction r / (1 - i curvature r / 2): where p is on
        # the line or circle of another edge, a r^2 + b r + c = 0
        normal = 1j * others.direction
        offset = column.start - others.start
        slope = normal - others.curvature * offset
        c = ((normal + slope).conj() * offset).real / 2
        slope = slope.conj() * column.direction
        a = (c * curvature.square() / 2 - curvature * slope.imag - others.curvature) / 2
        b = slope.real
        numerator = -b - torch.where(b < 0, -1.0, 1.0) * (b.square() - 4 * a * c).sqrt()
        r = torch.cat([2 * c / numerator, numerator / (2 * a)], 1)
        turn = (curvature * r / 2).atan() * 2 * curvature.sign()
        s = torch.where(curvature == 0, r, turn.remainder(2 * math.pi) / curvature.abs())

        middle, reach = (part.repeat(2) for part in others.discs())
        is_met = (s >= 0) & (s <= length) & ((column.points(s) - middle).abs() < (1 + SLACK) * reach)
        stops = torch.cat([torch.zeros_like(length), torch.where(is_met, s, length), length], 1).sort(1).values
        low, high = stops[:, :-1], stops[:, 1:]
        pieces = Edges(column.points(low), column.directions(low), curvature.expand_as(low), high - low)
        return pieces.select(high - low > SLACK * length)

    def joined(self) -> Edges:
        """Return the edges, those in one that follow each other on the same line or circle."""
        edges = self
        size = self.length.max()
        while True:
            gaps = (edges.points(edges.length).unsqueeze(1) - edges.start).abs() / size
            turns = (edges.directions(edges.length).unsqueeze(1) - edges.direction).abs()
            bends = (edges.curvature.unsqueeze(1) - edges.curvature).abs() * size
            pairs = (gaps + turns + bends < SLACK).fill_diagonal_(False).nonzero()
            if not len(pairs):
                return edges
            first, second = pairs[0]
            edges.length[first] += edges.length[second]
            edges = edges.select(torch.arange(len(edges.length)) != second)


class Region:
    r"""A region of the plane with straight and circular edges, made by `polygon` and `disk`.

    `one | other` is the union, `one & other` the intersection, and `one - other` the difference. The edges of the
    result are what bounds it: pieces inside of the other region do not count.

    Points are x (..., I) with I >= 2. The region is in the first two coordinates: it works for (x, y, t), too.

    Args:
        inside: Takes points (n, 2) to (n,) bool.
        edges: Candidates for the edges: those with the region on one side only are taken, each once.

    Attributes:
        size: Half of the larger one of width and height, the radius of a disk: the unit of `distance`.

    Raises:
        ValueError: The region has no edges. In all methods: x has fewer than two coordinates.
    """

    def __init__(self, inside: Callable[[Tensor], Tensor], edges: Edges) -> None:
        middle, _ = edges.discs()
        to_left = 1j * STEP * edges.length * edges.directions(edges.length / 2)
        left, right = (inside(torch.view_as_real(side)) for side in (middle + to_left, middle - to_left))
        is_repeated = ((middle.unsqueeze(1) - middle).abs() < SLACK * edges.length).tril(-1).any(1)
        is_edge = (left != right) & ~is_repeated
        if not is_edge.any():
            raise ValueError("The region has no edges: it is empty, or `select` takes none.")
        forward, backward = edges.select(is_edge & left), edges.select(is_edge & right).reversed()
        edges = Edges(*map(torch.cat, zip(forward, backward, strict=True))).joined()

        middle, reach = edges.discs()
        corners = torch.view_as_real(torch.cat([edges.start, middle, edges.points(edges.length)]))
        self.size = size = (corners.amax(0) - corners.amin(0)).max().item() / 2
        self._inside, self._edges = inside, edges
        vectors = (edges.start / size, 1j * edges.direction, middle / size)
        self._frame = [*map(torch.view_as_real, vectors), edges.curvature * size, reach / size]

    def __or__(self, other: Region) -> Region:
        return self._combine(other, lambda one, two: one | two)

    def __and__(self, other: Region) -> Region:
        return self._combine(other, lambda one, two: one & two)

    def __sub__(self, other: Region) -> Region:
        return self._combine(other, lambda one, two: one & ~two)

    def _combine(self, other: Region, rule: Callable[[Tensor, Tensor], Tensor]) -> Region:
        pieces = self._edges.cut(other._edges), other._edges.cut(self._edges)
        edges = Edges(*map(torch.cat, zip(*pieces, strict=True)))
        return Region(lambda x: rule(self._inside(x), other._inside(x)), edges)

    def select(self, where: Callable[[Tensor], Tensor]) -> Region:
        """Return the region with some of its edges only, for `distance` and `boundary` of a part of its boundary.

        Args:
            where: Takes the middles of the edges, (E, 2), to (E,) bool.

        Example:
            >>> import torch
            >>> from peft_lotra.pde import polygon
            >>> square = polygon([(0, 0), (1, 0), (1, 1), (0, 1)])
            >>> floor = square.select(lambda x: x[:, 1] == 0)
            >>> (floor.distance(torch.tensor([[0.5, 0.0], [0.5, 1.0]])) > 1e-5).flatten().tolist()
            [False, True]
        """
        middle, _ = self._edges.discs()
        return Region(self._inside, self._edges.select(where(torch.view_as_real(middle))))

    def inside(self, x: Tensor) -> Tensor:
        """Return whether points are inside, x (..., I) to (...) bool."""
        return self._inside(_plane(x))

    def distance(self, x: Tensor) -> Tensor:
        r"""Return the distance from the edges in units of `size`, x (..., I) to (..., 1), for `HardConstraint`.

        With f zero on the line or circle of an edge, t zero on the circle around its middle through its ends, and
        slopes of 1 there,

            phi_i = sqrt(f^2 + (sqrt(t^2 + f^4) - t)^2 / 4),    1 / phi = sum_i 1 / phi_i

        is zero on the edges, to rounding, with a slope of 1 (it is normalized to first order), and smooth and positive
        elsewhere, also outside. Its second derivatives grow as one over the distance from a vertex.

        Source: V. L. Rvachev and T. I. Sheiko, "R-functions in boundary value problems in mechanics" (1995);
        N. Sukumar and A. Srivastava, arXiv 2104.08426.
        """
        start, normal, middle, curvature, reach = (column.to(x) for column in self._frame)
        x = _plane(x).unsqueeze(-2) / self.size
        q = x - start
        f = (q * normal).sum(-1) - curvature / 2 * q.square().sum(-1)
        t = (reach.square() - (x - middle).square().sum(-1)) / (2 * reach)
        # never zero, where the slope of |f| would be
        rounding = 8 * torch.finfo(x.dtype).eps
        f = f + rounding * (f.abs() < rounding)
        trimmed = ((t.square() + f**4).sqrt() - t) / 2
        distance = (f.square() + trimmed.square()).sqrt()
        while distance.shape[-1] > 1:
            one, other = distance[..., ::2], distance[..., 1::2]
            count = other.shape[-1]
            joint = one[..., :count] * other / (one[..., :count] + other)
            distance = torch.cat([joint, one[..., count:]], -1)
        return distance

    def boundary(self, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return points that are spread evenly by length over the edges, and outward unit normals.

        Args:
            count: The number of points.
            seed: The same seed gives the same points.

        Returns:
            Points and normals, float64 (count, 2) each, edge after edge.
        """
        edges = self._edges
        ends = edges.length.cumsum(0)
        generator = torch.Generator().manual_seed(check_count(seed, "seed", low=0))
        shift = ends.new_empty(check_count(count, "count")).uniform_(generator=generator)
        s = (torch.arange(count, device="cpu") + shift) / count * ends[-1]
        index = torch.searchsorted(ends, s).clamp(max=len(ends) - 1)
        s = s - (ends - edges.length)[index]
        edges = edges.select(index)
        return torch.view_as_real(edges.points(s)), torch.view_as_real(-1j * edges.directions(s))


def polygon(vertices: Sequence[Sequence[float]] | Tensor) -> Region:
    """Make a region from the vertices of a polygon, in either orientation, closed or not.

    Args:
        vertices: (n, 2), at least three. For a polygon of shapely, `list(shape.exterior.coords)`; subtract a polygon
            for each of `shape.interiors`.

    Raises:
        ValueError: The vertices have another shape, are not finite, or occur twice; edges cross or touch.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import polygon
        >>> triangle = polygon([(0, 0), (2, 0), (0, 2)])
        >>> x = torch.tensor([[0.5, 0.5], [2.0, 2.0], [1.0, 0.0]])
        >>> triangle.inside(x[:2]).tolist(), triangle.distance(x)[2].item() < 1e-5
        ([True, False], True)
        >>> points, normals = triangle.boundary(100)
    """
    corners = _coordinates("vertices", vertices, 2)
    if torch.equal(corners[0], corners[-1]):
        corners = corners[:-1]
    start = torch.view_as_complex(corners)
    if len(corners) < 3 or len(corners.unique(dim=0)) < len(corners):
        raise ValueError(f"`vertices` has {len(corners)} points, but must have at least three, each once.")
    sides = start.roll(-1) - start
    length = sides.abs()
    edges = Edges(start, sides / length, torch.zeros_like(length), length)
    if len(edges.cut(edges).length) > len(length):
        raise ValueError("Edges between the `vertices` cross or touch. Give the corners in their order.")
    ends = torch.view_as_real(torch.stack([start, start.roll(-1)], 1)).flatten(1).tolist()

    def inside(x: Tensor) -> Tensor:
        is_inside = torch.zeros_like(x[..., 0], dtype=torch.bool)
        for x1, y1, x2, y2 in ends:
            if y1 != y2:
                is_crossed = (x[..., 1] < y1) != (x[..., 1] < y2)
                is_inside ^= is_crossed & (x[..., 0] < x1 + (x[..., 1] - y1) * ((x2 - x1) / (y2 - y1)))
        return is_inside

    return Region(inside, edges)


def disk(center: Sequence[float], radius: float) -> Region:
    """Make a disk; subtract it for a circular hole.

    Raises:
        ValueError: `center` is not two finite numbers, or `radius` is not above 0.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import disk
        >>> ring = disk((0, 0), 2) - disk((0, 0), 1)
        >>> ring.inside(torch.tensor([[0.0, 0.0], [0.0, 1.5]])).tolist()
        [False, True]
    """
    point = _coordinates("center", center, 1)
    radius = check_number(radius, "radius", "(0, inf)")
    start = torch.view_as_complex(point).view(1) + radius
    curvature = point.new_tensor([1 / radius])
    circle = Edges(start, torch.full_like(start, 1j), curvature, 2 * math.pi / curvature)
    return Region(lambda x: (x - point.to(x)).norm(dim=-1) < radius, circle)


def _coordinates(argument: str, values: Any, dim: int) -> Tensor:
    """Return points of the plane, (2,) or (n, 2), as a float64 tensor; raise a `ValueError` for anything else."""
    try:
        points = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().contiguous()
    except (TypeError, ValueError, RuntimeError):  # text, None, or rows of different lengths
        points = torch.empty(0)
    if points.dim() != dim or points.shape[-1] != 2 or not points.numel() or not points.isfinite().all():
        shape = "(2,)" if dim == 1 else "(n, 2)"
        raise ValueError(f"`{argument}` is {values!r:.100}, but must be finite numbers {shape}.")
    return points


def _plane(x: Tensor) -> Tensor:
    """Return the first two coordinates."""
    if x.dim() == 0 or x.shape[-1] < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but regions need at least two coordinates in the last dimension."
        )
    return x[..., :2] if x.is_floating_point() else x[..., :2].double()
