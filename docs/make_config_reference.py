"""Writes docs/config.md: every config key of this project, with what its source says of it.

In ``add_kd_config`` and ``add_backbone_config`` a key's comment stands above it, and ``# ---- title
----`` starts a section. The text of a distiller's options is that under "Args:" in the docstring of
its constructor. ``tests/test_config_reference.py`` fails when docs/config.md is not what this
prints.

    python docs/make_config_reference.py
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from kd_detectron import add_kd_config
from kd_detectron.backbones.config import add_backbone_config
from kd_detectron.distillers import DISTILLER_REGISTRY, Distiller, option_defaults

TITLE = """# Config reference

Keys that this project adds to [Detectron2's](https://detectron2.readthedocs.io/modules/config.html),
with their defaults. Set them in a config file, or on the command line as `KEY VALUE`. Made by
`docs/make_config_reference.py` from the comments in `kd_detectron/config.py` and
`kd_detectron/backbones/config.py` and from the docstrings of the distillers' constructors; change
it there. A distiller of your own has its node too, once its file is imported (`--import FILE.py`).
"""
DISTILLERS = "one node per distiller"
SECTION = re.compile(r"# -+ (.+?) -+$")
ASSIGNMENT = re.compile(r"cfg\.([A-Z][A-Z0-9_.]*) = ")
ENTRY = re.compile(r'"([A-Z0-9_]+)": ')
NODE = re.compile(r"cfg\.([A-Z][A-Z0-9_.]*) = (CN|CfgNode)\(")


def reference() -> str:
    """The text of docs/config.md."""
    cfg = get_cfg()
    add_kd_config(cfg)
    lines = [TITLE]
    lines += entries(add_kd_config, cfg)
    lines += ["", "## Backbones", "", *entries(add_backbone_config, cfg)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip()) + "\n"


def entries(function: Callable, cfg: CfgNode):
    """Markdown lines for a function that adds keys: sections, nodes, keys in the source's order."""
    comment, node = [], ""
    for line in inspect.getsource(function).splitlines():
        code = line.strip()
        if section := SECTION.match(code):
            yield from ("", f"## {section[1].capitalize()}", "")
            if section[1] == DISTILLERS:
                for name, cls in DISTILLER_REGISTRY:
                    # A test may have registered one of its own.
                    if cls.__module__.startswith("kd_detectron."):
                        yield from distiller_entries(name, cls, cfg)
            comment = []
        elif code.startswith("# "):
            comment.append(code[2:])
        elif found := NODE.match(code):
            node = found[1]
            yield from ("", f"### {node}", "")
            if comment:
                yield from (" ".join(comment), "")
            yield from table_head()
            comment = []
        elif found := ASSIGNMENT.match(code) or ENTRY.match(code):
            key = found[1] if ASSIGNMENT.match(code) else f"{node}.{found[1]}"
            if key.rpartition(".")[0] != node:
                # A key in a node of Detectron2's own.
                node = key.rpartition(".")[0]
                yield from ("", f"### {node}", "", *table_head())
            yield row(cfg, key, " ".join(comment))
            comment = []
        elif not code:
            comment = []


def distiller_entries(name: str, cls: type[Distiller], cfg: CfgNode):
    """Markdown lines for the node of one distiller."""
    node, texts = f"KD.{name.upper()}", arguments(cls.__init__.__doc__ or "")
    yield from ("", f"### {node}", "", f"{name}: {cls.__doc__.splitlines()[0]}", "", *table_head())
    yield row(cfg, f"{node}.WEIGHT", "Multiplies this method's losses.")
    for option in option_defaults(cls):
        text = texts[option]
        yield row(cfg, f"{node}.{option.upper()}", text[:1].upper() + text[1:])


def arguments(docstring: str) -> dict[str, str]:
    """The texts under "Args:" of a docstring, by argument."""
    texts, name = {}, ""
    _, _, rest = inspect.cleandoc(docstring).partition("Args:\n")
    block, _, _ = rest.partition("\n\n")
    for line in textwrap.dedent(block).splitlines():
        if line.startswith(" "):
            texts[name] += f" {line.strip()}"
        else:
            name, _, texts[name] = (part.strip() for part in line.partition(":"))
    return texts


def table_head() -> list[str]:
    return ["| Key | Default | Meaning |", "|---|---|---|"]


def row(cfg: CfgNode, key: str, meaning: str) -> str:
    """One row of a table, with the default that the config really has."""
    value = cfg
    for part in key.split("."):
        value = value[part]
    default = f'"{value}"' if isinstance(value, str) else str(value)
    return f"| `{key.rpartition('.')[2]}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(reference(), encoding="utf-8")
