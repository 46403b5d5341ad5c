# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Regions of the plane with straight and circular edges."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules.checks import check_count, check_number


SLACK = 1e-6  # relative to a length: closer points are equal
STEP = 1e-7  # relative to the length of an edge: from one of its points to both sides
SHARE = 0.618  # of the length to this point: at the middle, other edges often touch an edge
FAR = 1e3  # relative to the diameter of a circle: the distance to its ends


class Edges(NamedTuple):
    """Line segments and circular arcs in the complex plane, as functions of the arc length s:

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
        length = s * torch.sinc(turn / (2 * math.pi))
        chord = length * torch.exp(0.5j * turn)
        return self.start + self.direction * chord

    def directions(self, s: Tensor) -> Tensor:
        """Return the unit tangents p'(s)."""
        turn = self.curvature * s
        return self.direction * torch.exp(1j * turn)

    def ends(self) -> Tensor:
        """Return the last points."""
        return self.points(self.length)

    def select(self, index: Any) -> Edges:
        """Index all columns."""
        return Edges(*[column[index] for column in self])

    def reversed(self) -> Edges:
        """Return the edges traversed from their ends to their starts."""
        direction = -self.directions(self.length)
        return Edges(self.ends(), direction, -self.curvature, self.length)

    def disks(self) -> tuple[Tensor, Tensor]:
        """Return the center and the radius of a disk around each edge: its middle, and the distance to its ends."""
        middle = self.points(self.length / 2)
        radius = (self.ends() - middle).abs()
        is_circle = self.curvature.abs() * self.length > 2 * math.pi - SLACK
        return middle, torch.where(is_circle, FAR * radius, radius)

    def cut(self) -> Edges:
        """Split the edges where they meet others, the cutters, and where others on their line or circle start."""
        cutters = self
        edges = self.select((slice(None), None))  # (E, 1)
        curvature = edges.curvature
        length = edges.length
        offset = edges.start - cutters.start
        normal = 1j * cutters.direction

        # With q = tan(curvature s / 2) / (curvature length / 2), p(s) = start + direction q length / bend. Times
        # |bend|^2, the equation of the cutter's line or circle is then quadratic in q. Three values determine it.
        def equation(q: float) -> Tensor:
            bend = 1 - 0.5j * curvature * length * q
            point = offset * bend + edges.direction * length * q
            height = (normal.conj() * point * bend.conj()).real
            square = point.abs().square()
            return height - cutters.curvature / 2 * square

        below = equation(-1)
        constant = equation(0)
        above = equation(1)
        linear = (above - below) / 2
        square = (above + below) / 2 - constant
        root = (linear.square() - 4 * square * constant).sqrt()
        # the sum of two terms of one sign does not cancel
        numerator = -linear - root.copysign(linear)
        q = torch.stack([2 * constant / numerator, numerator / (2 * square)])

        def arc_length(turn: Tensor, straight: Tensor) -> Tensor:
            turn = (turn * curvature.sign()).remainder(2 * math.pi)
            return torch.where(curvature == 0, straight, turn / curvature.abs())

        half_turn = (curvature * length * q / 2).atan()
        s = arc_length(2 * half_turn, length * q)
        center, radius = cutters.disks()
        distance = (edges.points(s) - center).abs()
        is_on_cutter = distance < (1 + SLACK) * radius

        # edges on one line or circle, whose equation is zero to rounding, are cut where cutters start
        size = below.abs() + constant.abs() + above.abs()
        is_same = size < SLACK * length
        local = (cutters.start - edges.start) / edges.direction
        turn = (1 + 1j * curvature * local).angle()
        at_start = arc_length(turn, local.real)
        gap = (edges.points(at_start) - cutters.start).abs()
        is_at_start = is_same & (gap < SLACK * length)

        s = torch.stack([*s, at_start])
        is_on_cutter = torch.stack([*(is_on_cutter & ~is_same), is_at_start])
        is_on_edge = (s >= 0) & (s <= length)
        cuts = torch.where(is_on_cutter & is_on_edge, s, length)
        stops = torch.cat([torch.zeros_like(length), *cuts, length], 1)
        stops = stops.sort(1).values
        starts = stops[:, :-1]
        lengths = stops.diff(dim=1)
        pieces = Edges(
            edges.points(starts),
            edges.directions(starts),
            curvature.expand_as(lengths),
            lengths,
        )
        return pieces.select(lengths > SLACK * length)

    def join(self) -> Edges:
        """Merge edges that follow each other on the same line or circle."""
        edges = self
        size = self.length.max()
        while True:
            bends = edges.curvature * size
            ends = torch.stack([edges.ends() / size, edges.directions(edges.length), bends], 1)
            starts = torch.stack([edges.start / size, edges.direction, bends], 1)
            gaps = (ends.unsqueeze(1) - starts).abs().sum(2)
            follows = (gaps < SLACK).fill_diagonal_(False)
            if not follows.any():
                return edges
            first, second = follows.nonzero()[0]
            edges.length[first] += edges.length[second]
            edges = edges.select(torch.arange(len(follows)) != second)


