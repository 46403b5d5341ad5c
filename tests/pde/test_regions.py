# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import math
import operator
import pickle

import pytest
import torch
from helpers import refuses
from pde_problems import error, poisson
from torch import Tensor, nn

from peft_lotra.kan import KAN, jet
from peft_lotra.pde import (
    BoxDistance,
    Region,
    ResidualSampler,
    box_points,
    disk,
    polygon,
    robin,
    side_points,
    solve,
)


SQUARE = (-1.0, -1.0), (1.0, 1.0)
L_CORNERS = [(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (-1, 1)]


def rectangle(low: tuple[float, float], high: tuple[float, float]) -> Region:
    return polygon([low, (high[0], low[1]), high, (low[0], high[1])])


REGIONS = {
    "triangle": lambda: polygon([(-1, -1), (1, -0.5), (0, 1)]),
    "L-shape": lambda: polygon(L_CORNERS),
    "disk": lambda: disk((0.1, -0.2), 0.7),
    "union": lambda: disk((-0.4, 0), 0.5) | polygon([(-0.2, -0.3), (1, -0.3), (1, 0.3), (-0.2, 0.3)]),
    "intersection": lambda: disk((-0.3, 0), 0.7) & disk((0.3, 0), 0.6),
    "difference": lambda: polygon(L_CORNERS) - disk((0, 0), 0.4),
    "a hole": lambda: polygon(L_CORNERS) - disk((-0.5, 0.5), 0.3),
    "edges that coincide": lambda: rectangle((-1, 0), (1, 1)) | rectangle((-1, -1), (0, 1)),
    "a circle that is cut where it starts": lambda: disk((0, 0), 0.5) - rectangle((0, 0), (1, 1)),
}


def within(region: Region, count: int = 200) -> Tensor:
    """Return points inside of a region."""
    return box_points(*SQUARE, count, inside=region.inside)


def slopes(region: Region, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(region.distance(x).sum(), x)[0]


@pytest.mark.parametrize("name", REGIONS)
def test_distance_is_zero_on_the_boundary_with_slope_one_and_positive_inside(name):
    region = REGIONS[name]()
    points, normals = region.boundary(300)

    distance = region.distance(points)

    torch.testing.assert_close(distance, torch.zeros_like(distance), rtol=0, atol=1e-12)
    torch.testing.assert_close(region.size * slopes(region, points), -normals, rtol=0, atol=1e-6)
    assert (region.distance(within(region)) > 0).all()


@pytest.mark.parametrize("name", REGIONS)
def test_second_derivatives_inside_are_finite_and_equal_by_forward_and_reverse_mode(name):
    region = REGIONS[name]()
    x = within(region, 50)

    def along(x: Tensor, direction: Tensor) -> Tensor:
        return torch.func.jvp(region.distance, (x,), (direction.expand_as(x),))[1]

    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda point: region.distance(point)[0])))(x)

    for i, direction in enumerate(torch.eye(2, dtype=torch.float64)):
        _, second = torch.func.jvp(lambda x, v=direction: along(x, v), (x,), (direction.expand_as(x),))
        assert second.isfinite().all()
        torch.testing.assert_close(second[:, 0], hessian[:, i, i])


@pytest.mark.parametrize("name", REGIONS)
def test_normals_point_out_of_the_region(name):
    region = REGIONS[name]()

    points, normals = region.boundary(200, seed=3)

    assert points.dtype == normals.dtype == torch.float64
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(200, dtype=torch.float64))
    assert region.inside(points - 1e-6 * normals).all()
    assert not region.inside(points + 1e-6 * normals).any()


QUARTER = 2 * math.pi * 0.4 / 4
LENGTHS = {"L-shape": 8.0, "difference": 8 - 2 * 0.4 + 3 * QUARTER, "a hole": 8 + 2 * math.pi * 0.3}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_of_a_boundary_has_no_pieces_inside_of_another_shape(name):
    """Points are spread evenly, so the share on the left side, of length 2, determines the length."""
    points, _ = REGIONS[name]().boundary(4000)

    share = (points[:, 0] < -1 + 1e-9).double().mean().item()

    assert 2 / share == pytest.approx(LENGTHS[name], rel=1e-2)


