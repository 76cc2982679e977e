"""The pages name what exists: links, commands, options, files, config keys; their code is valid."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from kd_detectron.__main__ import COMMANDS
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.torchvision.main import build_parser as train_torchvision

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        README,
        ROOT / "datasets" / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix()
)

# Of torchrun, tensorboard and pip.
OTHERS = {
    "nnodes",
    "nproc-per-node",
    "rdzv-backend",
    "rdzv-endpoint",
    "logdir",
    "no-build-isolation",
}


def options_of_the_commands() -> set[str]:
    from detectron2.engine import default_argument_parser

    sources = [*(ROOT / "kd_detectron").rglob("*.py"), *ROOT.glob("tools/*.py")]
    sources += [*ROOT.glob("datasets/*.py"), *ROOT.glob("docs/*.py")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    parsers = [train_torchvision(), default_argument_parser()]
    text += "".join(re.sub(r"(--[\w-]+)", r'"\1"', parser.format_help()) for parser in parsers)
    return OTHERS.union(re.findall(r'"--([a-z][a-z0-9-]+)"', text))


def anchor(heading: str) -> str:
    """The fragment of a heading, as on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@every_page
def test_links_lead_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), target


def test_readme_links_every_page():
    text = README.read_text(encoding="utf-8")
    linked = {(ROOT / path).resolve() for path in re.findall(r"\]\(([^)#\s]+\.md)", text)}
    assert [page.name for page in PAGES if page != README and page not in linked] == []


@every_page
@pytest.mark.usefixtures("needs_detectron2")
def test_commands_options_and_configs_exist(page):
    from kd_detectron.config import find_config

    text = page.read_text(encoding="utf-8")
    for tool in re.findall(r"\b((?:tools|datasets|docs)/\w+\.py)", text):
        assert (ROOT / tool).is_file(), tool
    for name in re.findall(r"--config-file ([\w/.]+\.(?:yaml|py))", text):
        # Names that stand for the reader's own.
        assert name.startswith("my_") or find_config(name)
    for name in re.findall(r"run_study\.py (?:configs/studies/)?([a-z]\w*\.yaml)", text):
        assert name.startswith("my_") or (ROOT / "configs" / "studies" / name).is_file(), name
    used = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", text))
    assert used - options_of_the_commands() == set()
    for command in re.findall(r"python -m kd_detectron ([a-z_]+)", text):
        assert command in COMMANDS, command
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target


@every_page
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:kd_detectron|configs|tests|\.ci)/[\w/.*-]*)`", text):
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_places_in_how_it_works_exist():
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    tables = text[text.index("## Where things live") :]
    names = re.findall(r"`([\w/]+(?:/|\.py))`", tables)
    names = [name for name in names if not name.startswith(("tools/", "tests/", "kd_detectron/"))]
    assert len(names) > 20
    for name in names:
        assert (ROOT / "kd_detectron" / name).exists(), name
    folders = [path.name for path in (ROOT / "kd_detectron").iterdir() if path.is_dir()]
    assert [f for f in folders if f != "__pycache__" and f"`{f}/`" not in tables] == []


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_is_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    ours = [name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_detectron.")]
    assert [name for name in ours if f"`{name}`" not in text] == []


@every_page
def test_lines_are_no_longer_than_100_columns(page):
    if page.name.startswith(("results", "config")):
        return  # Tables above all; the second is generated.
    prose = re.sub(r"<!-- Results: begin.*?end -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    lines = [
        line for line in without_code(prose).splitlines() if not line.startswith(("|", "    "))
    ]
    assert [line for line in lines if len(line) > 100] == []


@every_page
@pytest.mark.usefixtures("needs_detectron2")
def test_config_keys_exist(page):
    from detectron2.config import get_cfg

    from kd_detectron import add_kd_config

    cfg = get_cfg()
    add_kd_config(cfg)
    heads = "KD|MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST"
    text = page.read_text(encoding="utf-8")
    # Nodes of distillers that the page itself writes; other tests train with them.
    own = re.findall(r"@DISTILLER_REGISTRY.register\(\)\nclass (\w+)", text)
    for key in re.findall(rf"\b((?:{heads})(?:\.[A-Z0-9_]+)+)\b", text):
        if key.split(".")[1] in [name.upper() for name in own]:
            continue
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@every_page
@pytest.mark.usefixtures("needs_detectron2")
def test_code_is_valid(page):
    from detectron2.config import CfgNode, get_cfg

    from kd_detectron import add_kd_config

    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
    for code in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(code)))
