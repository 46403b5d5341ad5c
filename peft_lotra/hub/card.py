# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of an adapter: what it adapts, how to load it, and what it contains for each layer."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import NamedTuple, TypeGuard, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, __version__
from peft.utils import CONFIG_NAME

from ..files.format import write_atomically
from ..modules.checks import check_path
from ..report import TextTable, printable
from ..tuner.config import LoTRAConfig
from ..tuner.registration import NAME
from .base_code import (
    BaseSource,
    check_base_code,
    check_base_model,
    hub_id,
    literal,
    source_of_config,
    source_of_model,
)
from .contents import AdapterRow, adapter_folders, adapter_table, read_adapter, size_cells, table_of_tensors


README = "README.md"
TAGS = ("kan", "lotra", "peft-plugin")

_BEGIN = "<!-- From here on written by peft_lotra.write_model_card, which replaces this part. -->"
_END = "<!-- The part that peft_lotra.write_model_card wrote ends here. -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
# the code between the imports and the adapter in the snippet of a card
_BASE_CODE = re.compile(r"from peft import PeftModel\n(.*?)\n\nmodel = PeftModel", re.DOTALL)
# what this package writes there, which follows the model
_GENERATED_CODE = re.compile(r"^# now load into `base`|^base = \w+\.from_pretrained\([^()]*\)$", re.MULTILINE)
# PEFT adds its version to a card that does not have this heading
_VERSIONS = "### Framework versions"
# the entries of the front matter of a generated card
_FACTS = {"library_name", "base_model", "tags", "metrics", "model-index", "pipeline_tag"}

CITATION = """```bibtex
@article{gao2025lotra,
  title   = {Low Tensor-Rank Adaptation of {Kolmogorov-Arnold} Networks},
  author  = {Gao, Yihang and Ng, Michael K. and Tan, Vincent Y. F.},
  journal = {IEEE Transactions on Signal Processing},
  volume  = {73},
  year    = {2025},
  note    = {arXiv:2502.06153}
}
```"""

_TASKS = {
    "regression": "tabular-regression",
    "single_label_classification": "tabular-classification",
    "multi_label_classification": "tabular-classification",
}


