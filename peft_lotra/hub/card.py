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

"""The model card of an adapter: what it is, how to load it, and what each layer has of it."""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, __version__
from peft.utils import CONFIG_NAME

from ..tuner.registration import NAME
from .base_code import BaseSource, check_base_model, hub_id, source_of_config, source_of_model
from .contents import AdapterRow, adapter_folders, adapter_table, read_adapter, table_of_tensors


README = "README.md"
TAGS = ("kan", "lotra", "peft-plugin")

_BEGIN = "<!-- From here on written by peft_lotra.write_model_card, which replaces this part. -->"
_END = "<!-- The part that peft_lotra.write_model_card wrote ends here. -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
# the lines between the imports and the adapter, in the snippet of a card
_BASE_CODE = re.compile(r"from peft import PeftModel\n(.*?)\n\nmodel = PeftModel", re.DOTALL)
# where PEFT looks whether its version is in the card already
_VERSIONS = "### Framework versions"

# what the front matter of a generated card has
_FACTS = {"library_name", "base_model", "tags", "metrics", "model-index", "pipeline_tag"}

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
    metrics: dict[str, float] | list[EvalResult] | None = None,
) -> None:
    """Writes the model card of a LoTRA adapter, README.md, beside what `save_pretrained` wrote.

    The card says how to get the base and how to put the adapter on it, and what each layer has. What is in the
    README.md already is kept, but for the unfilled template of PEFT and for what this function wrote before, which
    stands between two comments. Call it after `save_pretrained`: that keeps the text, but not the tags.

    Example:

    ```py
    >>> model.save_pretrained("adapter")
    >>> write_model_card(model, "adapter", base_model="user/kan", metrics={"accuracy": 0.853})
    ```

    Args:
        model (`PeftModel` or `None`): The model with the adapter. With None the card is made from the saved files, and
            the code for the base is the one of the card that is there.
        folder (`str` or `os.PathLike`): Where the adapter was saved.
        repo_id (`str`, *optional*): The repository that the card's snippet loads the adapter from. Without it, the
            snippet loads the folder that it is run in.
        revision (`str`, *optional*): The branch of `repo_id`, if it is not the main one.
        base_model (`str`, *optional*): The base model on the Hub; by default where the base was loaded from.
        base_code (`str`, *optional*): Python that makes the variable `base`, for a base that `from_pretrained` does
            not load from the Hub. By default the lines that build its architecture, as far as they can be told.
        tags (`Iterable[str]`): More tags.
        metrics (`dict` or `list[huggingface_hub.EvalResult]`, *optional*): Results, for the model-index; those that
            are there are kept if none are given. A dict of names and values leaves the data set unnamed.

    Raises:
        ValueError: The model has no LoTRA adapter, the folder does not exist (without a model: holds no LoTRA
            adapter), the front matter of its README.md is broken, or an argument cannot be used. The README.md is then
            as it was.
    """
    folder = Path(folder)
    check_base_model(base_model)
    problem_type = None
    if model is None:
        adapters = {name: read_adapter(path) for name, path in adapter_folders(folder).items()}
        if not adapters:
            raise ValueError(f"{folder} is no adapter: it has no {CONFIG_NAME}.")
        tables = {name: table_of_tensors(*adapter) for name, adapter in adapters.items()}
        config, _ = next(iter(adapters.values()))
        source = source_of_config(config, base_model, base_code, written_code(load_card(folder / README)))
    else:
        configs = {name: config for name, config in model.peft_config.items() if config.peft_type == NAME}
        if not configs:
            raise ValueError(f"The model has no LoTRA adapter, only {sorted(model.peft_config)}.")
        saved = adapter_folders(folder)
        tables = {name: adapter_table(model, name) for name in configs if name in saved or not saved}
        base = model.get_base_model()
        problem_type = getattr(getattr(base, "config", None), "problem_type", None)
        source = source_of_model(base, configs[next(iter(tables))], base_model, base_code)
    results = _eval_results(metrics, problem_type)
    _write(folder, tables, source, repo_id=repo_id, revision=revision, tags=tags, results=results)


