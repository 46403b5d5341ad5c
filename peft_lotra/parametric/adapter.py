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
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path as Folder
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..modules.calls import call_with_parameters
from ..modules.checks import as_number, check_count, check_function, check_path
from ..tucker import Ranks
from ..tuner.config import LoTRAConfig
from .estimate import ErrorEstimates
from .fitting import Fitting
from .members import Member, Point, Problem, argument, named, read, take_steps, write
from .path import Path
from .report import FamilyReport, card_of
from .storage import FILE, Contents, RunFolder, digest, load_family, save_family


Parameter = float | Sequence[float]


class Prediction:
    """The member of a family at one parameter, predicted or refined.

    Attributes:
        parameter: The parameter, a number or a tuple.
        indicator: An estimate of the relative error: what one Gauss-Newton step of the whole network, linearized at
            the nearest member, would change. What `loss_of` returns if given; NaN without both.
        residual: The root of the loss of the residual terms; NaN without terms.
        extrapolated: Whether the parameter lies outside of the fitted members.
    """

    def __init__(self, family: ParametricAdapter, point: Point, vector: np.ndarray, extrapolated: bool) -> None:
        self.parameter = argument(point)
        self.extrapolated = extrapolated
        self._family, self._point, self._vector = family, point, vector
        self._tensors = named(family.model, vector)
        self._indicator: float | None = None

    @property
    def indicator(self) -> float:
        """Computed at the first access: an evaluation of the residuals, and the first time near a member some more."""
        if self._indicator is None:
            self._indicator = self._family._indicate(self)
        return self._indicator

    @property
    def residual(self) -> float:
        """Computed at each access."""
        return float(self.apply(replace(self._family._problem, loss_of=None).indicator, self._point))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the base with the predicted adapter."""
        return self.apply(lambda model: model(*args, **kwargs))

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, *args)` with the predicted adapter in the model, for instance `jet` or a residual."""
        model = self._family.model
        return call_with_parameters(model, self._tensors, partial(function, model), args, {})

    def __repr__(self) -> str:
        known = "" if self._indicator is None else f", indicator={self._indicator:.3g}"
        return f"Prediction({self.parameter}{known}{', extrapolated' * self.extrapolated})"