def write_model_card(
    model: PeftModel | None,
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    base_code: str | None = None,
    tags: Iterable[str] = (),
    metrics: dict[str, float] | dict[str, dict[str, float]] | list[EvalResult] | None = None,
    license: str | None = None,
) -> None:
    """Writes the model card of a LoTRA adapter, README.md, into the folder of the saved adapter.

    The card says how to get the base model, how to load the adapter, and what the adapter contains for each layer. It
    replaces an earlier card by this function, and the unfilled template of PEFT; all other text of README.md is kept.
    `save_pretrained` calls it without further arguments.

    Args:
        model: The model with the adapter; other adapters in the folder are listed, too. With None, the card is made
            from the files and keeps the code of the base.
        folder: The folder of the saved adapter.
        repo_id: The repository that the snippet loads the adapter from, by default the folder that it runs in.
        revision: The branch of `repo_id`, if it is not the main one.
        base_model: The base model on the Hub, by default the one that the base was loaded from.
        base_code: Python code that assigns the base to the variable `base`, if `from_pretrained` cannot load it. By
            default the code that builds the architecture, if its arguments are known.
        tags: Additional tags.
        metrics: Results for the model-index: values by name, for an unnamed data set, such values by adapter, or
            complete results. By default the results of the existing card stay.
        license: The identifier of the adapter's license for the front matter, such as "apache-2.0". By default that of
            the existing card stays.

    Raises:
        ValueError: The model has no LoTRA adapter, the folder does not exist (without a model: contains no LoTRA
            adapter), the front matter of its README.md is broken, or an argument is invalid. The README.md is then
            unchanged.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, write_model_card
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 8, 1]), LoTRAConfig(r=2))
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     write_model_card(model, folder, base_model="user/kan", metrics={"accuracy": 0.853})
        ...     print("accuracy | 0.853" in Path(folder, "README.md").read_text())
        True
    """
    check_path(folder, "folder")
    folder = Path(folder)
    if not (model is None or hasattr(model, "get_base_model")):  # an injected model has not
        raise ValueError(f"`model` is of type {type(model).__name__}, but must be a PeftModel or None.")
    check_base_model(base_model)
    check_base_code(base_code)
    for name, value in (("repo_id", repo_id), ("revision", revision), ("license", license)):
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"`{name}` is {value!r}, but must be a string or None.")
    problem_type, before = None, load_card(folder / README)
    if model is None:
        adapters = {name: read_adapter(path) for name, path in adapter_folders(folder).items()}
        if not adapters:
            raise ValueError(f"{folder} is no adapter: it has no {CONFIG_NAME}.")
        tables = {name: table_of_tensors(*adapter) for name, adapter in adapters.items()}
        configs = {name: config for name, (config, _) in adapters.items()}
        config = next(iter(configs.values()))
        source = source_of_config(config, base_model, base_code, written_code(before))
    else:
        names = [name for name, config in model.peft_config.items() if config.peft_type == NAME]
        if not names:
            raise ValueError(f"The model has no LoTRA adapter, only {sorted(model.peft_config)}.")
        saved = adapter_folders(folder)
        tables = {name: adapter_table(model, name) for name in names if name in saved or not saved}
        if not tables:
            raise ValueError(f"{folder} has none of the adapters {names} of the model, only {list(saved)}.")
        config = cast(LoTRAConfig, model.peft_config[next(iter(tables))])
        base = model.get_base_model()
        problem_type = getattr(getattr(base, "config", None), "problem_type", None)
        source = source_of_model(base, config, base_model, base_code, written_code(before))
        configs = dict(model.peft_config)
        for name in [name for name in saved if name not in tables]:
            with suppress(ValueError):  # of another method, or broken
                configs[name], tensors = read_adapter(saved[name])
                tables[name] = table_of_tensors(cast(LoTRAConfig, configs[name]), tensors)
    results = _eval_results(metrics, problem_type, tables)
    trained = {name: cast(LoTRAConfig, configs[name]).train for name in tables}
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: save the adapter there first (`model.save_pretrained`).")
    card = before or ModelCard("---\n{}\n---\n")
    title = (repo_id or "LoTRA adapter").rpartition("/")[2]
    data = cast(ModelCardData, card.data)  # huggingface_hub annotates it with a name that is no type
    if results and _is_by_adapter(metrics):
        others = tables.keys() - metrics.keys()
        kept = [old for old in data.eval_results or () if (old.metric_name or "").partition(": ")[0] in others]
        results = [*kept, *results]
    _fill_front_matter(data, source, title, tags, results)
    if license is not None:
        data.license = license
    _replace_section(card, title, _Facts(tables, source, repo_id, revision, data.eval_results, trained).text())
    content = str(card)
    ModelCard(content)  # raises if huggingface_hub would refuse to read the card
    write_atomically(folder / README, content)


def load_card(path: Path, origin: str | None = None) -> ModelCard | None:
    """The card in a file, or None; the error for broken front matter names `origin`, by default the path."""
    if not path.is_file():
        return None
    try:
        content = path.read_bytes().decode("utf-8-sig")
        # ModelCard would read an unclosed front matter as text
        if re.match(r"\s*---\s*\n", content) and len(re.findall(r"^---[ \t\r]*$", content, re.MULTILINE)) < 2:
            raise ValueError("it begins with --- and does not end")
        card = ModelCard(content if content.lstrip().startswith("---") else f"---\n{{}}\n---\n{content}")
        for name, value in card.data.to_dict().items():
            known = name in ("tags", "base_model", "metrics")
            if known and not (isinstance(value, (str, list)) and all(isinstance(it, str) for it in value)):
                raise ValueError(f"`{name}` is {value!r}, expected a list of strings")
        return card
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The front matter of {origin or path} is broken: {error}. Mend it, or delete it.") from error


def written_code(card: ModelCard | None) -> str | None:
    """The code that builds the base in a card by `write_model_card`."""
    return _code_in(card.text) if card else None


def _code_in(text: str) -> str | None:
    found = _BASE_CODE.search(text)
    return found and found[1].strip("\n")


def write_card_after_saving(model: PeftModel | None, folder: str | os.PathLike) -> None:
    """What `save_pretrained` leaves: the card, in which code for the base that a person gave stays."""
    path = Path(folder) / README
    code = _code_in(path.read_text("utf-8-sig")) if path.is_file() else None
    write_model_card(model, folder, base_code=None if code is None or _GENERATED_CODE.search(code) else code)


def combine_cards(here: ModelCard | None, there: ModelCard | None) -> ModelCard | None:
    """The card to push: that of the folder if a person wrote it, else that of the repository with the new facts."""
    if here is None or there is None:
        return here or there
    facts = here.data.to_dict()
    text = _SECTION.sub("", here.text).strip()
    if not (_is_unfilled(text) or re.fullmatch("# .*", text)) or not facts.keys() <= _FACTS:
        return here
    old = there.data.to_dict()
    tags = [*_as_list(old.get("tags")), *_as_list(facts.get("tags"))]
    there.data = ModelCardData(**{**old, **facts, "tags": tags})
    return there


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