@pytest.mark.parametrize("operator", ["__or__", "__and__", "__sub__"])
def test_polygons_are_combined_as_by_shapely(operator):
    shapely = pytest.importorskip("shapely")
    first = [(0, 0), (3, 0), (3, 2), (1, 2.5), (0, 1)]
    second = [(1, -1), (2, -1), (2.2, 3), (0.9, 3)]
    x = box_points((-1, -2), (4, 4), 2000)

    region = getattr(polygon(first), operator)(polygon(second))
    shape = getattr(shapely.Polygon(first), operator)(shapely.Polygon(second))

    assert torch.equal(region.inside(x), torch.as_tensor(shapely.contains_xy(shape, *x.T.numpy())))
    points, _ = region.boundary(300)
    assert shapely.distance(shape.boundary, shapely.points(points.numpy())).max() < 1e-12


HALF_CIRCLE = math.pi * 0.5
TRIANGLE = [(0, -0.5), (0.8, -0.5), (0, 0.3)]
TOUCHING = {
    "a disk in a square": (lambda: rectangle(*SQUARE) & disk((0, 0), 1), 2 * math.pi),
    "a square without this disk": (lambda: rectangle(*SQUARE) - disk((0, 0), 1), 8 + 2 * math.pi),
    "a disk beside a square": (lambda: rectangle((-1, -0.5), (0, 0.5)) | disk((0.5, 0), 0.5), 4 + 2 * HALF_CIRCLE),
    "a corner on an edge that another one continues": (
        lambda: (
            (rectangle((0, 0), (1, 0.5)) | polygon([(-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5)]))
            | polygon([(-0.25, -0.75), (0.75, -0.75), (-0.25, 0.25)])
        ),
        None,
    ),
    "a disk that is cut out of its own union": (
        lambda: (disk((0, 0), 0.5) | polygon(TRIANGLE)) & disk((0, 0), 0.5),
        2 * HALF_CIRCLE,
    ),
}


@pytest.mark.parametrize("name", TOUCHING)
def test_shapes_that_touch_have_their_whole_boundary_once(name):
    make, length = TOUCHING[name]
    region = make()

    points, normals = region.boundary(4000)

    whole = region._edges.length.sum().item()
    assert length is None or whole == pytest.approx(length)
    torch.testing.assert_close(normals.mean(0), torch.zeros(2, dtype=torch.float64), atol=3e-3, rtol=0)
    area = whole * (points * normals).sum(1).mean().item() / 2  # divergence theorem
    share = region.inside(box_points(*SQUARE, 40_000)).double().mean().item()
    assert area == pytest.approx(4 * share, rel=2e-2)


SAME_VERTICES = {
    "reversed": L_CORNERS[::-1],
    "closed": [*L_CORNERS, L_CORNERS[0]],
    "a vertex on an edge": [*L_CORNERS, (-1, 0.3)],
    "a tensor": torch.tensor(L_CORNERS),
}


@pytest.mark.parametrize("name", SAME_VERTICES)
def test_orientation_closed_lists_and_vertices_on_edges_make_no_difference(name):
    x = within(polygon(L_CORNERS))

    torch.testing.assert_close(polygon(SAME_VERTICES[name]).distance(x), polygon(L_CORNERS).distance(x))


L_SHAPES = {
    "edges that coincide": REGIONS["edges that coincide"],
    "edges that touch": lambda: rectangle((-1, 0), (1, 1)) | rectangle((-1, -1), (0, 0)),
    "a difference": lambda: rectangle(*SQUARE) - rectangle((0, -2), (2, 0)),
    "an intersection": lambda: rectangle(*SQUARE) & polygon([(-2, 2), (-2, -2), (0, -2), (0, 0), (2, 0), (2, 2)]),
}


@pytest.mark.parametrize("name", L_SHAPES)
def test_the_same_shape_has_the_same_distance_also_on_edges_that_shapes_share(name):
    region, expected = L_SHAPES[name](), polygon(L_CORNERS)
    on_edges = torch.tensor([[-0.5, 0.0], [-0.5, 1e-9]], dtype=torch.float64)
    x = torch.cat([within(expected), on_edges])

    torch.testing.assert_close(region.distance(x), expected.distance(x))
    assert (region.distance(on_edges) > 0.1).all()
    assert region.inside(x).all()