class ParametricAdapter:
    """Adapters of one base for all parameters of a family: a PDE and its viscosity, digits and their rotation.

    The members share factors, fixed at the HOSVD of the base (`LoTRAConfig(train=["core"], init_weights="hosvd")`), so
    that a member is a point in a linear space: its cores. Between fitted members, which are started from each other
    and moved no more than their residuals ask for, cores are interpolated.

    Args:
        base: A model with KAN layers, trained at a parameter in or near the range. It is copied.
        terms_of: `terms_of(c)` returns the residual terms of [`LevenbergMarquardt`] at the parameter c, a number, or a
            tuple for several parameters. Give the same points at each call. Without it, `fit` takes `train`.
        ranks: The ranks of the cores, as `r` of `LoTRAConfig`.
        loss_of: `loss_of(model, c)` returns what indicates errors, instead of an estimate: any loss where there are no
            terms.
        held_terms_of: The same terms at points that are not fitted, where errors show that fitted points hide. By
            default estimates use the terms at points between those of the fit, where smooth data in rows are
            interpolated; terms with other data have none.
        values_of: `values_of(model, c)` returns the values whose error is estimated: the solution at some points. By
            default they are the outputs at rows of the first term; give it where the solution is not the output
            itself, for instance a product of it that is zero on the boundary.
        log: Whether the family is smooth in the logarithm of the parameter; one flag, or one for each parameter.
        config: A `LoTRAConfig` for all else (`target_modules`, ...). It trains one component alone.

    Raises:
        TypeError: `base` is no `nn.Module`, or `terms_of` or `loss_of` no function.
        ValueError: The model has no KAN layer, or `config` trains several components, whose updates do not add up.

    Source: J. S. Hesthaven, G. Rozza and B. Stamm, "Certified Reduced Basis Methods for Parametrized Partial
    Differential Equations", 2016, for the greedy choice by residuals.

    Example:
        >>> from peft_lotra.kan import KAN, jet
        >>> x, ends = torch.linspace(-1, 1, 40).unsqueeze(1), torch.tensor([[-1.0], [1.0]])
        >>> def equation(model, x, c):  # -u'' = c cos(x), u = 0 at both ends
        ...     return jet(model, x)[2][0] + c * torch.cos(x)
        >>> def terms_of(c):
        ...     return [(equation, (x, torch.full_like(x, c))), (lambda model, x: model(x), ends, 10.0)]
        >>> family = ParametricAdapter(KAN([1, 4, 1]), terms_of, ranks=4)
        >>> report = family.fit([0.5, 1.0, 1.5, 2.0], progress=False)
        >>> prediction = family.predict(1.2)
        >>> prediction(x).shape, prediction.extrapolated
        (torch.Size([40, 1]), False)
    """

    def __init__(
        self,
        base: nn.Module,
        terms_of: Callable[[Any], Iterable] | None = None,
        ranks: Ranks = 8,
        *,
        loss_of: Callable[[nn.Module, Any], Any] | None = None,
        held_terms_of: Callable[[Any], Iterable] | None = None,
        values_of: Callable[[nn.Module, Any], Tensor] | None = None,
        log: bool | Sequence[bool] = False,
        config: LoTRAConfig | None = None,
    ) -> None:
        functions = {"terms_of": terms_of, "loss_of": loss_of, "held_terms_of": held_terms_of, "values_of": values_of}
        _check_functions(base, **functions)
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise ValueError("`base` has adapters already: pass the bare model, or what `merge_and_unload` returns.")
        if config is not None and not isinstance(config, LoTRAConfig):
            raise TypeError(f"`config` is of type {type(config).__name__}, but must be a LoTRAConfig.")
        config = copy.deepcopy(config) if config is not None else LoTRAConfig(r=ranks)
        if config.modules_to_save:
            raise ValueError(
                f"`config` has `modules_to_save` ({', '.join(config.modules_to_save)}), whole modules, which a family "
                "of updates cannot have: members would start from modules that are zero."
            )
        if config.train is None and config.init_weights is True:
            config = replace(config, train=["core"], init_weights="hosvd")
        if len(config.train or ()) != 1:
            raise ValueError(
                f"`config` trains {config.train or 'all components'}, whose product is not linear in them, so that "
                'members could not be interpolated. Leave `train` out, or pass `train=["core"]`.'
            )
        # a tensor that is made in inference mode could never be trained
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Adapters have more parameters")  # which are shared by many members
            model = cast(PeftModel, get_peft_model(copy.deepcopy(base), config))
        self._set(model, log, **functions)

    def _set(
        self,
        model: PeftModel,
        log: bool | Sequence[bool],
        terms_of: Any,
        loss_of: Any,
        held_terms_of: Any,
        values_of: Any,
    ) -> None:
        self.model = model.eval()
        self._problem = Problem(terms_of, loss_of)
        self._path = Path(len(read(model)), log)
        self._estimates = None
        if terms_of is not None and loss_of is None:
            self._estimates = ErrorEstimates(self.model, terms_of, held_terms_of, values_of)

    def _indicate(self, prediction: Prediction) -> float:
        """The indicator of a prediction."""
        if self._estimates is None:
            return float(prediction.apply(self._problem.indicator, prediction._point))
        nearest = self._path.nearest(prediction._point)
        estimate = self._estimates.at(prediction._point, prediction._vector, nearest)
        return prediction.residual if math.isnan(estimate) else estimate

    @property
    def parameters(self) -> list[float | tuple[float, ...]]:
        """The parameters of the fitted members, in ascending order."""
        return self._path.parameters

    @property
    def size(self) -> int:
        """The number of coordinates of a member."""
        return self._path.size

    def fit(
        self,
        parameters: Iterable[Parameter] | None = None,
        *,
        between: tuple[Parameter, Parameter] | None = None,
        tolerance: float | None = None,
        train: Callable[[nn.Module, Any], Any] | None = None,
        steps: int = 3,
        max_steps: int = 12,
        max_members: int = 64,
        executor: Executor | None = None,
        folder: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> FamilyReport:
        """Fits members at given parameters, or in a range where the predictions are worst.

        The first member is that at which the base itself has the least loss. Others start from the extrapolation of
        their neighbors, outward in strides, and from the interpolation where there are members on all sides. In a
        range, the corners come first, and then, in rounds, the parameters with the largest residuals.

        Args:
            parameters: The parameters, numbers or tuples.
            between: The lowest and the highest parameter of a range, instead of `parameters`.
            tolerance: The residual (or what `loss_of` returns) that predictions may have in the range. By default
                members are added until they bring it down by a fifth at most.
            train: `train(model, c)` trains the parameters that require a gradient, in place, instead of the terms.
            steps, max_steps: The least number of Levenberg-Marquardt steps of a member, and the largest, which is
                taken while steps halve the loss.
            max_members: The most members of a range.
            executor: An executor of `concurrent.futures` for the fits, by default none: this process. Functions must
                be picklable, and processes started by "spawn" or "forkserver". `Client.get_executor()` of Dask is one.
            folder: Where members are written as they are fitted. A later call with the same folder fits none of them
                again. The terms are not compared: give another folder for other terms.
            progress: Whether to show a bar.

        Returns:
            A table of the members. Parameters at which a function of yours failed are in `failed`, with the errors,
            and in a warning; all others are fitted.

        Raises:
            ValueError: The arguments contradict each other or are out of range; there are neither terms nor `train`;
                another run is writing to `folder`, or it belongs to another family.
            RuntimeError: No fit succeeded, or the workers of `executor` died.
        """
        if (parameters is None) == (between is None):
            raise ValueError("Give either `parameters`, a list, or `between`, the bounds of a range.")
        for name, given in (("parameters", parameters), ("between", between)):
            if given is not None and (isinstance(given, (str, bytes)) or not isinstance(given, Iterable)):
                raise TypeError(f"`{name}` is {given!r:.100}, but must be a list of numbers, or of tuples of them.")
        between = None if between is None else cast(tuple, tuple(between))
        if between is not None and (len(between) != 2 or len(self._path.distinct(between)) != 2):
            raise ValueError(f"`between` is {between!r:.100}, but must be (lowest, highest), two parameters.")
        if tolerance is not None and (between is None or not as_number(tolerance) > 0):
            raise ValueError(f"`tolerance` is {tolerance!r:.50}, but must be above 0, and is for a range (`between`).")
        for name, value, low in (
            ("steps", steps, 1),
            ("max_steps", max_steps, steps),
            ("max_members", max_members, 1),
        ):
            if type(value) is not int or value < low:
                raise ValueError(f"`{name}` is {value!r:.100}, but must be an int of at least {low}.")
        if executor is not None and not hasattr(executor, "submit"):
            raise TypeError(f"`executor` is {executor!r:.100}, but must be an executor of `concurrent.futures`.")
        if folder is not None:
            check_path(folder, "folder")
        if train is not None:
            check_function(train, "train")
        if (train is None) == (self._problem.terms_of is None):
            raise ValueError(
                "Members are fitted to residual terms (`terms_of` of the constructor) or by `train`: give one of them."
            )
        if between is not None and train is not None and self._problem.loss_of is None:
            raise ValueError("A range is searched by indicators: give `loss_of` to the constructor, or `parameters`.")
        self._problem = replace(self._problem, train=train, steps=steps, max_steps=max_steps)
        points = self._path.distinct(parameters if parameters is not None else cast(tuple, between))
        if between is not None and max_members < 2 ** len(points[0]):
            raise ValueError(
                f"`max_members` is {max_members}, but the corners alone of a range of {len(points[0])} parameters are "
                f"{2 ** len(points[0])} members."
            )
        self._path.spread(points)
        run = RunFolder(folder, self._record()) if folder is not None else None
        opened = run.opened() if run is not None else nullcontext({})
        with torch.inference_mode(False), torch.enable_grad(), opened as known:
            fitting = Fitting(self.model, self._problem, self._path, executor, run, known, progress)
            if between is None:
                fitting.walk(points)
            else:
                fitting.search(len(points[0]), tolerance, max_members)
        return fitting.report()

    def predict(self, parameter: Parameter, *, force: bool = False) -> Prediction:
        """Interpolates the members; no training.

        Args:
            parameter: A parameter between the fitted ones.
            force: Whether to extrapolate for a parameter that is not. Look at its indicator then.

        Returns:
            The prediction, a function like the base.

        Raises:
            ValueError: No member was fitted, or the parameter lies outside of them.
        """
        if not self._path.members:
            raise ValueError("The family has no members yet: call `fit`.")
        point = self._path.point(parameter, len(self._path.members[0].parameter))
        extrapolated = not self._path.is_inside(point)
        if extrapolated and not force:
            raise ValueError(
                f"The parameter {argument(point)} lies outside of the fitted members "
                f"({', '.join(self._path.ranges())}), where predictions are bad. Fit the family there, or pass "
                "`force=True` and look at the indicator."
            )
        return Prediction(self, point, self._path.vector_at(point), extrapolated)

    def refine(self, parameter: Parameter, steps: int = 1, *, force: bool = False) -> Prediction:
        """The prediction after one or more Levenberg-Marquardt steps, which are not kept.

        Raises:
            ValueError: As `predict`, or the family has no terms.
        """
        steps = check_count(steps, "steps")
        prediction = self.predict(parameter, force=force)
        if self._problem.terms_of is None:
            raise ValueError("The family has no residual terms, with which a prediction could be refined.")
        with torch.inference_mode(False), torch.enable_grad():
            write(self.model, prediction._vector)
            take_steps(self.model, list(self._problem.terms_of(prediction.parameter)), steps, steps)
        return Prediction(self, prediction._point, read(self.model), prediction.extrapolated)

    def as_adapter(self, parameter: Parameter, *, steps: int = 0, force: bool = False) -> PeftModel:
        """A PEFT model of its own, with the predicted adapter, refined by `steps` steps: to save, merge or serve."""
        steps = check_count(steps, "steps", low=0)
        prediction = self.refine(parameter, steps, force=force) if steps else self.predict(parameter, force=force)
        with torch.inference_mode(False):
            model = copy.deepcopy(self.model)
            write(model, prediction._vector)
        return model

    def save_pretrained(self, folder: str | os.PathLike, *, modes: int | None = None) -> None:
        """Saves the family as one file, with a model card.

        The factors and the modes of the members are stored once, and a member as its coordinates in the modes.

        Args:
            folder: The folder, which is made if there is none.
            modes: The most modes, by default as many as members, without loss.

        Raises:
            ValueError: No member was fitted, or `modes` is no positive int.
        """
        if not self._path.members:
            raise ValueError("The family has no members yet: call `fit` before it is saved.")
        modes = None if modes is None else check_count(modes, "modes")
        check_path(folder, "folder")
        folder = Folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_family(self.model, self._contents(), folder / FILE, modes)
        card_of(self.model, self._contents(), folder / FILE).save(folder / "README.md")

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        folder: str | os.PathLike,
        terms_of: Callable[[Any], Iterable] | None = None,
        *,
        loss_of: Callable[[nn.Module, Any], Any] | None = None,
        held_terms_of: Callable[[Any], Iterable] | None = None,
        values_of: Callable[[nn.Module, Any], Tensor] | None = None,
        check_base: str = "error",
        **hub_kwargs: Any,
    ) -> ParametricAdapter:
        """Loads a family.

        Args:
            base: The base that it was fitted on. It is copied.
            folder: A folder, or a repository on the Hub.
            terms_of, loss_of, held_terms_of, values_of: As for the constructor; they are not saved. Without `terms_of`
                and `loss_of` indicators are NaN.
            check_base: What happens on another base, `"error"`, `"warn"` or `"ignore"`.
            hub_kwargs: Those of `huggingface_hub.hf_hub_download`, e.g. `revision` and `token`.

        Raises:
            ValueError: The file is damaged, or its family is on another base or grid.
        """
        functions = {"terms_of": terms_of, "loss_of": loss_of, "held_terms_of": held_terms_of, "values_of": values_of}
        _check_functions(base, **functions)
        check_path(folder, "folder")
        path = Folder(folder, FILE)
        if not Folder(folder).is_dir():
            path = Folder(hf_hub_download(str(folder), FILE, **hub_kwargs))
        elif not path.is_file():
            raise ValueError(f"{folder} holds no family: it has no {FILE}.")
        model, contents = load_family(copy.deepcopy(base), path, check_base)
        family = cls.__new__(cls)
        family._set(model, contents.log, **functions)
        rows = zip(contents.parameters, contents.vectors, contents.indicators, strict=True)
        members = [Member(point, vector, math.nan, indicator, 0, 0.0) for point, vector, indicator in rows]
        family._path.add(members)
        family._path.spread([])
        return family

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Pushes the file and the card of the family to the Hugging Face Hub, as one commit."""
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            files = [CommitOperationAdd(path.name, str(path)) for path in sorted(Folder(folder).iterdir())]
            message = commit_message or "Upload a family of LoTRA adapters"
            return api.create_commit(repo_id, files, commit_message=message, revision=revision)

    def _contents(self) -> Contents:
        members, flags = self._path.members, self._path.scale.log
        return Contents(self._path.vectors, [m.parameter for m in members], [m.indicator for m in members], flags)

    def _record(self) -> dict[str, Any]:
        """What members in a folder are compared by."""
        write(self.model, np.zeros(self.size))
        state = {name: tensor for name, tensor in self.model.state_dict().items() if isinstance(tensor, Tensor)}
        kind = "train" if self._problem.train is not None else "terms"
        settings = {"kind": kind, "steps": self._problem.steps, "max_steps": self._problem.max_steps}
        return {"base": digest(state), "log": self._path.log, "coordinates": self.size, **settings}


def _check_functions(base: Any, **functions: Any) -> None:
    if not isinstance(base, nn.Module):
        raise TypeError(f"`base` is a {type(base).__name__}, but must be an nn.Module.")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` is a {type(function).__name__}, but must be a function.")