@cache
def _template_lines() -> frozenset[str]:
    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())


def _is_unfilled(text: str) -> bool:
    """Whether all lines come from the template of PEFT and transformers."""
    known = _template_lines() | {_VERSIONS, ""}
    generated = re.compile(r"- PEFT \S+|.*has been automatically generated\.")
    lines = (line.strip() for line in text.splitlines())
    return all(line in known or generated.fullmatch(line) for line in lines)


def _fill_front_matter(
    data: ModelCardData, source: BaseSource, title: str, tags: Iterable[str], results: list[EvalResult] | None
) -> None:
    data.library_name = "peft"
    # PEFT also writes local folders, which the Hub refuses
    others = [name for name in _as_list(data.base_model) if hub_id(name)]
    data.base_model = source.model or (others if len(others) > 1 else next(iter(others), None))
    kept = [tag for tag in _as_list(data.tags) if not tag.startswith("base_model:adapter:")]
    bases = [f"base_model:adapter:{name}" for name in _as_list(data.base_model)]
    data.tags = sorted({*kept, *TAGS, *_as_list(tags), *bases})
    if results:
        data.model_name, data.eval_results = title, results
        data.metrics = sorted({*_as_list(data.metrics), *(result.metric_type for result in results)})


def _replace_section(card: ModelCard, title: str, section: str) -> None:
    """Replaces the generated part of a card, or appends the part to a card that has none."""
    text = card.text.replace("\r\n", "\n")
    if _is_unfilled(text):
        text = f"\n# {title}\n"
    if _VERSIONS not in _SECTION.sub("", text):
        section += f"\n\n{_VERSIONS}\n\n- PEFT {__version__}"
    section = f"{_BEGIN}\n\n{section}\n\n{_END}"
    text, count = _SECTION.subn(lambda _: section, text)
    card.text = (text if count else f"{text.rstrip()}\n\n{section}").rstrip() + "\n"


@cache
def install_line() -> str:
    """How to install this package: from the repository that its metadata names."""
    try:
        urls = dict(url.split(", ", 1) for url in metadata("peft-lotra").get_all("Project-URL") or ())
    except PackageNotFoundError:
        urls = {}
    return f'pip install "peft-lotra @ git+{urls["Repository"]}"' if "Repository" in urls else "pip install peft-lotra"