def _concatenate(first: Edges, second: Edges) -> Edges:
    columns = zip(first, second, strict=True)
    return Edges(*map(torch.cat, columns))


class Region:
    r"""A region of the plane with straight and circular edges, made by `polygon` and `disk`.

    `one | other` is the union, `one & other` the intersection, and `one - other` the difference. Pieces of edges
    inside the result do not bound it and are dropped.

    Points are x (..., I) with I >= 2. Only the first two coordinates count, so a region also works for (x, y, t).

    Args:
        inside: Maps points (n, 2) to (n,) bool.
        edges: Candidates for the edges. The region keeps those with its interior on exactly one side.

    Attributes:
        size: Half of the larger one of width and height, the radius of a disk. It is the unit of `distance`.

    Raises:
        ValueError: The region has no edges. In all methods: x has fewer than two coordinates.

    Example:
        >>> import torch
        >>> from peft_lotra.pde import disk, polygon
        >>> square = polygon([(0, 0), (1, 0), (1, 1), (0, 1)])
        >>> quarter_removed = square - disk((0, 0), 0.5)
        >>> quarter_removed.inside(torch.tensor([[0.1, 0.1], [0.9, 0.9]])).tolist()
        [False, True]
    """

    def __init__(self, inside: Callable[[Tensor], Tensor], edges: Edges) -> None:
        # an edge bounds the region if just one of its sides is inside
        s = SHARE * edges.length
        to_left = 1j * STEP * edges.length * edges.directions(s)
        left = inside(torch.view_as_real(edges.points(s) + to_left))
        right = inside(torch.view_as_real(edges.points(s) - to_left))

        # repeated edges have the same middle, and the same curvature there, which tells a line from a circle
        middle, _ = edges.disks()
        bend = edges.curvature * edges.directions(edges.length / 2)
        distance = (middle.unsqueeze(1) - middle).abs()
        turn = (bend.unsqueeze(1) - bend).abs()
        gap = distance + edges.length**2 * turn
        is_repeated = (gap < SLACK * edges.length).tril(-1).any(1)
        is_edge = (left != right) & ~is_repeated
        if not is_edge.any():
            raise ValueError("The region has no edges: it is empty, or `select` takes none.")
        # with the interior on the left, normals point outward
        forward = edges.select(is_edge & left)
        backward = edges.select(is_edge & right)
        edges = _concatenate(forward, backward.reversed()).join()

        middle, radius = edges.disks()
        points = torch.view_as_real(torch.cat([edges.start, middle, edges.ends()]))
        extent = points.amax(0) - points.amin(0)
        size = extent.max().item() / 2
        self.size = size
        self._inside = inside
        self._edges = edges
        vectors = [edges.start / size, 1j * edges.direction, middle / size]
        numbers = [edges.curvature * size, radius / size]
        self._scaled = [*map(torch.view_as_real, vectors), *numbers]

    def _combine(
        self,
        other: Region,
        rule: Callable[[Tensor, Tensor], Tensor],
    ) -> Region:
        if not isinstance(other, Region):
            return NotImplemented
        edges = _concatenate(self._edges, other._edges)
        inside = partial(_is_in_both, self._inside, other._inside, rule)
        return Region(inside, edges.cut())

    __or__ = partialmethod(_combine, rule=operator.or_)
    __and__ = partialmethod(_combine, rule=operator.and_)
    __sub__ = partialmethod(_combine, rule=operator.gt)  # inside the first one, and not inside the second one

    def select(self, where: Callable[[Tensor], Tensor]) -> Region:
        """Return the region with some of its edges only, for `distance` and `boundary` of a part of its boundary.

        Args:
            where: Maps the middles of the edges, (E, 2), to (E,) bool.

        Example:
            >>> import torch
            >>> from peft_lotra.pde import polygon
            >>> square = polygon([(0, 0), (1, 0), (1, 1), (0, 1)])
            >>> floor = square.select(lambda x: x[:, 1] == 0)
            >>> (floor.distance(torch.tensor([[0.5, 0.0], [0.5, 1.0]])) > 1e-5).flatten().tolist()
            [False, True]
        """
        middle, _ = self._edges.disks()
        mask = where(torch.view_as_real(middle))
        return Region(self._inside, self._edges.select(mask))

    def inside(self, x: Tensor) -> Tensor:
        """Return whether points are inside, x (..., I) to (...) bool."""
        return self._inside(_plane(x))

    def distance(self, x: Tensor) -> Tensor:
        r"""Return the distance from the edges in units of `size`, x (..., I) to (..., 1), for `HardConstraint`.

        With f zero on the line or circle of an edge, t zero on the circle around its middle through its ends, and
        slopes of 1 there,

            phi_i = sqrt(f^2 + (sqrt(t^2 + f^4) - t)^2 / 4),    1 / phi = sum_i 1 / phi_i

        is zero on the edges, to rounding, with a slope of 1 (it is normalized to first order). It is smooth and
        positive elsewhere, also outside. Its second derivatives grow as one over the distance from a vertex.

        Source: V. L. Rvachev and T. I. Sheiko, "R-functions in boundary value problems in mechanics" (1995);
        N. Sukumar and A. Srivastava, arXiv 2104.08426.
        """
        x = _plane(x).unsqueeze(-2) / self.size
        start, normal, middle, curvature, radius = (column.to(x) for column in self._scaled)
        offset = x - start
        height = (offset * normal).sum(-1)
        f = height - curvature / 2 * offset.square().sum(-1)
        from_middle = (x - middle).square().sum(-1)
        t = (radius.square() - from_middle) / (2 * radius)

        # |f| has no slope at zero
        rounding = 8 * torch.finfo(x.dtype).eps
        f = f + rounding * (f.abs() < rounding)
        trimming = ((t.square() + f**4).sqrt() - t) / 2
        distance = (f.square() + trimming.square()).sqrt()
        return 1 / (1 / distance).sum(-1, keepdim=True)

    def boundary(
        self,
        count: int,
        *,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return points that are spread evenly by length over the edges, and outward unit normals.

        Args:
            count: The number of points.
            seed: The same seed gives the same points.

        Returns:
            Points and normals, float64 (count, 2) each, edge after edge.
        """
        count = check_count(count, "count")
        edges = self._edges
        ends = edges.length.cumsum(0)
        generator = torch.Generator().manual_seed(seed)
        shift = ends.new_empty(count).uniform_(generator=generator)
        shares = (torch.arange(count, device="cpu") + shift) / count
        s = shares * ends[-1]
        index = torch.searchsorted(ends, s)
        starts = ends - edges.length
        s = s - starts[index]

        edges = edges.select(index)
        points = edges.points(s)
        normals = -1j * edges.directions(s)
        return torch.view_as_real(points), torch.view_as_real(normals)


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
    corners = _check_points(vertices, "vertices")
    if torch.equal(corners[:1], corners[-1:]):
        corners = corners[:-1]
    if len(corners) < 3 or len(corners.unique(dim=0)) < len(corners):
        raise ValueError(f"`vertices` has {len(corners)} points, but must have at least three, each once.")

    start = torch.complex(*corners.T)
    sides = start.roll(-1) - start
    length = sides.abs()
    edges = Edges(start, sides / length, torch.zeros_like(length), length)
    if len(edges.cut().length) > len(length):
        raise ValueError("Edges between the `vertices` cross or touch. Give the corners in their order.")
    return Region(partial(_is_in_polygon, corners.tolist()), edges)


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
    middle = _check_points([center], "center")
    radius = check_number(radius, "radius", "(0, inf)")
    start = torch.complex(*middle.T) + radius
    length = torch.full_like(start.real, 2 * math.pi * radius)
    upward = torch.full_like(start, 1j)
    circle = Edges(start, upward, 2 * math.pi / length, length)
    return Region(partial(_is_in_disk, middle[0], radius), circle)


# Functions of a module, which can be pickled


def _is_in_polygon(corners: list[list[float]], points: Tensor) -> Tensor:
    """Return whether a ray from each point to the right crosses an odd number of sides."""
    x, y = points.unbind(-1)
    is_inside = torch.zeros_like(x, dtype=torch.bool)
    x1, y1 = corners[-1]
    for x2, y2 in corners:
        if y1 != y2:
            is_level = (y < y1) != (y < y2)
            slope = (x2 - x1) / (y2 - y1)
            crossing = x1 + (y - y1) * slope
            is_inside ^= is_level & (x < crossing)
        x1, y1 = x2, y2
    return is_inside


def _is_in_disk(center: Tensor, radius: float, x: Tensor) -> Tensor:
    offset = x - center.to(x.device)
    return offset.norm(dim=-1) < radius


def _is_in_both(
    first: Callable,
    second: Callable,
    rule: Callable,
    x: Tensor,
) -> Tensor:
    return rule(first(x), second(x))


def _check_points(values: Any, argument: str) -> Tensor:
    """Return points of the plane as a float64 tensor; raise a `ValueError` for another shape."""
    points = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    has_shape = points.dim() == 2 and points.shape[1] == 2
    if not has_shape or not points.isfinite().all():
        raise ValueError(f"`{argument}` is {values!r:.100}, but must be points of two finite numbers each.")
    return points


def _plane(x: Tensor) -> Tensor:
    """Return the first two coordinates."""
    if x.shape[-1] < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but regions need at least two coordinates.")
    return x[..., :2]
