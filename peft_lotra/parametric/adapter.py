# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family of adapters that knows its parameter."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from ..compress.updates import check_without_adapters
from ..hub.card import README
from ..least_squares.problem import split_vector, trainable_parameters
from ..modules.calls import LayerLock, call_with_parameters
from ..modules.checks import check_count, check_function, check_list, check_number
from ..modules.folders import replacing_files
from ..tucker import Ranks
from ..tuner.config import LoTRAConfig
from .calibration import Calibration, minimize
from .estimate import ErrorEstimates, refit
from .fitting import Fitting
from .interpolation import FamilyReport, Member, MemberSpace, Point, ranges_of
from .members import OfModel, Problem, TermsOf, argument, read, residuals_of, take_steps, write
from .storage import FILE, load_family, save_family, write_card


Parameter = float | Sequence[float]


class Prediction:
    """The adapter of a family at one parameter, predicted or refined, and its error indicators.

    Attributes:
        parameter: The parameter, a number or a tuple.
        indicator: An estimate of the relative error, the change by one Gauss-Newton step of the whole network that is
            linearized at the members around; with `loss_of` the loss; NaN without terms and loss.
        residual: The root of the loss of the residual terms; NaN without terms.
        extrapolated: Whether the parameter lies outside of the fitted members.
    """

    def __init__(
        self,
        family: ParametricAdapter,
        point: Point,
        vector: np.ndarray,
        extrapolated: bool,
    ) -> None:
        self.parameter = argument(point)
        self.extrapolated = extrapolated
        self._family = family
        self._point = point
        self._vector = vector

    @cached_property
    def indicator(self) -> float:
        """The error indicator. It is computed at the first access, by a few evaluations of the residuals."""
        family = self._family
        if family._estimates is not None:
            around = family._space.around(self._point)
            model = family._copy(self._vector)
            estimate = family._estimates.at(model, self._point, around)
            if not math.isnan(estimate):
                return estimate
        return self._call(family._problem.indicator, self._point)

    @property
    def residual(self) -> float:
        """The root of the loss of the residual terms, computed at each access."""
        terms = self._family._problem.terms(self._point)
        return self._call(residuals_of, terms).norm().item() if terms else math.nan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the solution's values: the outputs of the base with the predicted adapter, or of `solution_of`."""
        return self.apply(lambda solution: solution(*args, **kwargs))

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(solution, *args)` with the predicted adapter, for instance of `jet` or a residual."""
        problem = self._family._problem
        return self._call(lambda model: function(problem.solution(model, self._point), *args))

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        family = self._family
        trainable = family._trainable
        tensors = split_vector(trainable, torch.from_numpy(self._vector))
        values = {name: value.to(trainable[name]) for name, value in tensors.items()}
        # the tensors of the shared model are exchanged meanwhile: one thread at a time
        with family._lock:
            return call_with_parameters(family.model, values, partial(function, family.model), args, {})

    def __repr__(self) -> str:
        return f"Prediction({self.parameter}{', extrapolated' * self.extrapolated})"


class ParametricAdapter:
    """Predict the adapter for each parameter of a family, such as the viscosity of a PDE or the rotation of digits.

    The members share factors, fixed at the HOSVD of the base (`LoTRAConfig(train=["core"], init_weights="hosvd")`), so
    that a member is a point in a linear space: its cores. Between fitted members, which are started from each other
    and moved no more than their residuals ask for, cores are interpolated.

    Args:
        base: A model with KAN layers, trained at a parameter in or near the range. It is copied.
        terms_of: `terms_of(c)` returns the residual terms of [`LevenbergMarquardt`] at the parameter c, a number, or a
            tuple for several parameters. Give the same points at each call. Without it, `fit` takes `train`.
        ranks: The ranks of the cores, as `r` of `LoTRAConfig`.
        solution_of: `solution_of(network, c)` returns the solution that all other functions get as `model`, by default
            the network: for instance `HardConstraint(network, distance, lift)`, where both may depend on c.
        loss_of: `loss_of(model, c)` returns the indicator instead of the estimate: any loss, if there are no terms.
        held_terms_of: The same terms at held-out points, where errors show that fitted points hide. By default they
            lie between the points of the fit, and smooth data in rows are interpolated; terms with other data have
            none.
        values_of: `values_of(model, c)` returns the values whose error is estimated, by default the solution at rows
            of the first term.
        log: Whether the family is smooth in the logarithm of the parameter; one flag, or one for each parameter.
        config: Further arguments of `LoTRAConfig`, such as `target_modules`.

    Raises:
        ValueError: The model has no KAN layer.

    Source: J. S. Hesthaven, G. Rozza and B. Stamm, "Certified Reduced Basis Methods for Parametrized Partial
    Differential Equations", 2016, for snapshots that are chosen by residuals.

    Example:
        >>> from peft_lotra.kan import KAN, jet
        >>> x = torch.linspace(-1, 1, 40).unsqueeze(1)
        >>> ends = torch.tensor([[-1.0], [1.0]])
        >>> def equation(model, x, c):  # -u'' = c cos(x), u = 0 at both ends
        ...     return jet(model, x)[2][0] + c * torch.cos(x)
        >>> def terms_of(c):
        ...     inside = (equation, (x, torch.full_like(x, c)))
        ...     return [inside, (lambda model, x: model(x), ends, 10.0)]
        >>> family = ParametricAdapter(KAN([1, 4, 1]), terms_of, ranks=4)
        >>> report = family.fit([0.5, 1.0, 1.5, 2.0], progress=False)
        >>> prediction = family.predict(1.2)
        >>> prediction(x).shape, prediction.extrapolated
        (torch.Size([40, 1]), False)
    """

    def __init__(
        self,
        base: nn.Module,
        terms_of: TermsOf | None = None,
        ranks: Ranks = 12,
        *,
        solution_of: OfModel | None = None,
        loss_of: OfModel | None = None,
        held_terms_of: TermsOf | None = None,
        values_of: OfModel | None = None,
        log: bool | Sequence[bool] = False,
        **config: Any,
    ) -> None:
        check_without_adapters(base, "base")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Adapters have more parameters")  # many members share them
            lotra_config = LoTRAConfig(r=ranks, train=["core"], init_weights="hosvd", **config)
            model: Any = get_peft_model(copy.deepcopy(base), lotra_config)
        problem = Problem(terms_of, held_terms_of, solution_of, loss_of, values_of)
        self._set(model, log, problem)

    def _set(
        self,
        model: PeftModel,
        log: bool | Sequence[bool],
        problem: Problem,
    ) -> None:
        self.model = model.eval()
        self._problem = problem
        self._lock = LayerLock()
        # taken once, since the model has other tensors while another thread predicts
        self._trainable = trainable_parameters(model)
        size = sum(parameter.numel() for parameter in self._trainable.values())
        self._space = MemberSpace(size, log)
        self._estimates = None
        if problem.terms_of is not None and problem.loss_of is None:
            self._estimates = ErrorEstimates(problem)

    @property
    def parameters(self) -> list[float | tuple[float, ...]]:
        """The parameters of the fitted members, in ascending order."""
        return [argument(member.parameter) for member in self._space.members]

    @property
    def size(self) -> int:
        """The number of coordinates of a member."""
        return self._space.size

    def _copy(self, vector: np.ndarray) -> PeftModel:
        """Return a copy of the model with these coordinates, which no other thread uses."""
        with self._lock, torch.inference_mode(False):
            model = copy.deepcopy(self.model)
            write(model, vector)
        return model

    def _members(self) -> list[Member]:
        if not self._space.members:
            raise ValueError("The family has no members yet: call `fit`.")
        return self._space.members

    def fit(
        self,
        parameters: Iterable[Parameter] | None = None,
        *,
        between: tuple[Parameter, Parameter] | None = None,
        tolerance: float | None = None,
        train: OfModel | None = None,
        max_steps: int = 40,
        max_members: int = 64,
        executor: Executor | None = None,
        progress: bool = True,
    ) -> FamilyReport:
        """Fit members at given parameters, or in a range where the predictions are worst.

        The first member is fitted where the base has the least loss. Others start from the extrapolation of their
        neighbors, outward in strides, and from the interpolation between members. A member
        takes Levenberg-Marquardt steps while its held-out residual falls. One that is far worse than a neighbor is
        fitted again, in smaller strides. In a range, a grid comes first, and then the parameters of finer grids with
        the largest residuals.

        Args:
            parameters: The parameters, numbers or tuples. Those that have a member keep it.
            between: The lowest and the highest parameter of a range, instead of `parameters`.
            tolerance: The largest held-out residual (or loss of `loss_of`) of predictions in the range. By default
                members are added until new ones lower it by a fifth at most.
            train: `train(model, c)` trains the parameters that require a gradient, in place, instead of the terms.
            max_steps: The most steps of a member.
            max_members: The most members of a range.
            executor: An executor of `concurrent.futures` for the fits, by default none: this process. Functions must
                be picklable, and processes started by "spawn" or "forkserver". `Client.get_executor()` of Dask is one.
            progress: Whether to show a bar.

        Returns:
            A table of the members. In `failed`, and in a warning, are the parameters at which a function of yours
            failed, which have no member, and the parameters of members whose residual stays ten times a neighbor's.
            A parameter next to a fitted one, far nearer than others, has no member either.

        Raises:
            ValueError: The arguments contradict each other, or there are neither terms nor `train`.
            RuntimeError: No fit succeeded, or the workers of `executor` died.
        """
        if (parameters is None) == (between is None):
            raise ValueError("Give either `parameters`, a list, or `between`, the bounds of a range.")
        space = copy.copy(self._space)
        if between is None:
            chosen = check_list(parameters, "parameters", "a list of numbers or tuples")
        else:
            chosen = check_list(between, "between", "two parameters, the bounds of a range", 2)
        if not chosen:
            raise ValueError("`parameters` is empty, but must have at least one parameter.")
        dim = len(space.point(chosen[0]))
        points = list(dict.fromkeys(space.point(parameter, dim) for parameter in chosen))
        if between is not None:
            check_count(max_members, "max_members", low=2**dim)  # the corners of the range
        if tolerance is not None:
            check_number(tolerance, "tolerance", "(0, inf)")
        check_count(max_steps, "max_steps", low=0)
        problem = replace(self._problem, train=train)
        has_terms = problem.terms_of is not None
        has_indicator = has_terms or problem.loss_of is not None
        if has_terms == (train is not None) or (between is not None and not has_indicator):
            raise ValueError("Give `terms_of` to the constructor, or `train`; `between` and `train` need `loss_of`.")

        space.spread(points)
        bar = tqdm(unit="member", desc="ParametricAdapter", disable=not progress)
        model = self._copy(np.zeros(self.size))
        fitting = Fitting(model, problem, space, max_steps, executor, bar)
        try:
            with torch.inference_mode(False):  # enables gradients, too
                if between is None:
                    fitting.walk(points)
                else:
                    fitting.search(dim, tolerance, max_members)
        finally:
            self._space = space  # as a whole, since other threads predict meanwhile
        return fitting.report()

    def predict(self, parameter: Parameter, *, force: bool = False) -> Prediction:
        """Interpolate the members, without any training.

        Args:
            parameter: A parameter between the fitted ones.
            force: Whether to extrapolate for a parameter that is not. Look at its indicator then.

        Returns:
            The prediction, a function like the base.

        Raises:
            ValueError: No member was fitted, or the parameter lies outside of them.
        """
        members = self._members()
        space = self._space
        point = space.point(parameter)
        extrapolated = not space.is_inside(point)
        if extrapolated and not force:
            points = [member.parameter for member in members]
            ranges = ", ".join(ranges_of(points))
            raise ValueError(
                f"The parameter {argument(point)} lies outside of the fitted members ({ranges}). Fit the family "
                "there, or pass `force=True` and look at the indicator."
            )
        return Prediction(self, point, space.vector_at(point), extrapolated)

    def refine(
        self,
        parameter: Parameter,
        steps: int = 1,
        *,
        force: bool = False,
    ) -> Prediction:
        """Predict, and take one or more Levenberg-Marquardt steps. The family does not keep them.

        Raises:
            ValueError: As `predict`, or the family has no terms.
        """
        prediction = self.predict(parameter, force=force)
        point = prediction._point
        model = self._copy(prediction._vector)
        if steps:
            with torch.inference_mode(False):  # enables gradients, too
                take_steps(model, self._problem.terms(point), steps, least=steps)
        vector = read(trainable_parameters(model))
        return Prediction(self, point, vector, prediction.extrapolated)

    def calibrate(
        self,
        residuals: Callable[[Any], Tensor],
        *,
        ignore_missing: bool = False,
    ) -> Calibration:
        """Find the parameter in the range whose prediction fits data best, with its standard error.

        The family's own error is found by a few steps of the whole network at and near the estimate, and corrected.
        The standard error includes what may be left of it. Without `terms_of` it is unknown, and a warning says so.

        Args:
            residuals: `residuals(model)` returns the differences (n,) or (n, m) from data with independent errors of
                the same size, for instance `lambda model: model(x) - u`; divide them by the sizes if they differ.
            ignore_missing: Whether to leave out residuals that are NaN, where data are missing.

        Returns:
            The parameter, its standard error (of Laplace's approximation at the optimum), and the prediction there.

        Raises:
            ValueError: The family has no members; the residuals have NaN, infinite numbers or a wrong shape, or two
                evaluations differ; the data ask for a parameter outside of the members, no parameter fits them, or
                they do not determine it: the direction is named.

        Example:
            >>> from peft_lotra.kan import KAN
            >>> x, base = torch.linspace(-1, 1, 50).unsqueeze(1), KAN([1, 4, 1])
            >>> def terms_of(c):
            ...     return [(lambda model, x: model(x) - torch.sin(c * x), x)]
            >>> family = ParametricAdapter(base, terms_of)
            >>> report = family.fit([2.0, 2.5, 3.0, 3.5], progress=False)
            >>> u = torch.sin(2.7 * x) + 0.01 * torch.randn(50, 1)
            >>> calibration = family.calibrate(lambda model: model(x) - u)
            >>> abs(calibration.parameter - 2.7) < 0.05
            True
        """
        self._members()
        check_function(residuals, "residuals", 1)
        network = None

        def residuals_at(point: Point, vector: np.ndarray) -> Any:
            prediction = Prediction(self, point, vector, extrapolated=False)
            return prediction.apply(residuals)

        def refitted_at(point: Point, vector: np.ndarray) -> Any:
            nonlocal network
            network = refit(self._problem, self._copy(vector), network, point)
            return residuals(self._problem.solution(network, point))

        if self._problem.terms_of is None:
            warnings.warn(
                "The family has no residual terms, so its own error is unknown, and the standard error leaves it out. "
                "Give `terms_of` to the family.",
                stacklevel=2,
            )
            refitted_at = residuals_at
        point, covariance, noise = minimize(self._space, residuals_at, refitted_at, ignore_missing)
        errors = np.sqrt(covariance.diagonal()).tolist()
        return Calibration(argument(point), argument(tuple(errors)), covariance, noise, self.predict(point))

    def as_adapter(
        self,
        parameter: Parameter,
        *,
        steps: int = 0,
        force: bool = False,
    ) -> PeftModel:
        """Return a separate PEFT model with the predicted adapter, refined by `steps` steps, to save, merge or serve.

        It is the network, without `solution_of`.
        """
        prediction = self.refine(parameter, steps, force=force)
        return self._copy(prediction._vector)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save the family as one file, the shared factors and the members, with a model card.

        If the process is killed, the family there is the old one or the new one. Text that a person wrote in README.md
        is kept.

        Args:
            folder: The folder, which is made if there is none.

        Raises:
            ValueError: No member was fitted.
        """
        self._members()
        with replacing_files(folder, README) as stage:
            space = self._space  # not earlier: another thread may have saved a later one while this one waited
            model = self._copy(np.zeros(self.size))
            save_family(model, space, Path(stage, FILE))
            write_card(Path(stage, README), space.members)

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        folder: str | os.PathLike,
        terms_of: TermsOf | None = None,
        *,
        solution_of: OfModel | None = None,
        loss_of: OfModel | None = None,
        held_terms_of: TermsOf | None = None,
        values_of: OfModel | None = None,
        check_base: str = "error",
        **hub_kwargs: Any,
    ) -> ParametricAdapter:
        """Load a family.

        Args:
            base: The base that it was fitted on. It is copied.
            folder: A folder, or a repository on the Hub.
            terms_of, solution_of, loss_of, held_terms_of, values_of: As for the constructor; they are not saved.
                Without `terms_of` and `loss_of` indicators are NaN.
            check_base: The reaction to another base, `"error"`, `"warn"` or `"ignore"`.
            hub_kwargs: Arguments of `huggingface_hub.hf_hub_download`, e.g. `revision` and `token`.

        Raises:
            ValueError: The file is damaged or altered, of a newer version, or its family is on another base or grid.
            FileNotFoundError: The folder holds no family.
        """
        path = Path(folder, FILE)
        if not path.parent.is_dir():
            path = Path(hf_hub_download(str(folder), FILE, **hub_kwargs))
        model, saved = load_family(copy.deepcopy(base), path, check_base)
        problem = Problem(terms_of, held_terms_of, solution_of, loss_of, values_of)
        family = cls.__new__(cls)
        family._set(model, saved.log, problem)
        family._space.members = list(saved.report)
        family._space.spread([])
        return family

    def _write_for_hub(self, folder: str, repo_id: str) -> None:
        """Write the file and the card that `peft_lotra.push_to_hub` uploads."""
        self.save_pretrained(folder)
