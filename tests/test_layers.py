"""Data flows one way: who may import whom."""

import ast
from pathlib import Path

import pytest

import pargs_min

PACKAGE = Path(pargs_min.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
CORE = {  # all that these may import of the package
    "policy": set(),
    "losses": set(),
    "exact": set(),
    "journey": {"exact"},
    "records": set(),
    "reward_model": set(),
    "scoring": {"reward_model"},
    "decode": {"policy", "reward_model"},
    "methods": {"decode", "smc"},
    "data": {"records"},
    "memory": set(),
    "train": {"data", "losses", "memory", "reward_model"},
}


def imports(path: Path) -> set[str]:
    """Everything a file imports, in functions too, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within_package(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("pargs_min.")}


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_downwards_only(module):
    assert within_package(PACKAGE / f"{module}.py") <= CORE[module]


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_the_command_line_or_what_stands_outside(module):
    path = PACKAGE / f"{module}.py"
    assert "cli" not in within_package(path)
    assert not {name.split(".")[0] for name in imports(path)} & {"theory", "tests", "tutorials"}


def test_every_public_name_is_there():
    for name in pargs_min.__all__:
        assert getattr(pargs_min, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pargs_min.nonsense  # noqa: B018
