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

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from .tucker import check_ranks


ALL_KAN = "all-kan"


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
        base_layers (`Optional[dict[str, dict]]`):
            What the adapter was made for: the family and shape of each adapted layer. Filled in when the adapter is
            created and compared with the model when it is loaded; leave it alone.
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

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.LOTRA
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
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
        self.checkpoint_layers = self.base_layers