def test_a_selected_edge_is_the_only_one():
    shape = polygon(L_CORNERS)

    floor = shape.select(lambda x: x[:, 1] == -1)

    points, normals = floor.boundary(20)
    assert (points[:, 1] == -1).all()
    assert (normals[:, 1] == -1).all()
    assert floor.distance(points).abs().max() < 1e-12
    all_points, _ = shape.boundary(100)
    assert floor.distance(all_points).gt(0.01).double().mean() > 0.7


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_size_of_a_shape_does_not_matter(scale):
    small = disk((0.1 * scale, 0), 0.7 * scale) - rectangle((0, 0), (scale, scale))
    region = disk((0.1, 0), 0.7) - rectangle((0, 0), (1, 1))
    x = within(region)

    assert small.size == pytest.approx(scale * region.size)
    torch.testing.assert_close(small.distance(scale * x), region.distance(x))


def test_further_coordinates_are_ignored():
    region = REGIONS["a hole"]()
    x = within(region)
    longer = torch.cat([x, torch.rand(200, 1, dtype=torch.float64)], 1)

    assert region.inside(longer).all()
    assert torch.equal(region.distance(longer), region.distance(x))


def test_a_distance_has_the_precision_of_its_points():
    region = REGIONS["a hole"]()
    x = within(region)

    distance = region.distance(x.float())

    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), region.distance(x), rtol=1e-3, atol=1e-5)


WRONG_REGIONS = {
    r"at least three": lambda: polygon([(0, 0), (1, 1), (0, 0)]),
    r"has 4 points.* each once": lambda: polygon([(0, 0), (1, 0), (1, 0), (0, 1)]),
    "cross or touch": lambda: polygon([(0, 0), (1, 1), (1, 0), (0, 1)]),
    "cross or touch. Give": lambda: polygon([(0, 0), (2, 0), (2, 1), (1, 0), (0, 1)]),
    "Edges between the `vertices` cross": lambda: polygon([(0, 0), (1, 1), (2, 2)]),
    "no edges": lambda: disk((0, 0), 1) - disk((0, 0), 1),
    r"must be points of two finite numbers": lambda: polygon([(0, 0, 0), (1, 0, 0), (0, 1, 0)]),
    r"`vertices` is \[\(0, 0\), \(1, nan\)": lambda: polygon([(0, 0), (1, math.nan), (0, 1)]),
    r"`center` is \[\(0, 0, 0\)\]": lambda: disk((0, 0, 0), 1),
    "`radius` is 0": lambda: disk((0, 0), 0),
    "`radius` is nan": lambda: disk((0, 0), math.nan),
    "it is empty": lambda: disk((0, 0), 1) & disk((5, 0), 1),
    "`count` is 0": lambda: disk((0, 0), 1).boundary(0),
    "at least two coordinates": lambda: disk((0, 0), 1).distance(torch.rand(3, 1)),
}


test_wrong_shapes_are_named = refuses(WRONG_REGIONS)


@pytest.mark.parametrize("combine", [operator.or_, operator.and_, operator.sub])
def test_regions_combine_with_regions_only(combine):
    with pytest.raises(TypeError, match="unsupported operand.* 'Region' and 'int'"):
        combine(disk((0, 0), 1), 3)


@pytest.mark.parametrize("name", REGIONS)
def test_regions_are_pickled_and_copied(name):
    region = REGIONS[name]()
    x = box_points(*SQUARE, 100)

    for twin in (pickle.loads(pickle.dumps(region)), copy.deepcopy(region)):
        assert torch.equal(twin.inside(x), region.inside(x))
        assert torch.equal(twin.distance(x), region.distance(x))


# Points


def test_points_are_inside_and_spread_evenly():
    region = REGIONS["L-shape"]()

    x = box_points(*SQUARE, 600, inside=region.inside, seed=2)

    assert x.shape == (600, 2)
    assert region.inside(x).all()
    right, up = x[:, 0] > 0, x[:, 1] > 0
    for quarter in (right & up, ~right & up, ~right & ~up):
        assert quarter.double().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_points_that_follow_the_residual_are_inside():
    region = REGIONS["a hole"]()
    sampler = ResidualSampler(*SQUARE, 300, share=0.5, inside=region.inside)

    def residual(x: Tensor) -> Tensor:
        return torch.exp(-50 * x[:, :1] ** 2)

    assert region.inside(sampler.draw(residual)).all()
    assert region.inside(sampler.draw(residual)).all()


