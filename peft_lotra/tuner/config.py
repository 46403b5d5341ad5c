# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key

from ..hub.card import write_card
from ..layers.coefficients import CoefficientTensor
from ..modules.checks import check_number
from ..modules.folders import STAGE
from ..tucker import (
    Ranks,
    Tucker,
    check_ranks,
    component_shapes,
    full_shape,
)


ALL_KAN = "all-kan"
_FORMAT = 1  # of the files; incremented by a version that changes their meaning

# A wrong value of these would be ignored or misread.
_CHOICES = {
    "adapt_residual": (True, False),
    "init_weights": (True, False, "gradient", "hosvd"),
    "storage": (None, "float16", "bfloat16"),
    "check_base": (None, "error", "warn", "ignore"),
}


class Source(NamedTuple):
    """The folder or repository that a config was read from, and the arguments that locate the file in it."""

    path: str
    subfolder: str | None
    hub_kwargs: dict[str, Any]


@dataclass
class LoTRAConfig(PeftConfig):
    """
    The options of a LoTRA adapter: which layers it adapts, how many parameters it has, and how it starts.

    The update of a coefficient tensor (out, in, basis) is `alpha * core x1 factor_out x2 factor_in x3 factor_basis`.
    A convolutional layer has a fourth mode, the positions of its kernel, and a `factor_kernel`. `alpha` is not divided
    by a rank, as in LoRA, since the initialization normalizes the update for any rank.

    Args:
        r (`Optional[Union[int, str, tuple[Union[int, str], ...]]]`):
            The ranks (out, in, basis) of the update, or (out, in, basis, kernel), whose last entry only counts for
            convolutional layers. A single rank counts for all modes. Three ranks leave the kernel full. A rank
            above the size of its mode is capped. A full mode, `"full"` or a rank that equals the size, has no factor.
            The default `None` means `("full", "full", 1)`, a matrix (out, in) times one learned shape of the
            functions.
        budget (`Optional[float]`):
            The number of parameters as a share of the coefficients of all adapted layers, above 0 and up to 1. It
            replaces `r`. All layers get the ranks `("full", "full", k)`, k learned shapes with a full matrix each. If
            not even one fits, they get `(k, k, 1)`. k is the largest that fits. `rank_pattern` may fix the ranks of
            some layers.
        alpha (`float`):
            The scale of the update.
        target_modules (`Optional[Union[list[str], str]]`):
            The names of the KAN layers to adapt, exactly or as suffixes; a string is a regex, such as
            `r"layers\\.[02]"`. The default `None`, and `"all-kan"`, take every KAN layer that is recognized (see
            `find_kan_layers`).
        exclude_modules (`Optional[Union[list[str], str]]`):
            The names of the modules to leave alone, exactly or as suffixes; a string is a regex.
        rank_pattern (`dict`):
            The mapping from layer names or regexes to ranks that differ from `r`.
        alpha_pattern (`dict`):
            The mapping from layer names or regexes to scales that differ from `alpha`.
        modules_to_save (`Optional[list[str]]`):
            The modules besides the adapted layers that are trained and saved whole, for instance a new head, or a
            batch norm, whose running statistics are otherwise frozen.
        init_weights (`bool` or `"hosvd"`):
            The initialization. `True` draws random factors. `"hosvd"` takes the leading singular vectors of the
            coefficients of the base layer. In both cases the update is zero, so that the adapted model equals its
            base. `False` draws a random update, for tests. [`start_from_gradient`] initializes an
            existing adapter, and records it as `"gradient"`.
        train (`Optional[list[str]]`):
            The components to train, among `"core"`, `"factor_out"`, `"factor_in"`, `"factor_basis"` and
            `"factor_kernel"`. The default `None` trains all. Frozen components keep their initial values, and are
            saved with the adapter. `train=["core"], init_weights="hosvd"` trains a core on fixed factors.
        adapt_residual (`bool`):
            Whether to adapt the weights of the base branch too, as one more slice of the basis mode.
        storage (`Optional[str]`):
            The dtype of the components in a file. `"float16"` or `"bfloat16"` halves its size. Loading restores the
            usual dtype. `None` keeps their dtype. Updates change by about 0.04 % in float16, and by
            0.3 % in bfloat16. Values above 65,504 do not fit into float16, and are an error. Values below 6e-5 lose
            digits, which is a warning if a component changes by more than 1 %.
        check_base (`Optional[str]`):
            The reaction to a base that differs from the one that an adapter was trained on, in
            `PeftModel.from_pretrained(base, folder, check_base="error")`. By default (`None`) a different grid is an
            error, and different coefficients are a warning. `"error"`, `"warn"` and `"ignore"` apply to both. A
            different kind or shape of a layer is always an error. The choice is not saved.
        base_layers (`Optional[dict[str, dict]]`):
            Internal. In a file, the kind, shape, grid and parameters of each adapted layer, which are compared with
            the model when the adapter is loaded.
        weights_sha256 (`Optional[str]`):
            Internal. In a file, the SHA-256 of the tensors. A different one is a warning.
        saved_with (`Optional[list[str]]`):
            Internal. In a file, the name of the adapter, then the adapters of other methods that the same save wrote.
            `load_adapters` loads these.
        lotra_format (`int`):
            Internal. In a file, the version of its format. A different one is an error.

    Raises:
        ValueError: A value cannot be used.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> config = LoTRAConfig(r=(4, 4, 3), rank_pattern={"layers.0": 2})
        >>> [layer.lotra_r["default"] for layer in get_peft_model(KAN([8, 8, 8]), config).layers]
        [(2, 2, 2), (4, 4, 3)]
    """

    r: Ranks | None = None
    budget: float | None = None
    alpha: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    init_weights: bool | Literal["gradient", "hosvd"] = True
    train: list[str] | tuple[str, ...] | str | None = None
    adapt_residual: bool = True
    storage: Literal["float16", "bfloat16"] | None = None
    check_base: Literal["error", "warn", "ignore"] | None = None
    base_layers: dict[str, dict[str, Any]] | None = None
    weights_sha256: str | None = None
    saved_with: list[str] | None = None
    lotra_format: int = _FORMAT

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["LOTRA"]
        if self.lotra_format != _FORMAT:
            raise ValueError(
                f"`lotra_format` is {self.lotra_format!r:.100}, and this version of peft-lotra reads {_FORMAT}. The "
                "file was written by a newer version: upgrade peft-lotra."
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {value!r:.200}.")
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, (list, tuple)):
                setattr(self, name, set(names))
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]

        if self.r is not None:
            self.r = check_ranks(self.r)
        if self.budget is not None:
            self.budget = check_number(self.budget, "budget", "(0, 1]")
            if self.r is not None:
                raise ValueError(f"Pass one of `r` and `budget`; got r={self.r} and budget={self.budget}.")
        self.rank_pattern = {key: check_ranks(r, "rank_pattern") for key, r in self.rank_pattern.items()}
        # as floats, since JSON has none of numpy
        self.alpha = _check_scale(self.alpha, "alpha")
        self.alpha_pattern = {key: _check_scale(alpha, "alpha_pattern") for key, alpha in self.alpha_pattern.items()}
        if not isinstance(self.base_layers, dict | None):
            raise ValueError(
                f"`base_layers` is {self.base_layers!r:.100}, but must be a dict with the record of each layer, as "
                "`save_pretrained` writes it."
            )
        if self.train is not None:
            trained = {self.train} if isinstance(self.train, str) else set(self.train)
            if not trained or not trained <= set(Tucker._fields):
                raise ValueError(f"`train` must have some of {Tucker._fields}, got {self.train!r:.200}.")
            self.train = [name for name in Tucker._fields if name in trained]

        # These are no fields, so they are neither saved nor compared. PEFT overwrites `target_modules` by the names of
        # the layers, while the object may serve several models.
        self.targets_all_kan = self.target_modules in (None, ALL_KAN)
        self.source: Source | None = None  # of tensors that are still to be read
        self.allows_other_shapes = False  # of these tensors: the model then keeps its values
        self.names_in_model: dict[str, str] = {}  # of the layers that a file names
        # What a save writes: the ranks of layers for which `r` and `rank_pattern` do not say them, and `base_layers`.
        # The field `base_layers` would mark this as the configuration of a file.
        self.ranks_to_record: dict[str, Ranks] = {}
        self.layers_to_record: dict[str, dict[str, Any]] | None = None

    @property
    def is_from_file(self) -> bool:
        """Whether a file records the layers, and holds the components."""
        return self.base_layers is not None

    @property
    def companions(self) -> list[str]:
        """The names of the adapters of other methods that were saved with this one."""
        return (self.saved_with or [])[1:]

    def alpha_of(self, name: str) -> float:
        """Return the `alpha` of a layer of this name."""
        key = get_pattern_key(list(self.alpha_pattern), name)
        return self.alpha_pattern.get(key, self.alpha)

    def adapted_shape(self, tensor: CoefficientTensor) -> tuple[int, ...]:
        """Return the shape of the update of a layer, with the base branch if it is adapted."""
        return full_shape(tensor) if self.adapt_residual else tensor.shape

    def shapes_of(self, name: str, tensor: CoefficientTensor) -> dict[str, tuple[int, ...]]:
        """Return the `component_shapes` of the update of the layer of this name."""
        key = get_pattern_key(list(self.rank_pattern), name)
        ranks = self.rank_pattern.get(key, self.r)
        if ranks is None:
            ranks = ("full", "full", 1)
        return component_shapes(ranks, self.adapted_shape(tensor))

    def spend_budget(self, targets: Mapping[str, Any]) -> None:
        """Write the ranks that `budget` allows into `rank_pattern`, by size, for the layers that it does not name.

        Raises:
            ValueError: The budget does not suffice for ranks of 1. This object is then of no use.
        """
        if self.budget is None or self.is_from_file or not targets:  # PEFT names what matches nothing
            return
        shapes = [self.adapted_shape(target.tensor) for target in targets.values()]
        total = sum(map(prod, shapes))

        most_functions = max(shape[2] for shape in shapes)
        largest = max(map(max, shapes))
        candidates: list[Ranks] = [("full", "full", count) for count in range(most_functions, 0, -1)]
        candidates += [(rank, rank, 1) for rank in range(largest, 0, -1)]
        smallest = total
        for r in candidates:
            self.r = r
            parameters = 0
            for name, target in targets.items():
                components = self.shapes_of(name, target.tensor)
                parameters += sum(map(prod, components.values()))
            smallest = min(smallest, parameters)
            if parameters <= self.budget * total + 1e-6:
                chosen = {pattern_key(name): r for name in targets}
                # the first key that matches holds
                self.rank_pattern = {**self.rank_pattern, **chosen, **self.rank_pattern}
                self.r = None
                return
        raise ValueError(
            f"`budget` is {self.budget}, but the smallest ranks already take {smallest} of the {total} coefficients. "
            f"Pass at least {ceil(1e4 * smallest / total) / 1e4}."
        )

    def frozen_and_zero(
        self,
        components: Iterable[str],
    ) -> tuple[tuple[str, ...], str]:
        """Return the frozen components, and the trainable component that is initialized to zero."""
        trained = [name for name in components if self.train is None or name in self.train]
        frozen = tuple(name for name in components if name not in trained)
        preferred = ("core", "factor_out") if self.init_weights == "hosvd" else ("factor_out", "core")
        zero = [name for name in (*preferred, *trained) if name in trained]
        return frozen, (*zero, "core")[0]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ):
        path = os.fspath(pretrained_model_name_or_path)
        hub_kwargs, class_kwargs, model_kwargs = cls._split_kwargs(kwargs)
        folder = os.path.join(path, subfolder or "")
        stage = _find_staged_config(folder)
        try:
            if stage is None:
                config = super().from_pretrained(path, subfolder=subfolder, **hub_kwargs, **class_kwargs)
            else:
                config = super().from_pretrained(stage, **class_kwargs)
            if not isinstance(config, LoTRAConfig):
                raise ValueError(f"it is of the type {config.peft_type}, and not of LoTRA")
        # of files that are cut, altered or of another method
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            kind = TypeError if "missing required keys" in str(error) else ValueError  # as in PEFT
            raise kind(f"The configuration of the adapter at {folder} cannot be read: {error}") from error
        config.source = Source(path, subfolder, hub_kwargs)
        config.allows_other_shapes = bool(model_kwargs.get("ignore_mismatched_sizes"))
        return config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["check_base"]  # chosen when an adapter is loaded
        for name, value in values.items():
            if isinstance(value, set):
                values[name] = sorted(value)  # else another order in each process
        recorded = {pattern_key(name): ranks for name, ranks in self.ranks_to_record.items()}
        values["rank_pattern"] = {**recorded, **values["rank_pattern"], **recorded}
        values["base_layers"] = self.base_layers if self.layers_to_record is None else self.layers_to_record
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with the SHA-256 of the tensors in the same folder, and the model card."""
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            self.weights_sha256 = _hash_file(weights)
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory)


def _check_scale(value: Any, argument: str) -> float:
    """Return a scale as a float; raise a ValueError unless it is finite and not 0, so that it can be divided by."""
    scale = check_number(value, argument, "(-inf, inf)")
    if scale == 0:
        raise ValueError(f"`{argument}` has the scale 0, with which an adapter would have no effect: leave it out.")
    return scale


def _hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _find_staged_config(folder: str) -> str | None:
    """Return the stage of a save that was killed after it had moved the tensors, but not their configuration."""
    path = Path(os.path.abspath(folder))
    weights = path / SAFETENSORS_WEIGHTS_NAME
    for stage in (path / STAGE, path.parent / STAGE / path.name):
        config = stage / CONFIG_NAME
        are_present = config.is_file() and weights.is_file()
        if are_present and _hash_file(weights) in config.read_text(encoding="utf-8"):
            return str(stage)
    return None


def pattern_key(name: str) -> str:
    """Return a key of `rank_pattern` that matches only this layer; PEFT reads keys as regexes of the end of a name."""
    return "^" + re.escape(name)