class _Facts(NamedTuple):
    """The contents of the generated part of a card."""

    tables: dict[str, list[AdapterRow]]
    source: BaseSource
    repo_id: str | None
    revision: str | None
    results: list[EvalResult] | None
    trained: Mapping[str, Sequence[str] | str | None]  # by adapter

    def text(self) -> str:
        model, name = self.source.model, self.source.name
        base = f"[{model}](https://huggingface.co/{model})" if model else f"a {name or 'model'}"
        paragraphs = [
            f"An adapter of {base}, a Kolmogorov-Arnold network (KAN), by low tensor-rank adaptation\n"
            "([LoTRA](https://arxiv.org/abs/2502.06153)), a method for [PEFT](https://github.com/huggingface/peft).",
            "## Use it",
            f"```sh\n{install_line()}\n```",
            self._snippet(),
        ]
        if not model:
            of_class = f" is a `{name}` from `{self.source.module}`. It" if name else ""
            paragraphs.append(
                f"The base model{of_class} is not on the Hub under a name that this card knows. "
                "The adapter means nothing on other weights than those that it was trained on."
            )
        # AutoPeftModel would look for the base in the subfolder, too
        if self.source.auto and self.source.module and self.repo_id and next(iter(self.tables)) == "default":
            paragraphs += ["The base and the adapter in one call (PEFT 0.20 or newer):", self._auto_snippet()]
        if len(self.tables) > 1:
            names = ", ".join(map(_plain, self.tables))
            but = " but default" if "default" in self.tables else ""
            paragraphs.append(f"The adapters here are {names}; all{but} are loaded by their `subfolder`.")
        if self.results:
            paragraphs += ["## Results", _markdown(self._results())]
        return "\n\n".join([*paragraphs, "## Layers", _markdown(self._layers()), *self._fixed(), "## Cite", CITATION])

    def _fixed(self) -> list[str]:
        """What of the updates is not trained, adapter by adapter."""
        several = len(self.tables) > 1
        return [
            f"{f'Of {_plain(adapter)}, ' if several else ''}{' and '.join(names)} {'are' if len(names) > 1 else 'is'} "
            "trained; the other components are fixed, and saved with it."
            for adapter, names in self.trained.items()
            if names
        ]

    def _arguments(self) -> str:
        """The arguments of `from_pretrained` that name the first adapter."""
        adapter = next(iter(self.tables))
        revision = f", revision={literal(self.revision)}" if self.revision else ""
        subfolder = f", subfolder={literal(adapter)}" if adapter != "default" else ""
        return literal(self.repo_id or ".") + revision + subfolder

    def _snippet(self) -> str:
        code = self.source.code
        return (
            f"```python\nimport peft_lotra  # makes {NAME} known to PEFT; without it PEFT says KeyError: '{NAME}'\n"
            "from peft import PeftModel\n"
            + ("" if code.startswith(("from ", "import ")) else "\n")
            + f"{code}\n\nmodel = PeftModel.from_pretrained(base, {self._arguments()})"
            + ("\n```" if self.repo_id else "  # run it in this folder\n```")
        )

    def _auto_snippet(self) -> str:
        package = str(self.source.module).partition(".")[0]
        allowed = "" if package == "transformers" else f", import_allowlist=[{literal(package)}]"
        return (
            f"```python\nimport peft_lotra  # makes {NAME} known to PEFT\nfrom peft import AutoPeftModel\n\n"
            f"model = AutoPeftModel.from_pretrained({self._arguments()}{allowed})\n```"
        )

    def _results(self) -> TextTable:
        rows = []
        for it in self.results or []:
            value = it.metric_value
            number = f"{value:.4g}" if isinstance(value, float) else value
            rows.append([_plain(cell) for cell in (it.metric_name or it.metric_type, number, it.dataset_name)])
        return TextTable(["metric", ">value", "data"], rows)

    def _layers(self) -> TextTable:
        cells = []
        for adapter, rows in self.tables.items():
            prefix = f"{_plain(adapter)}: " if len(self.tables) > 1 else ""
            cells += [[f"{prefix}`{_plain(row.name)}`", *map(_plain, row.cells()), *size_cells([row])] for row in rows]
            cells.append([f"**{prefix}total**", "", "", "", *(f"**{cell}**" for cell in size_cells(rows))])
        return TextTable(["layer", "family", "update (out, in, basis)", "ranks", ">parameters", ">kB"], cells)


def _plain(text: object) -> str:
    """Text of a file for a line of the card: without line breaks, and with escapes for what would be markup."""
    return re.sub(r"[`|<&\[]", lambda found: f"\\x{ord(found[0]):x}", printable(str(text)))


def _markdown(table: TextTable) -> str:
    rules = ["--:" if side == "right" else "---" for side in table.sides]
    head, *body = ([f" {cell} " if cell else " " for cell in row] for row in (table.titles, *table.rows))
    return "\n".join(f"|{'|'.join(line)}|" for line in (head, rules, *body))


def _is_by_adapter(metrics: object) -> TypeGuard[dict[str, dict[str, float]]]:
    """Whether metrics are values by adapter, and not values by name or results."""
    return isinstance(metrics, dict) and bool(metrics) and all(isinstance(values, dict) for values in metrics.values())


def _eval_results(
    metrics: dict[str, float] | dict[str, dict[str, float]] | list[EvalResult] | None,
    problem_type: str | None,
    adapters: Iterable[str],
) -> list[EvalResult] | None:
    if _is_by_adapter(metrics):
        if unknown := metrics.keys() - set(adapters):
            raise ValueError(f"`metrics` names the adapters {sorted(unknown)}, the folder has {sorted(adapters)}.")
        found = {name: _eval_results(cast(dict, values), problem_type, ()) for name, values in metrics.items()}
        for name, results in found.items():
            for result in results or ():
                result.metric_name = f"{name}: {result.metric_type}"
        return [result for results in found.values() for result in results or ()]
    if isinstance(metrics, dict):
        metrics = cast(dict[str, float], metrics)
        wrong = {k: v for k, v in metrics.items() if not isinstance(v, numbers.Real) or not math.isfinite(v)}
        if wrong:
            raise ValueError(f"`metrics` must map names to finite numbers, got {wrong}.")
        task = _TASKS.get(problem_type or "", "other")
        return [EvalResult(task, "unknown", "Unknown", name, float(value)) for name, value in metrics.items()]
    if not all(isinstance(result, EvalResult) for result in metrics or []):
        raise ValueError(f"`metrics` must be a dict or a list of `huggingface_hub.EvalResult`, got {metrics!r}.")
    return metrics
