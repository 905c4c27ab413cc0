"""Data flows one way: who may import whom, and what is done in one place only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pargs_min
from pargs_min.methods import FINE_TUNED, METHODS
from pargs_min.reward_model import OBJECTIVES

PACKAGE = Path(pargs_min.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
WINGS = {"baselines", "benchmark", "evaluation", "experiments", "serving", "world", "cli"}
OPEN = {  # the wings that a wing may use, besides the ground floor and itself
    "experiments": {"baselines", "benchmark", "evaluation", "world"},
    "cli": {"baselines", "benchmark", "evaluation", "world", "experiments", "serving"},
}
METHOD = {  # what a reader of the method meets, and all that it may import of the package
    "minimal": set(),
    "policy": set(),
    "losses": set(),
    "reward_model": set(),
    "scoring": {"reward_model"},
    "decode": {"policy", "reward_model", "scoring"},
    "smc": {"decode", "scoring"},
    "methods": {"decode", "scoring", "smc"},
    "models": {"codec", "memory", "reward_model", "store"},
    "records": set(),
    "codec": {"records"},
    "store": {"records"},
    "data": {"codec", "records"},
    "reading": {"codec", "records", "reward_model", "scoring"},
}
each_file = pytest.mark.parametrize("name", FILES)


def wing(name: str) -> str | None:
    """The wing that a module stands in; None on the ground floor."""
    return name.split("/")[0] if "/" in name else None


def imports(name: str) -> set[str]:
    """Everything a file imports, in functions too, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within_package(name: str) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for dotted in imports(name):
        parts = dotted.split(".")[1:] if dotted.startswith("pargs_min.") else []
        paths = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        found |= (
            {next(path for path in paths for path in (path, f"{path}/__init__") if path in FILES)} if paths else set()
        )
    return found - {name}


@each_file
def test_nobody_imports_what_stands_outside(name):
    assert not {dotted.split(".")[0] for dotted in imports(name)} & {"theory", "tests", "tutorials"}


@each_file
def test_wings_stand_on_the_ground_floor_and_not_on_each_other(name):
    above = {wing(other) for other in within_package(name)} - {None, wing(name)}
    assert above <= OPEN.get(wing(name), set()) or name == "__main__"


@pytest.mark.parametrize("name", METHOD)
def test_the_method_imports_downwards_only(name):
    assert within_package(name) <= METHOD[name]


def test_there_are_no_circles():
    """Raises graphlib.CycleError with the circle, if there is one."""
    assert len([*TopologicalSorter({name: within_package(name) for name in FILES}).static_order()]) == len(FILES)


def test_every_folder_is_a_wing_that_is_known():
    assert {wing(name) for name in FILES} == WINGS | {None}


def called(name: str) -> set[str]:
    """The names of all attributes that a file mentions."""
    return {
        node.attr for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))) if isinstance(node, ast.Attribute)
    }


@each_file
def test_models_come_in_by_one_door(name):
    assert name == "models" or "from_pretrained" not in called(name)


@each_file
def test_nobody_compares_the_names_of_methods(name):
    """What is to be known of a method stands in the table; a comparison elsewhere would be a second table."""
    names = {*METHODS, *FINE_TUNED, "-greedy"} - {*OBJECTIVES}  # some are named like what their guides are trained with
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [leaf for side in (node.left, *node.comparators) for leaf in ast.walk(side)]
            compared = {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}
            assert not compared & names, f"{name}:{node.lineno} compares with {compared & names}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "endswith":
            assert not names & {arg.value for arg in node.args if isinstance(arg, ast.Constant)}, (
                f"{name}:{node.lineno}"
            )


def test_every_public_name_is_there():
    for name in pargs_min.__all__:
        assert getattr(pargs_min, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pargs_min.nonsense  # noqa: B018