def load_card(path: Path, origin: str | None = None) -> ModelCard | None:
    """The card in a file, None if there is no file; a ValueError, which names `origin`, if its front matter is
    broken."""
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            content = file.read()
        # ModelCard would take a front matter that is not closed for text
        if re.match(r"\s*---\s*\n", content) and len(re.findall(r"^---[ \t\r]*$", content, re.MULTILINE)) < 2:
            raise ValueError("it begins with --- and does not end")
        return ModelCard(content if content.lstrip().startswith("---") else f"---\n{{}}\n---\n{content}")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The front matter of {origin or path} is broken: {error}. Mend it, or delete it.") from error


def written_code(card: ModelCard | None) -> str | None:
    """The Python that makes `base` in a card that `write_model_card` wrote."""
    found = _BASE_CODE.search(card.text) if card else None
    return found and found[1].strip("\n")


def combine_cards(here: ModelCard | None, there: ModelCard | None) -> ModelCard | None:
    """The card of a folder with the one in the repository that it is pushed to, either of which may be missing.

    What a person wrote in the folder replaces what is in the repository; a card that was generated does not: its facts
    go into the other one.
    """
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


def _write(
    folder: Path,
    tables: dict[str, list[AdapterRow]],
    source: BaseSource,
    *,
    repo_id: str | None,
    revision: str | None,
    tags: Iterable[str],
    results: list[EvalResult] | None,
) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: save the adapter there first (`model.save_pretrained`).")
    card = load_card(folder / README) or ModelCard("---\n{}\n---\n")
    data = card.data
    data.library_name = "peft"
    # PEFT writes a folder of this machine as well, which the Hub refuses
    others = [name for name in _as_list(data.base_model) if hub_id(name)]
    data.base_model = source.model or (others if len(others) > 1 else next(iter(others), None))
    kept = [tag for tag in _as_list(data.tags) if not tag.startswith("base_model:adapter:")]
    data.tags = sorted(
        {*kept, *TAGS, *_as_list(tags), *(f"base_model:adapter:{name}" for name in _as_list(data.base_model))}
    )
    title = (repo_id or "LoTRA adapter").rpartition("/")[2]
    if results:
        data.model_name, data.eval_results = title, results
        data.metrics = sorted({*_as_list(data.metrics), *(result.metric_type for result in results)})

    text = card.text.replace("\r\n", "\n")
    if _is_unfilled(text):
        text = f"\n# {title}\n"
    section = "\n".join(_section(tables, source, repo_id, revision, data.eval_results))
    if _VERSIONS not in _SECTION.sub("", text):
        section += f"\n\n{_VERSIONS}\n\n- PEFT {__version__}"
    section = f"{_BEGIN}\n\n{section}\n\n{_END}"
    if _SECTION.search(text):
        card.text = _SECTION.sub(lambda _: section, text).rstrip() + "\n"
    else:
        card.text = f"{text.rstrip()}\n\n{section}\n"
    content = str(card)
    ModelCard(content)  # nothing is written that huggingface_hub would refuse to read
    # replaced whole, so that the README.md is never half a card
    new = folder / f".{README}.new"
    new.write_bytes(content.encode())
    os.replace(new, folder / README)


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_unfilled(text: str) -> bool:
    """Whether there is no line that is not in the template which PEFT and transformers start a card from."""
    known = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()} | {_VERSIONS, ""}
    generated = re.compile(r"- PEFT \S+|.*has been automatically generated\.")
    lines = (line.strip() for line in text.splitlines())
    return all(line in known or generated.fullmatch(line) for line in lines)


