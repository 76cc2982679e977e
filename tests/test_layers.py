"""The package's parts stand one on the other: imports between them point downwards only."""

import ast
from collections.abc import Iterator
from pathlib import Path

from test_without_detectron2 import python_without_detectron2

PACKAGE = Path(__file__).resolve().parents[1] / "kd_detectron"

# Each part may import those of the lines above its own.
LAYERS = (
    ("errors", "atomic_files", "worker_signals"),
    ("learning_rate", "precision", "finite", "seeding"),
    ("commands", "context", "inherit", "taps", "losses", "data", "backbones"),
    ("distillers",),
    ("runs",),
    ("config",),
    ("checkpoint",),
    ("modeling",),
    ("preflight",),
    ("visualize", "profiling"),
    ("engine", "torchvision", "labelling"),
    ("studies",),
    ("__init__",),
    ("__main__",),
)
WITHOUT_DETECTRON2 = (
    "errors",
    "atomic_files",
    "worker_signals",
    "learning_rate",
    "precision",
    "finite",
    "seeding",
    "commands",
    "context",
    "inherit",
    "taps",
    "losses",
    "distillers",
    "runs",
    "torchvision",
)


def part_of(module: str) -> str:
    """The part that a module belongs to: "losses" of "kd_detectron.losses.ckd"."""
    return [*module.split("."), "__init__"][1]


def module_name(file: Path) -> str:
    return ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Lines and names of what a file imports from this package, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module_name(file).split(".")[: -node.level] if node.level else []
            names = [".".join([*above, *filter(None, [node.module])])]
            if names == [PACKAGE.name]:
                names = [f"{PACKAGE.name}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, x) for x in names if x.split(".")[0] == PACKAGE.name)


def test_imports_between_the_packages_parts_point_downwards_only():
    height = {part: index for index, layer in enumerate(LAYERS) for part in layer}
    upward = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = part_of(module_name(file))
        for line, name in imports(file):
            part = part_of(name)
            if part not in height:  # a name that kd_detectron/__init__.py defines
                part = "__init__"
            if part != own and height[part] >= height[own]:
                upward.append(f"{file.relative_to(PACKAGE)}:{line} {own} imports {name}")
    assert not upward, "\n".join(upward)


def test_every_part_has_its_layer():
    parts = {part_of(module_name(file)) for file in PACKAGE.rglob("*.py")}
    assert parts == {part for layer in LAYERS for part in layer}


def test_parts_of_plain_pytorch_import_where_detectron2_is_not_installed():
    names = [
        module_name(file).removesuffix(".__init__")
        for file in sorted(PACKAGE.rglob("*.py"))
        if part_of(module_name(file)) in WITHOUT_DETECTRON2
    ]
    done = python_without_detectron2("-c", "\n".join(f"import {name}" for name in names))
    assert done.returncode == 0, done.stderr[-2000:]
