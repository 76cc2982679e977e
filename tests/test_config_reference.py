"""docs/config.md is what the comments of the config say, and says something about every key."""

import importlib.util
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from kd_detectron import add_kd_config

DOCS = Path(__file__).resolve().parents[1] / "docs"


def make_config_reference():
    file = DOCS / "make_config_reference.py"
    spec = importlib.util.spec_from_file_location("make_config_reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_config_reference_is_current():
    current = (DOCS / "config.md").read_text(encoding="utf-8")
    assert make_config_reference().reference() == current, (
        "docs/config.md is out of date: run python docs/make_config_reference.py"
    )


def test_every_key_of_ours_is_in_the_reference_with_a_meaning():
    detectron2, ours = get_cfg(), get_cfg()
    add_kd_config(ours)
    documented, node = set(), ""
    for line in (DOCS / "config.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            node = line[4:]
        elif line.startswith("| `"):
            _, key, _, meaning = (cell.strip() for cell in line.split("|")[:4])
            documented.add(f"{node}.{key.strip('`')}")
            assert meaning, line
    assert documented == set(keys(ours)) - set(keys(detectron2))