def _section(
    tables: dict[str, list[AdapterRow]],
    source: BaseSource,
    repo_id: str | None,
    revision: str | None,
    results: list[EvalResult] | None,
) -> list[str]:
    base = (
        f"[{source.model}](https://huggingface.co/{source.model})" if source.model else f"a {source.name or 'model'}"
    )
    adapter = next(iter(tables))
    where = json.dumps(repo_id or ".")
    if revision:
        where += f", revision={json.dumps(revision)}"
    if adapter != "default":
        where += f', subfolder="{adapter}"'
    lines = [
        f"An adapter of {base}, a Kolmogorov-Arnold network (KAN), by low tensor-rank adaptation",
        "([LoTRA](https://arxiv.org/abs/2502.06153)), a method for [PEFT](https://github.com/huggingface/peft).",
        "",
        "## Use it",
        "",
        "```sh",
        "pip install peft-lotra",
        "```",
        "",
        "```python",
        f"import peft_lotra  # makes {NAME} known to PEFT; without it PEFT says KeyError: '{NAME}'",
        "from peft import PeftModel",
        *([] if source.code.startswith(("from ", "import ")) else [""]),
        *source.code.split("\n"),
        "",
        f"model = PeftModel.from_pretrained(base, {where})" + ("" if repo_id else "  # run it in this folder"),
        "```",
    ]
    if not source.model:
        of_class = f" is a `{source.name}` from `{source.module}`. It" if source.name else ""
        lines += [
            "",
            f"The base model{of_class} is not on the Hub under a name that this card knows. "
            "The adapter means nothing on other weights than those that it was trained on.",
        ]
    # AutoPeftModel would look for the base in the subfolder, too
    if source.auto and repo_id and adapter == "default":
        package = source.module.partition(".")[0]
        allowed = "" if package == "transformers" else f', import_allowlist=["{package}"]'
        lines += [
            "",
            "The base and the adapter in one call (PEFT 0.20 or newer):",
            "",
            "```python",
            f"import peft_lotra  # makes {NAME} known to PEFT",
            "from peft import AutoPeftModel",
            "",
            f"model = AutoPeftModel.from_pretrained({where}{allowed})",
            "```",
        ]
    if len(tables) > 1:
        lines += ["", f"The adapters here are {', '.join(tables)}; all but default are loaded by their `subfolder`."]
    if results:
        lines += ["", "## Results", "", "| metric | value | data |", "|---|--:|---|"]
        lines += [
            f"| {r.metric_name or r.metric_type} | {_number(r.metric_value)} | {r.dataset_name} |" for r in results
        ]
    return [*lines, "", "## Layers", "", *_markdown(tables)]


def _markdown(tables: dict[str, list[AdapterRow]]) -> list[str]:
    lines = ["| layer | family | update (out, in, basis) | ranks | parameters | kB |", "|---|---|---|---|--:|--:|"]
    for adapter, rows in tables.items():
        prefix = f"{adapter}: " if len(tables) > 1 else ""
        for row in rows:
            what = f"{row.family} | {row.shape} | {row.ranks}" if row.ranks else "saved whole | | "
            lines.append(f"| {prefix}`{row.name}` | {what} | {row.parameters:,} | {row.size / 1000:.1f} |")
        parameters, size = sum(row.parameters for row in rows), sum(row.size for row in rows)
        lines.append(f"| **{prefix}total** | | | | **{parameters:,}** | **{size / 1000:.1f}** |")
    return lines


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _eval_results(
    metrics: dict[str, float] | list[EvalResult] | None, problem_type: str | None
) -> list[EvalResult] | None:
    if isinstance(metrics, dict):
        wrong = {k: v for k, v in metrics.items() if not isinstance(v, numbers.Real) or not math.isfinite(v)}
        if wrong:
            raise ValueError(f"`metrics` must map names to finite numbers, got {wrong}.")
        return [
            EvalResult(
                task_type=_TASKS.get(problem_type, "other"),
                dataset_type="unknown",
                dataset_name="Unknown",
                metric_type=name,
                metric_value=float(value),
            )
            for name, value in metrics.items()
        ]
    if not all(isinstance(result, EvalResult) for result in metrics or []):
        raise ValueError(f"`metrics` must be a dict or a list of `huggingface_hub.EvalResult`, got {metrics!r}.")
    return metrics
