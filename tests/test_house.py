# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The structure of the package: imports go one way, everything has one place; and its public names."""

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest

import peft_lotra


PACKAGE = Path(peft_lotra.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# a wing imports only from those before it, and none beside it
ORDER = (
    ("_version", "modules", "tucker"),
    ("kan",),
    ("derivatives",),
    ("layers", "least_squares"),
    ("pde",),
    # the upper half, which imports PEFT; trust/test_halves.py runs the lower one without it
    ("hub",),
    ("tuner",),
    ("bank", "compress"),
    ("parametric",),
    ("plotting",),
    ("selection",),
    ("",),
)
RANKS = {wing: rank for rank, wings in enumerate(ORDER) for wing in wings}
BESIDE_EACH_OTHER = [{"layers", "least_squares"}]
# what only PEFT calls by these names
PEFT_NAMES = (
    r"peft|Peft\w*|lora_\w+|lotra_\w+|LoTRA\w*|LoRA\w*|\w*modules_to_save|ModulesToSave\w*|base_layer|base_model"
)


def wing(module):
    return (module.split(".") + [""])[1]


def imports(module, tree):
    """The modules of the package that are imported, those for type checks too."""
    package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            # a name of a package is a module of it, or comes from its __init__
            modules |= {name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return modules & MODULES.keys()


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
IMPORTS = {module: imports(module, tree) - {module} for module, tree in TREES.items()}


def test_each_wing_has_a_rank():
    assert {wing(module) for module in MODULES} <= RANKS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    own_wing = wing(module)
    allowed = {"peft_lotra.derivatives.api"} if module == "peft_lotra.kan" else set()  # `kan.jet`, when it is used
    targets = {target: wing(target) for target in IMPORTS[module] - allowed if wing(target) != own_wing}
    up = {target for target, target_wing in targets.items() if RANKS[target_wing] > RANKS[own_wing]}
    aside = {target for target, target_wing in targets.items() if {own_wing, target_wing} in BESIDE_EACH_OTHER}

    assert not up | aside


def test_no_circle_between_files():
    graphlib.TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_no_import_of_the_package_inside_a_function(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {target for function in functions for target in imports(module, function)}

    assert not inside, inside


@pytest.mark.parametrize("module", [module for module in MODULES if wing(module) == "kan"])
def test_kan_knows_nothing_of_peft(module):
    words = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)  # as in getattr(layer, "base_layer")
        for field in ("id", "attr", "arg", "name", "module"):
            words |= set(str(getattr(node, field, None)).split("."))

    assert not {word for word in words if re.fullmatch(PEFT_NAMES, word)}


@pytest.mark.parametrize("module", [module for module in MODULES if RANKS[wing(module)] < RANKS["hub"]])
def test_the_lower_half_does_not_import_peft(module):
    assert not re.search(r"^\s*(from|import) peft\b", MODULES[module].read_text(), re.MULTILINE)


def test_private_interfaces_of_torch_and_python_have_four_places():
    """The transforms of torch, the number of a backward pass, PEFT's enumeration, and who calls a save."""
    private = r"torch\._C\b|_getframe|__class__ = |get_instructions|_member_map_"
    places = {module for module, path in MODULES.items() if re.search(private, path.read_text())}

    assert places == {
        f"peft_lotra.{name}" for name in ("kan.basis", "tuner.by_row", "tuner.registration", "tuner.saving")
    }


def test_the_top_level_has_at_most_16_rooms():
    hidden = {"__init__.py", "_version.py", "py.typed", "__pycache__"}
    rooms = {path.name for path in PACKAGE.iterdir()} - hidden

    assert len(rooms) <= 14, rooms


def test_there_are_at_most_48_public_names_each_at_one_address():
    packages = [importlib.import_module(name) for name, path in MODULES.items() if path.stem == "__init__"]
    public = [name for package in packages for name in getattr(package, "__all__", []) if name != "__version__"]
    addresses = [f"{package.__name__}.{name}" for package in packages for name in public if name in vars(package)]

    assert len(public) <= 48
    assert len(addresses) == len(public), addresses


@pytest.mark.parametrize("name", peft_lotra.__all__)
def test_every_public_name_is_there(name):
    assert getattr(peft_lotra, name) is not None
    assert name in dir(peft_lotra)


def test_names_are_sorted():
    assert peft_lotra.__all__ == sorted(peft_lotra.__all__, key=lambda name: (not name[0].isupper(), name))
