"""The docs name what exists: links, commands, config files and config keys; their code is valid."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from kd_detectron import add_kd_config
from kd_detectron.config import find_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), ROOT / "datasets" / "README.md", ROOT / "CONTRIBUTING.md"]
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@every_page
def test_commands_and_configs_exist(page):
    text = page.read_text(encoding="utf-8")
    for tool in re.findall(r"\b((?:tools|datasets|docs)/\w+\.py)", text):
        assert (ROOT / tool).is_file(), tool
    for name in re.findall(r"--config-file ([\w/.]+\.(?:yaml|py))", text):
        assert find_config(name)
    for name in re.findall(r"`(configs/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name


@every_page
def test_config_keys_exist(page):
    cfg = get_cfg()
    add_kd_config(cfg)
    heads = "KD|MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST"
    text = page.read_text(encoding="utf-8")
    # Nodes of distillers that the page itself writes; tests/test_pages.py trains with them.
    own = re.findall(r"@DISTILLER_REGISTRY.register\(\)\nclass (\w+)", text)
    for key in re.findall(rf"\b((?:{heads})(?:\.[A-Z0-9_]+)+)\b", text):
        if key.split(".")[1] in [name.upper() for name in own]:
            continue
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@every_page
def test_code_is_valid(page):
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
    for code in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(code)))