def test_inside_may_return_an_array():
    x = box_points(*SQUARE, 50, inside=lambda x: x[:, 0].numpy() > 0.5)

    assert (x[:, 0] > 0.5).all()


def test_a_thin_region_has_points():
    thin = disk((0.3, 0.1), 0.03)  # 7e-4 of the box

    assert thin.inside(box_points(*SQUARE, 1500, inside=thin.inside)).all()


def test_a_region_that_is_hardly_in_the_box_needs_another_box():
    with pytest.raises(ValueError, match="Give a box that just holds the shape"):
        box_points(*SQUARE, 10, inside=disk((0, 0), 0.005).inside)


# solve


def solved(region: Region, residual=poisson, low=SQUARE[0], high=SQUARE[1], **options):
    torch.manual_seed(0)
    options = {"distance": region.distance, "inside": region.inside, "steps": 12, "progress": False} | options
    network = nn.Sequential(nn.Linear(len(low), 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    return solve(residual, low, high, network=network, **options)


def test_poisson_on_a_disk():
    region = disk((0.2, 0), 0.5)

    def exact(x: Tensor) -> Tensor:
        square = (x - torch.tensor([0.2, 0.0])).square().sum(1, keepdim=True)
        return (0.25 - square) / 4

    assert error(solved(region), exact) < 1e-3


def test_poisson_on_a_ring_with_a_hole_of_fixed_value():
    ring = disk((0, 0), 1) - disk((0, 0), 0.5)

    def laplace(model: nn.Module, x: Tensor) -> Tensor:
        return jet(model, x, collapse=True)[2]

    def exact(x: Tensor) -> Tensor:
        return x.norm(dim=1, keepdim=True).log() / math.log(0.5)

    result = solved(ring, laplace, lift=boundary_values, steps=25)

    assert error(result, exact) < 1e-2


def boundary_values(x: Tensor) -> Tensor:
    """Return 1 on the inner circle and 0 on the outer one."""
    return (1 - (x[..., :2] ** 2).sum(-1, keepdim=True)) / 0.75


def test_heat_on_a_disk():
    """Points are (x, y, t), and the source belongs to u = exp(-t) (1 - r^2)."""
    region = disk((0, 0), 1)

    def start(x: Tensor) -> Tensor:
        return 1 - (x[..., :2] ** 2).sum(-1, keepdim=True)

    def distance(x: Tensor) -> Tensor:
        return region.distance(x) * x[..., 2:]

    def heat(model: nn.Module, x: Tensor) -> Tensor:
        _, (_, _, u_t), laplacian = jet(model, x, collapse=(1.0, 1.0, 0.0))
        return u_t - laplacian - torch.exp(-x[:, 2:]) * (4 - start(x))

    result = solved(region, heat, (-1, -1, 0), (1, 1, 1), distance=distance, lift=start)

    assert error(result, lambda x: torch.exp(-x[:, 2:]) * start(x)) < 1e-2


class Corner(nn.Module):
    """The function c r^(2/3) sin(2 theta / 3), times a factor that is zero on the outer edges of the L-shape."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        right, up = x[..., :1], x[..., 1:2]
        theta = torch.atan2(-right - up, up - right) + 3 * math.pi / 4
        singular = (right**2 + up**2) ** (1 / 3) * torch.sin(2 * theta / 3)
        return self.coefficient * singular * (1 - right**2) * (1 - up**2)


def test_the_coefficient_of_a_corner_in_the_lift_is_trained():
    """0.4019 for -lap u = 1 on the L-shape: examples/studies/pde/shapes.py."""
    corner = Corner()

    solved(polygon(L_CORNERS), lift=corner, steps=20)

    assert corner.coefficient.item() == pytest.approx(0.4019, abs=0.01)


def test_conditions_on_the_normal_derivative():
    """For u = x^2 + y on a square: slopes on the right side and on top, 2 u + 3 u_n on the left side."""

    def exact(x: Tensor) -> Tensor:
        return x[..., :1] ** 2 + x[..., 1:]

    def equation(model: nn.Module, x: Tensor) -> Tensor:
        return jet(model, x, collapse=True)[2] - 2

    terms = [
        robin(*side_points(*SQUARE, 40, sides=[(0, "high")]), 0.0, 1.0, 2.0),
        robin(*side_points(*SQUARE, 40, sides=[(1, "high")]), 0.0, 1.0, lambda x: torch.ones(len(x))),
        robin(*side_points(*SQUARE, 40, sides=[(0, "low")]), 2.0, 3.0, lambda x: 2 * exact(x) + 6),
    ]
    distance = BoxDistance(*SQUARE, sides=[(1, "low")])
    conditions = {"distance": distance, "lift": lambda x: x[..., :1] ** 2 - 1, "terms": terms}

    result = solve(
        equation, *SQUARE, **conditions, network=KAN([2, 5, 1], 4, 4, norm="tanh"), steps=10, progress=False
    )

    x = box_points(*SQUARE, 200)
    torch.testing.assert_close(result.model(x), exact(x), rtol=0, atol=1e-2)


def test_a_term_of_robin_has_the_formula():
    class Field(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, :1] ** 2, x[:, :1] * x[:, 1:]], 1)

    points, normals = disk((0, 0), 2).boundary(7)
    values = torch.rand(7, 2, dtype=torch.float64)

    function, rows, weight = robin(points, normals, torch.arange(7), lambda x: x[:, 0], values, weight=3)

    x, y, n = points[:, 0], points[:, 1], normals
    slope = torch.stack([2 * x * n[:, 0], y * n[:, 0] + x * n[:, 1]], 1)
    u = torch.stack([x**2, x * y], 1)
    expected = torch.arange(7).unsqueeze(1) * u + x.unsqueeze(1) * slope - values
    torch.testing.assert_close(function(Field(), *rows), expected)
    assert weight == 3


def test_the_picture_is_blank_outside():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    region = disk((0, 0), 0.5)
    result = solved(region, steps=1)
    line = torch.linspace(-1, 1, 21, dtype=torch.float64)
    outside = ~region.inside(torch.cartesian_prod(line, line))

    values = result.plot(21).axes[0].collections[0].get_array()

    assert torch.as_tensor(values.mask).sum() == outside.sum()
    assert "inside" not in result.as_dict()
    plt.close("all")


def boundary_term():
    points, normals = disk((0, 0), 0.5).boundary(5)
    return points, normals


WRONG = {
    "true at all of 65536 points": lambda: solved(disk((0, 0), 0.5), inside=lambda x: x[:, 0] < 2),
    "`inside` is true at 0 of": lambda: solved(disk((0, 0), 0.5), inside=lambda x: x[:, 0] > 2),
    r"torch.bool of shape \(.*, 1\)": lambda: solved(disk((0, 0), 0.5), inside=lambda x: x[:, :1] > 0),
    "torch.float64 of shape": lambda: solved(disk((0, 0), 0.5), inside=lambda x: x[:, 0]),
    "`inside` is 3": lambda: solved(disk((0, 0), 0.5), inside=3),
    "not on all of the boundary of `inside`": lambda: solved(disk((0, 0), 0.5), distance=BoxDistance(*SQUARE)),
    "boundary of `inside`. Take": lambda: solved(
        disk((0, 0), 0.9) - disk((0, 0), 0.3), distance=disk((0, 0), 0.9).distance
    ),
    r"shape \(5, 2\) and `normals` \(4, 2\)": lambda: robin(boundary_term()[0], boundary_term()[1][:4], 0.0, 1.0),
    r"shape \(5, 2\) and `normals` \(5,\)": lambda: robin(boundary_term()[0], boundary_term()[1][:, 0], 0.0, 1.0),
    "must have length 1, .* from 2 to 2": lambda: robin(boundary_term()[0], 2 * boundary_term()[1], 0.0, 1.0),
    r"`values` has shape \(3, 1\)": lambda: robin(*boundary_term(), 0.0, 1.0, torch.ones(3, 1)),
    r"`values` has shape \(5, 1\).*finite": lambda: robin(*boundary_term(), 0.0, 1.0, math.nan),
    "`weight` is 0": lambda: robin(*boundary_term(), 0.0, 1.0, weight=0),
}


test_wrong_arguments_are_named_before_work_begins = refuses(WRONG)
