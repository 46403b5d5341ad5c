# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from math import ceil, prod
from typing import Any, Literal, NamedTuple, TypeVar

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
    cap_ranks,
    check_ranks,
    component_shapes,
    full_shape,
)


ALL_KAN = "all-kan"
_FINITE = "(-inf, inf)"
_FORMAT = 1  # of the files; a version that changes what they mean counts it up

Config = TypeVar("Config", bound=type)

# What users of LoRA may pass, and what LoTRA has instead.
_NAMES_IN_LORA = {
    **dict.fromkeys(("rank", "ranks", "lora_r"), "The ranks are `r`, an int or (out, in, basis)."),
    "lora_alpha": "The scale is `alpha`. LoTRA does not divide it by the rank: pass `alpha = lora_alpha / r`.",
    **dict.fromkeys(("dropout", "lora_dropout"), "Pass `rank_dropout` (components) or `module_dropout` (layers)."),
    "init_lora_weights": "How an adapter starts is `init_weights`.",
    "use_rslora": "LoTRA scales the update by `alpha` alone, for any rank: leave it out.",
    "bias": "LoTRA adapts no biases: leave it out, or train whole modules by `modules_to_save`.",
    "target_parameters": "LoTRA finds the parameters of a KAN layer itself: name the layers in `target_modules`.",
}

# Of these, a wrong value would be ignored or misread.
_CHOICES = {
    "adapt_residual": (True, False),
    "init_weights": (True, False, "gradient", "training", "hosvd"),
    "storage": (None, "float16", "bfloat16"),
    "check_base": (None, "error", "warn", "ignore"),
}


def _is_record(value: Any) -> bool:
    """Return whether a value may describe a base layer."""
    if not isinstance(value, dict) or not isinstance(value.get("family"), str):
        return False
    lists = (value.get("shape"), value.get("grid", []), value.get("parameters", []))
    return all(isinstance(sizes, list) and {float, int}.issuperset(map(type, sizes)) for sizes in lists)


class Source(NamedTuple):
    """Where a config was read from: the folder or repository, and what locates the file there."""

    path: str
    subfolder: str | None
    hub_kwargs: dict[str, Any]
    ignore_mismatched_sizes: bool


def _with_hints(cls: Config) -> Config:
    """Adds to the error of an unknown argument, where it is one of LoRA's, which one LoTRA has instead."""
    init = cls.__init__

    @wraps(init)  # PEFT reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() & _NAMES_IN_LORA.keys():
            # PEFT looks for the first half of this text when it drops unknown entries of a file
            raise TypeError(f"LoTRAConfig got an unexpected keyword argument {name!r}. {_NAMES_IN_LORA[name]}")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@_with_hints
