# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key

from ..files.fingerprint import digest_of
from ..files.format import (
    PENDING_CONFIG,
    check_patterns,
    check_size,
    config_digest,
    find_weights,
    read_weights,
    write_atomically,
)
from ..tucker import cap_ranks, check_ranks


ALL_KAN = "all-kan"
CHECK_BASE = ("error", "warn", "ignore")


class WeakMethod:
    """A weak reference to a bound method, which copies and pickles leave behind."""

    def __init__(self, method: Callable | None = None) -> None:
        self._method = (lambda: None) if method is None else weakref.WeakMethod(method)

    def __call__(self) -> Callable | None:
        return self._method()

    def __reduce__(self):
        return WeakMethod, ()


@dataclass
class LoTRAConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`LoTRAModel`].

    The update of a coefficient tensor (out, in, basis) is `alpha * core x1 factor_out x2 factor_in x3 factor_basis`.
    LoRA users: it is scaled by `alpha` alone, without a division by `r`; the initialization already normalizes.

    Args:
        r (`int` or `tuple[int, int, int]`):
            The ranks (out, in, basis) of the update. An int counts for the three modes. A rank above the size of its
            mode is capped.
        alpha (`float`):
            The factor that the update is multiplied by.
        target_modules (`Optional[Union[list[str], str]]`):
            The names of the KAN layers to adapt, exactly or as suffixes; a string is a regex. `"all-kan"`, which
            `None` (the default) stands for, takes every KAN layer that is recognized (see `find_kan_layers`).
        exclude_modules (`Optional[Union[list[str], str]]`):
            The names of the modules to leave alone. A string is a regex; the names of a list match exactly or as
            suffixes.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            The layer indices to adapt. Among the layers that `"all-kan"` finds, only those whose name has one of these
            indices are adapted.
        layers_pattern (`Optional[Union[list[str], str]]`):
            The name of the `nn.ModuleList` that `layers_to_transform` counts in, where it is not called as usual.
        rank_pattern (`dict`):
            The mapping from layer names or regexes to ranks that differ from `r`.
        alpha_pattern (`dict`):
            The mapping from layer names or regexes to factors that differ from `alpha`.
        modules_to_save (`Optional[list[str]]`):
            The modules apart from the adapted layers that are trained and saved whole, for instance a new head.
        rank_dropout (`float`):
            The probability with which each of the out-mode's rank components is dropped in a training step; the
            others are scaled up, so that the expected update is unchanged.
        module_dropout (`float`):
            The probability with which the adapter of a whole layer is skipped in a training step.
        init_weights (`bool` or `"gradient"`):
            How the adapter starts. `True` draws random factors and `"gradient"` takes them from the gradient that
            [`preprocess_lotra`] gathered; either way the update is zero, so that the adapted model equals its base.
            `False` draws an update at random, which is for tests only.
        adapt_residual (`bool`):
            Whether the weights of the residual branch are adapted too, as one more slice of the basis mode.
        check_base (`Optional[str]`):
            What happens when an adapter is loaded into a base that is not the one it was saved with. By default
            (`None`) another grid is an error, since the same coefficients mean other functions there, and other
            coefficients are a warning, since an adapter may be used on a base that was trained on: it adds the same
            functions to it. `"error"`, `"warn"` and `"ignore"` hold for both. A choice of whoever loads, which is not
            saved: `PeftModel.from_pretrained(base, folder, check_base="error")`. Another family or shape is always an
            error.
        base_layers (`Optional[dict[str, dict]]`):
            What the adapter was made for: the family and shape of each adapted layer, and, in a file, hashes of its
            grid and its frozen parameters. Filled in when the adapter is created or saved and compared with the model
            when it is loaded; leave it alone.
        base_digest (`Optional[str]`):
            In a file, one digest of all `base_layers`.
        integrity (`Optional[dict[str, str]]`):
            In a file, digests of the config and of the tensors. Remove the entry from a file that was changed on
            purpose.

    Raises:
        ValueError: A value cannot be used; or the config comes from a file that was changed after it was saved.
    """

    r: int | tuple[int, int, int] = field(
        default=4, metadata={"help": "Ranks (out, in, basis) of the update; an int counts for the three modes."}
    )
    alpha: float = field(
        default=1.0,
        metadata={"help": "Factor that the update is multiplied by; unlike in LoRA there is no division by r."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the KAN layers to adapt (exact or suffixes; a string is a regex). 'all-kan', or None, "
            "takes every KAN layer that is recognized."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the modules to leave alone (exact or suffixes; a string is a regex)."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the nn.ModuleList that `layers_to_transform` counts in."},
    )
    rank_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Mapping from layer names or regexes to ranks that differ from `r`."},
    )
    alpha_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Mapping from layer names or regexes to factors that differ from `alpha`."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules apart from the adapted layers that are trained and saved whole."},
    )
    rank_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability with which each rank component of the out mode is dropped in training."},
    )
    module_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability with which the adapter of a whole layer is skipped in training."},
    )
    init_weights: bool | Literal["gradient"] = field(
        default=True,
        metadata={
            "help": "True: random factors; 'gradient': factors from the gradient that preprocess_lotra gathered; both "
            "with a zero update. False: a random update (for tests)."
        },
    )
    adapt_residual: bool = field(
        default=True,
        metadata={"help": "Whether the residual branch is adapted too, as one more slice of the basis mode."},
    )
    base_layers: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "Family and shape of each adapted layer; filled in when the adapter is created."},
    )
    check_base: Literal["error", "warn", "ignore"] | None = field(
        default=None,
        metadata={
            "help": "What to do when the base is not the one that the adapter was saved with: 'error', 'warn' or "
            "'ignore'; None means an error for another grid and a warning for other coefficients. Not saved."
        },
    )
    base_digest: str | None = field(default=None, metadata={"help": "In a file, one digest of all `base_layers`."})
    integrity: dict[str, str] | None = field(
        default=None, metadata={"help": "In a file, digests of the config and of the tensors."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LOTRA
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        self._check_types()
        self.r = check_ranks(self.r)
        self.rank_pattern = {key: check_ranks(r) for key, r in (self.rank_pattern or {}).items()}
        for name in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)}.")
        if not isinstance(self.init_weights, bool) and self.init_weights != "gradient":
            raise ValueError(f"`init_weights` must be True, False or 'gradient', got {self.init_weights!r}.")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_KAN:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        # Not fields, so neither saved nor compared. Adding an adapter writes the names and shapes of its layers into
        # the object, which may serve for another model next; and only what comes out of a file binds it to a model.
        self.targets_all_kan = self.target_modules in (None, ALL_KAN)
        self.checkpoint_layers = self.base_layers  # with hashes, which the field leaves to the file
        self.checkpoint_tensors = None  # the shapes of the tensors in the file, by name
        self.checkpoint_digest = (self.integrity or {}).get("weights")  # and their digest
        self.describe_base = WeakMethod()  # gives the `base_layers` of a file
        self._check_integrity()
        self.base_digest = self.integrity = None
        if self.base_layers is not None:
            self.base_layers = {
                name: {key: layer[key] for key in ("family", "shape", "has_residual")}
                for name, layer in self.base_layers.items()
            }

    def _check_types(self) -> None:
        """What is read from a file can be anything."""

        def is_number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        def is_name_or_names(value: Any) -> bool:
            return isinstance(value, str) or (
                isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)
            )

        def is_index_or_indices(value: Any) -> bool:
            indices = value if isinstance(value, (list, tuple)) else [value]
            return all(isinstance(index, int) and not isinstance(index, bool) for index in indices)

        def is_pattern(value: Any) -> bool:
            return isinstance(value, dict) and all(isinstance(key, str) for key in value)

        names = "a string or a list of strings"
        wanted = {
            "alpha": (is_number, "a finite number"),
            "alpha_pattern": (lambda v: is_pattern(v) and all(map(is_number, v.values())), "a dict of finite numbers"),
            "rank_pattern": (is_pattern, "a dict of ranks"),
            "rank_dropout": (is_number, "a number"),
            "module_dropout": (is_number, "a number"),
            "target_modules": (is_name_or_names, names),
            "exclude_modules": (is_name_or_names, names),
            "layers_pattern": (is_name_or_names, names),
            "layers_to_transform": (is_index_or_indices, "an index or a list of indices"),
            "modules_to_save": (is_name_or_names, "a list of strings"),
            "adapt_residual": (lambda v: isinstance(v, bool), "True or False"),
            "inference_mode": (lambda v: isinstance(v, bool), "True or False"),
            "check_base": (lambda v: v in CHECK_BASE, f"None or one of {CHECK_BASE}"),
            "base_layers": (_is_record, "None, or what a saved config has"),
            "base_digest": (lambda v: isinstance(v, str), "None, or what a saved config has"),
            "integrity": (_is_hashes, "None, or what a saved config has"),
        }
        for name, (accepts, what) in wanted.items():
            value = getattr(self, name)
            if value is not None and not accepts(value):
                raise ValueError(f"`{name}` must be {what}, got {str(value)[:200]!r}.")
        for name in ("alpha", "rank_dropout", "module_dropout", "adapt_residual", "inference_mode"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be {wanted[name][1]}, got None.")

    #########
    # Files #
    #########

    def _check_integrity(self) -> None:
        if self.integrity is not None and self.integrity.get("config") != self._digest(
            asdict(self), self.checkpoint_digest
        ):
            raise ValueError(
                "The config of the adapter was changed after it was saved, or it was saved by a later version of this "
                "package: its digest does not fit. If you changed it on purpose remove its entry `integrity`; "
                "otherwise get the file anew."
            )
        if self.base_digest is not None and self.base_layers and self.base_digest != digest_of(self.base_layers):
            raise ValueError(
                "`base_digest` does not fit `base_layers`: the config of the adapter was changed after it was saved. "
                "Get the file anew."
            )

    def _digest(self, values: dict[str, Any], weights: str | None) -> str:
        defaults = {
            entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
            for entry in fields(self)
        }
        return config_digest(values, defaults, weights)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves the config, with a record of the base and the digest of the tensors that lie in the folder.

        The file is replaced in one step; `save_adapter` replaces config and tensors in one.

        Args:
            save_directory (`str`): The folder, which is made if there is none.

        Raises:
            AssertionError: It is a file.
            ValueError: The tensors in the folder are damaged, or not finite.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        digest = read_weights(weights)[1] if os.path.exists(weights) else None
        values = self.to_dict()
        describe = self.describe_base()
        if describe is None:
            values["base_layers"] = self.checkpoint_layers or self.base_layers
        elif self.base_layers is not None:
            values["base_layers"] = describe(self.base_layers)
        if values["base_layers"] is not None:
            values["base_digest"] = digest_of(values["base_layers"])
        values["integrity"] = {"config": self._digest(values, digest)}
        if digest is not None:
            values["integrity"]["weights"] = digest
        del values["check_base"]
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
        write_atomically(os.path.join(save_directory, CONFIG_NAME), json.dumps(values, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Reads the config of an adapter, and checks the file of its tensors before any model is touched.

        Args:
            pretrained_model_name_or_path (`str`): A folder, or a repository on the Hub.
            subfolder (`str`, *optional*): Where in it.
            kwargs: Those of `huggingface_hub.hf_hub_download`, and `check_base`.

        Raises:
            ValueError: There is no config; it or the tensors are damaged, do not belong together, or are not finite;
                there is a pickle instead of a safetensors file; a pattern in the config may take forever to match.
        """
        hub_kwargs, own_kwargs, _ = cls._split_kwargs(kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        check_size(os.path.join(folder, CONFIG_NAME))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = find_weights(pretrained_model_name_or_path, subfolder, hub_kwargs)
        shapes = None
        if weights is not None:
            shapes, digest = read_weights(weights)
            pending = os.path.join(folder, PENDING_CONFIG)
            if config.checkpoint_digest not in (None, digest) and os.path.isfile(pending):
                # `save_adapter` was interrupted between its last two steps: this is the config of these tensors
                check_size(pending)
                config = cls.from_peft_type(**cls.from_json_file(pending))
            if config.checkpoint_digest not in (None, digest):
                raise ValueError(
                    f"The config and the tensors in {folder} do not belong together: the file of the tensors was "
                    "changed or exchanged, or saving was interrupted. Get both files anew."
                )
            config._check_components(shapes)
        config.checkpoint_tensors = shapes
        config.check_base = own_kwargs.get("check_base")  # which is no choice of the file's
        if config.check_base not in (None, *CHECK_BASE):
            raise ValueError(f"`check_base` must be None or one of {CHECK_BASE}, got {config.check_base!r}.")
        patterns = [config.target_modules, config.exclude_modules, *config.rank_pattern, *config.alpha_pattern]
        lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
        check_patterns([pattern for pattern in (*patterns, *lists) if isinstance(pattern, str)])
        return config

    def ranks_and_alpha(self, layer_name: str) -> tuple[int | tuple[int, int, int], float]:
        """The ranks, before they are capped by the sizes of the modes, and the scale that a layer gets."""
        r_key, alpha_key = (get_pattern_key(p.keys(), layer_name) for p in (self.rank_pattern, self.alpha_pattern))
        return self.rank_pattern.get(r_key, self.r), self.alpha_pattern.get(alpha_key, self.alpha)

    def _check_components(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compares the tensors of a file with the layers and ranks of its config, if that has a record of them."""
        if self.checkpoint_layers is None:
            return
        expected = {}
        for name, layer in self.checkpoint_layers.items():
            out, in_, basis = layer["shape"]
            sizes = (out, in_, basis + (layer["has_residual"] and self.adapt_residual))
            ranks = cap_ranks(self.ranks_and_alpha(name)[0], sizes)
            expected[f"base_model.model.{name}.lotra_core"] = ranks
            for component, shape in zip(("out", "in", "basis"), zip(sizes, ranks, strict=True), strict=True):
                expected[f"base_model.model.{name}.lotra_factor_{component}"] = shape
        wrong = [
            f"{name.removeprefix('base_model.model.')}: {shapes.get(name, 'nothing')} in the checkpoint, "
            f"{shape} by its config"
            for name, shape in expected.items()
            if shapes.get(name) != shape
        ]
        if wrong:
            raise ValueError("The tensors of the adapter do not fit its config:\n  " + "\n  ".join(wrong))


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, str) for pair in value.items() for entry in pair)


def _is_record(value: Any) -> bool:
    """Whether it has the form of `base_layers`."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(layer, dict)
        and isinstance(layer.get("family"), str)
        and isinstance(layer.get("has_residual"), bool)
        and isinstance(layer.get("shape"), (list, tuple))
        and len(layer["shape"]) == 3
        and all(isinstance(size, int) and size > 0 for size in layer["shape"])
        and all(_is_hashes(layer.get(hashes, {})) for hashes in ("grid", "parameters"))
        for name, layer in value.items()
    )
