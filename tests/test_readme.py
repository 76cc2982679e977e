"""The README is for a stranger: what it says to type works."""

import re
import subprocess
import sys
from pathlib import Path

import yaml
from tiny import distilled_cfg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

TRAIN_ONE_STEP = """
import sys
sys.path.insert(0, sys.argv[2])
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from kd_detectron.config import get_config
from kd_detectron.commands import import_user_code
from tiny import tiny_batch
import_user_code(sys.argv[1])
model = build_model(get_config(sys.argv[3]))
with EventStorage():
    losses = model.train()(tiny_batch())
print(sorted(losses), float(losses["loss_cosine"].detach()))
"""


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def test_distiller_of_the_readme_trains_from_a_users_file(tmp_path):
    (tmp_path / "cosine.py").write_text(block("python", "CosineKD"))
    cfg = distilled_cfg(tmp_path, ["CosineKD", "CKD"])
    (tmp_path / "run.yaml").write_text(cfg.dump())
    command = [sys.executable, "-c", TRAIN_ONE_STEP, "cosine.py", str(ROOT / "tests"), "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss_cosine" in done.stdout and "loss_ckd" in done.stdout


def test_distiller_of_the_readme_is_as_short_as_promised():
    lines = [line for line in block("python", "CosineKD").splitlines() if line.strip()]
    assert len(lines) <= 13


def test_yaml_of_the_readme_is_valid_config():
    from detectron2.config import CfgNode, get_cfg

    from kd_detectron import add_kd_config

    for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for tool in re.findall(r"tools/\w+\.py", README):
        assert (ROOT / tool).is_file(), tool