@dataclass
class LoTRAConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`LoTRAModel`].

    The update of a coefficient tensor (out, in, basis) is `alpha * core x1 factor_out x2 factor_in x3 factor_basis`.
    A convolutional layer has a fourth mode, the positions of its kernel, and a `factor_kernel`. Unlike LoRA's, the
    update is scaled by `alpha` alone: the initialization normalizes it for any rank.

    Args:
        r (`Optional[Union[int, str, tuple[Union[int, str], ...]]]`):
            The ranks (out, in, basis) of the update, or (out, in, basis, kernel), of which the last counts for
            convolutional layers alone. A single rank counts for all modes. Three ranks leave the kernel full. A rank
            above the size of its mode is capped. A full mode, `"full"` or a rank that equals the size, has no factor:
            `("full", "full", 1)`, which `None` stands for, is a matrix (out, in) times one learned shape of the
            functions. On Slim layers, `None` stands for 4.
        budget (`Optional[float]`):
            In place of `r`, the number of parameters as a share of the coefficients of all adapted layers, above 0 and
            up to 1. All layers get the ranks `("full", "full", k)`, k learned shapes with a full matrix each, or where
            not even one fits, `(k, k, 1)`, with the largest k. `rank_pattern` may fix the ranks of some layers.
            [`start_from_training`] chooses all ranks anew, by the data.
        alpha (`float`):
            The factor that the update is multiplied by.
        target_modules (`Optional[Union[list[str], str]]`):
            The names of the KAN layers to adapt, exactly or as suffixes; a string is a regex. `"all-kan"`, which
            `None` (the default) stands for, takes every KAN layer that is recognized (see `find_kan_layers`).
        exclude_modules (`Optional[Union[list[str], str]]`):
            The names of the modules to leave alone, exactly or as suffixes; a string is a regex.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            The indices of the layers to adapt. Among the layers that `"all-kan"` finds, those with one of these
            indices in their name are adapted.
        layers_pattern (`Optional[Union[list[str], str]]`):
            The name of the `nn.ModuleList` that `layers_to_transform` counts in, if it has an unusual name.
        rank_pattern (`dict`):
            The mapping from layer names or regexes to ranks that differ from `r`.
        alpha_pattern (`dict`):
            The mapping from layer names or regexes to factors that differ from `alpha`.
        modules_to_save (`Optional[list[str]]`):
            The modules apart from the adapted layers that are trained and saved whole, for instance a new head, or a
            batch norm, whose running statistics are frozen otherwise.
        rank_dropout (`float`):
            The probability with which each rank component of the out mode is dropped in a training step. The others
            are scaled up, so that the expected update is unchanged. Not with `"full"` outputs, which have none.
        module_dropout (`float`):
            The probability with which the adapter of a whole layer is skipped in a training step.
        init_weights (`bool` or `"hosvd"`):
            How the adapter starts. `True` draws random factors. `"hosvd"` takes the leading singular vectors of the
            base layer's own coefficients. Each time the update is zero, so that the adapted model equals its base.
            `False` draws an update at random, which is for tests only. [`start_from_gradient`] and
            [`start_from_training`] start an adapter that is there anew; the configuration, and its file, then say
            `"gradient"` or `"training"`.
        train (`Optional[list[str]]`):
            The components that are trained, of `"core"`, `"factor_out"`, `"factor_in"`, `"factor_basis"` and
            `"factor_kernel"`; `None` (the default) trains all. The others are saved with the adapter, but keep the
            values that they start with. `train=["core"], init_weights="hosvd"` trains a core on fixed factors.
        adapt_residual (`bool`):
            Whether the weights of the residual branch are adapted too, as one more slice of the basis mode.
        storage (`Optional[str]`):
            The dtype of the components in a file: `"float16"` or `"bfloat16"` halves it. Loading restores them to
            the dtype that they have beside the base. `None` saves them as they are. Updates change by about 0.04 % in
            float16, and 0.3 % in bfloat16. Float16 has no values above 65,504, which is an error, and loses digits
            below 6e-5, which is a warning where a component changes by more than 1 %.
        check_base (`Optional[str]`):
            What happens when an adapter is loaded into another base than it was saved with:
            `PeftModel.from_pretrained(base, folder, check_base="error")`. By default (`None`) another grid is an
            error, and other coefficients are a warning; `"error"`, `"warn"` and `"ignore"` hold for both. Another
            kind of layer or shape is always an error. The choice is not saved.
        base_layers (`Optional[dict[str, dict]]`):
            Internal. In a file, the kind, shape, grid and parameters of each adapted layer, which are compared with
            the model when the adapter is loaded.
        weights_sha256 (`Optional[str]`):
            Internal. In a file, the SHA-256 of the tensors; another one is a warning.
        lotra_format (`int`):
            Internal. In a file, the version of its format; another one is an error.

    Raises:
        TypeError: An argument is unknown. For arguments of LoRA, the message names the one to use.
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
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool | Literal["gradient", "training", "hosvd"] = True
    train: list[str] | tuple[str, ...] | str | None = None
    adapt_residual: bool = True
    storage: Literal["float16", "bfloat16"] | None = None
    check_base: Literal["error", "warn", "ignore"] | None = None
    base_layers: dict[str, dict[str, Any]] | None = None
    weights_sha256: str | None = None
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
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r:.200}.")
        records = {} if self.base_layers is None else self.base_layers
        if not isinstance(records, dict) or not all(map(_is_record, records.values())):
            raise ValueError(f"`base_layers` must be a dict of dicts with a `family` and a `shape`: {records!r:.200}.")
        self._check_targets()
        self.r = None if self.r is None else check_ranks(self.r)
        if self.budget is not None:
            self.budget = check_number(self.budget, "budget", "(0, 1]")
            if self.r is not None:
                raise ValueError(f"Pass one of `r` and `budget`; got r={self.r} and budget={self.budget}.")
        self.rank_pattern = {key: check_ranks(r, "rank_pattern") for key, r in (self.rank_pattern or {}).items()}
        # as floats: numpy's have no JSON
        self.alpha = check_number(self.alpha, "alpha", _FINITE)
        for name in ("rank_dropout", "module_dropout"):
            setattr(self, name, check_number(getattr(self, name), name, "[0, 1)"))
        self.alpha_pattern = {
            key: check_number(alpha, "alpha_pattern", _FINITE) for key, alpha in (self.alpha_pattern or {}).items()
        }
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if self.train is not None:
            trained = {self.train} if isinstance(self.train, str) else set(self.train)
            if not trained or not trained <= set(Tucker._fields):
                raise ValueError(f"`train` must have some of {Tucker._fields}, got {self.train!r:.200}.")
            self.train = [name for name in Tucker._fields if name in trained]
        if not self.is_from_file:  # a mode may have become full since, by a hotswap or on another grid
            self._check_full_modes()
        # No fields, so neither saved nor compared. PEFT writes the names that it finds into `target_modules`, and the
        # object may serve another model.
        self.targets_all_kan = self.target_modules in (None, ALL_KAN)
        self.source: Source | None = None  # of tensors that are to be read
        self.names_in_model: dict[str, str] = {}  # the names in the model of the layers that a file names
        # What a save writes: the ranks of layers for which `r` and `rank_pattern` do not say them, and `base_layers`.
        # That field itself would make this the configuration of a file.
        self.ranks_to_record: dict[str, Ranks] = {}
        self.layers_to_record: dict[str, dict[str, Any]] | None = None

    @property
    def is_from_file(self) -> bool:
        """Whether a file records the layers, and holds the components."""
        return self.base_layers is not None

    def _check_full_modes(self) -> None:
        """Raise a ValueError for options that need a factor of a mode that is full in all layers."""
        modes = self.r if isinstance(self.r, tuple) else (self.r,) * len(Tucker._fields[1:])
        full = {name for name, rank in zip(Tucker._fields[1:], modes, strict=False) if rank == "full"}
        absent = [name for name in self.train or () if name in full]
        if absent and not self.rank_pattern:
            raise ValueError(f"`train` names {absent}, but `r={self.r}` has no such factors: train the core instead.")
        chosen = [self.r, *self.rank_pattern.values()]
        for ranks in chosen if self.rank_dropout else ():
            is_default = ranks is None and (self.budget is not None or not self.rank_pattern)
            if is_default or (ranks[0] if isinstance(ranks, tuple) else ranks) == "full":
                raise ValueError(
                    f"`rank_dropout` drops components of the out mode, but r={self.r}, rank_pattern="
                    f"{self.rank_pattern} leave it full, without components: pass `module_dropout`, or other ranks."
                )

    def _check_targets(self) -> None:
        """Raise a ValueError for indices of layers that PEFT would ignore."""
        if isinstance(self.target_modules, str) and self.target_modules != ALL_KAN:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def alpha_of(self, name: str) -> float:
        """The `alpha` of a layer of this name."""
        return float(self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.alpha))

    def adapted_shape(self, tensor: CoefficientTensor) -> tuple[int, ...]:
        """The shape of the update of a layer, with the residual branch if it is adapted."""
        return full_shape(tensor) if self.adapt_residual else tensor.shape

    def component_shapes(self, name: str, tensor: CoefficientTensor) -> dict[str, tuple[int, ...]]:
        """The shapes of the components of a layer, whose name may decide its ranks: the shape of the core."""
        shape = self.adapted_shape(tensor)
        ranks = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        if ranks is None:
            ranks = 4 if tensor.family in ("slim", "slim-kan") else ("full", "full", 1)
        return component_shapes(cap_ranks(ranks, shape), shape)

    def spend_budget(self, tensors: Mapping[str, CoefficientTensor]) -> None:
        """Write the ranks that `budget` allows into `rank_pattern`, by size, for the layers that it does not name.

        Raises:
            ValueError: The budget does not suffice for ranks of 1. This object is then of no use.
        """
        if self.budget is None or self.is_from_file:
            return
        shapes = list(map(self.adapted_shape, tensors.values()))
        total = sum(map(prod, shapes))
        least = total
        for r in _forms_by_size(shapes):
            self.r = r
            of_layers = [self.component_shapes(name, tensor) for name, tensor in tensors.items()]
            parameters = sum(sum(map(prod, of_layer.values())) for of_layer in of_layers)
            least = min(least, parameters)
            if parameters <= self.budget * total + 1e-6:
                chosen = {pattern_key(name): r for name in tensors}
                # of several keys that match, the first holds
                self.rank_pattern = {**self.rank_pattern, **chosen, **self.rank_pattern}
                self.r = None
                return
        raise ValueError(
            f"`budget` is {self.budget}, but the smallest ranks already take {least} of the {total} coefficients. "
            f"Pass at least {ceil(1e4 * least / total) / 1e4}."
        )

    def frozen_and_zero(self, components: Iterable[str]) -> tuple[tuple[str, ...], str]:
        """Which of the components of a layer are not trained, and which one starts at zero: one that is trained."""
        trained = [name for name in components if self.train is None or name in self.train]
        frozen = tuple(name for name in components if name not in trained)
        first = ("core", "factor_out") if self.init_weights == "hosvd" else ("factor_out", "core")
        return frozen, next((name for name in (*first, *trained) if name in trained), "core")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        path = os.fspath(pretrained_model_name_or_path)
        hub_kwargs, class_kwargs, others = cls._split_kwargs(kwargs)
        folder = os.path.join(path, subfolder or "")
        stage = _find_staged_config(folder)
        try:
            if stage is None:
                config = super().from_pretrained(path, subfolder=subfolder, **hub_kwargs, **class_kwargs)
            else:
                config = super().from_pretrained(stage, **class_kwargs)
        # what JSON, PEFT and this class raise for files that are cut or altered
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            kind = TypeError if "missing required keys" in str(error) else ValueError  # as PEFT has it
            raise kind(f"The configuration of the adapter at {folder} cannot be read: {error}") from error
        if isinstance(config, LoTRAConfig):
            config.source = Source(path, subfolder, hub_kwargs, bool(others.get("ignore_mismatched_sizes", False)))
        return config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["check_base"]  # a choice of who loads
        # sets have another order in each process
        values.update({name: sorted(value) for name, value in values.items() if isinstance(value, set)})
        recorded = {pattern_key(name): ranks for name, ranks in self.ranks_to_record.items()}
        values["rank_pattern"] = {**recorded, **values["rank_pattern"], **recorded}
        values["base_layers"] = self.base_layers if self.layers_to_record is None else self.layers_to_record
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json, with the SHA-256 of the tensors beside it, and the model card."""
        weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(weights):
            self.weights_sha256 = _hash_file(weights)
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory)


def _forms_by_size(shapes: Iterable[Sequence[int]]) -> Iterator[Ranks]:
    """Yield the ranks that a budget may take for layers of these shapes, from the largest to the smallest."""
    for count in range(max(shape[2] for shape in shapes), 0, -1):
        yield "full", "full", count
    for rank in range(max(map(max, shapes)), 0, -1):
        yield rank, rank, 1


def _hash_file(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _find_staged_config(folder: str) -> str | None:
    """Return where a save was killed after it had moved the tensors to `folder`, and left their configuration."""
    weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    parent, name = os.path.split(os.path.abspath(folder))
    for stage in (os.path.join(folder, STAGE), os.path.join(parent, STAGE, name)):
        config = os.path.join(stage, CONFIG_NAME)
        are_moved = os.path.isfile(config) and not os.path.exists(os.path.join(stage, SAFETENSORS_WEIGHTS_NAME))
        if are_moved and os.path.isfile(weights):
            with open(config, encoding="utf-8") as file:
                if _hash_file(weights) in file.read():
                    return stage
    return None


def pattern_key(name: str) -> str:
    """A key of `rank_pattern` that matches this layer alone; PEFT reads keys as regexes of the end of a name."""
    return "^" + re.escape(name)
