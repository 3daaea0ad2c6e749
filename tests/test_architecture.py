"""A part may import only itself and the parts of lower layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lmchat"
LAYERS = [
    {"__init__", "types"},
    {"messages", "option_checks", "paths", "losses", "schedules"},
    {"files", "hardware", "parquet_pages", "precision", "progress", "provenance", "records", "yaml_loading"},
    {"hub", "model", "tokenizer"},
    {"optim"},
    {"scaling", "stage_table"},
    {"training_memory"},
    {"run_plan"},
    {"tasks"},
    {"generation"},
    {"data"},
    {"rl"},
    {"checkpoint"},
    {"evaluation"},
    {"report"},
    {"strategies"},
    {"stages"},
    {"callbacks"},
    {"cli"},
    {"serve"},
    {"demo"},
    {"commands"},
    {"__main__"},
]
"""From the bottom to the top. Parts of one layer do not import each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FIRST_LIGHTNING_LAYER = LEVEL["strategies"]

MODULES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    top = path.relative_to(SOURCE).parts[0]
    return top.removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Full names of what a module imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_layers(path: Path) -> None:
    part = part_of(path)
    assert part in LEVEL, f"{part} belongs to no layer: add it to LAYERS"
    for name in imports(ast.parse(path.read_text())):
        assert not name.startswith("."), "absolute imports only"
        if name.split(".")[0] in ("lightning", "pytorch_lightning"):
            assert LEVEL[part] >= FIRST_LIGHTNING_LAYER, f"{part} may not import lightning"
        if name.startswith("lmchat."):
            other = name.split(".")[1]
            target = other if other in LEVEL else "__init__"
            assert target == part or LEVEL[target] < LEVEL[part], f"{part} may not import {name}"


def test_contributing_shows_the_layers() -> None:
    page = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    assert [set(line.split()) for line in page.split("```")[1].strip().splitlines()] == LAYERS


def test_the_layers_name_what_exists() -> None:
    assert {part_of(path) for path in MODULES} <= set(LEVEL)
