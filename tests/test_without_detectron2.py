"""Losses and distillers are plain PyTorch: they run where Detectron2 is not installed.

So do the tests of all that needs none of it; those left out are counted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_folders import DEFAULTS, config_text
from without_detectron2.demanded import DEMANDED

PROGRAM = """
import sys
import torch
import kd_detectron
from kd_detectron import losses
from kd_detectron.distillers import CKD, DISTILLER_REGISTRY, ReviewKD

logits = torch.randn(8, 4, requires_grad=True)
losses.ckd_loss(logits, torch.randn(8, 4)).backward()
assert logits.grad.abs().sum() > 0
fused = ReviewKD(in_channels=[8] * 2, out_channels=[8] * 2, mid_channels=8).fuse(
    [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 8, 8)]
)
assert [tuple(f.shape[-2:]) for f in fused] == [(16, 16), (8, 8)]
assert len(list(DISTILLER_REGISTRY)) == 16 and sys.modules["detectron2"] is None
for name in (
    "ckd_loss kd_loss dkd_loss bickd_loss hcl_loss dcd_loss supcon_loss crd_loss".split()
):
    assert callable(getattr(losses, name)), name
try:
    from kd_detectron import get_config
except ImportError as error:
    assert "Detectron2, which is not installed" in str(error), error
else:
    raise AssertionError
print("ran")
"""


BLOCKER = Path(__file__).parent / "without_detectron2"


def python_without_detectron2(*arguments: str) -> subprocess.CompletedProcess:
    return python(*arguments, path=[str(BLOCKER), *sys.path])


def python(*arguments: str, path: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
    )


def test_losses_and_distillers_run_without_detectron2():
    done = python_without_detectron2("-c", PROGRAM)
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr[-2000:]


def test_tests_that_need_detectron2_are_counted_and_not_run_without_it():
    files = ["test_config.py", "losses/test_contrastive.py"]
    paths = [str(Path(__file__).parent / file) for file in files]
    done = python_without_detectron2("-m", "pytest", "-q", *paths)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout
    assert "which need Detectron2: it is not installed" in done.stdout.splitlines()[-1]


def test_every_demanded_folder_has_tests_without_detectron2():
    tests = Path(__file__).parent
    paths = [str(tests / name) for name in DEMANDED]
    done = python_without_detectron2("-m", "pytest", "-q", "--collect-only", *paths)
    for name in DEMANDED:
        assert f"\ntests/{name}" in f"\n{done.stdout}", (name, done.stdout[-2000:])


@pytest.mark.parametrize("left_out", [[], ["runs/test_tables.py", "visualize"]])
def test_run_in_which_a_demanded_folder_ran_no_test_fails_and_names_it(tmp_path, left_out):
    skip = "import pytest\n@pytest.mark.skip()\n"
    for name in DEMANDED:
        file = tmp_path / "tests" / name
        file = file if file.suffix else file / "test_it.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{skip if name in left_out else ''}def test_it(): pass\n")
    options = ["--rootdir", str(tmp_path), "--import-mode=importlib", "-n", "1", "-p", "demanded"]
    done = python_without_detectron2("-m", "pytest", *options, str(tmp_path / "tests"))
    assert done.returncode == (1 if left_out else 0), done.stdout + done.stderr
    line = "error: no test ran of runs/test_tables.py, visualize (tests/)"
    assert (line in done.stdout.splitlines()) == bool(left_out)


TESTS = """
import pytest

@pytest.fixture
def model():
    import detectron2.modeling

def test_of_a_fixture(model):
    pass

@pytest.mark.usefixtures("needs_detectron2")
def test_that_says_so():
    pass

def test_that_imports_by_itself():
    import detectron2.modeling
"""


def test_only_a_test_whose_fixture_needs_detectron2_is_left_out(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    done = python_without_detectron2("-m", "pytest", "-p", "conftest", str(tmp_path))
    assert "1 failed, 2 skipped" in done.stdout, done.stdout + done.stderr
    assert "_ test_that_imports_by_itself _" in done.stdout
    assert "not run: 2 test functions in 1 files" in done.stdout.splitlines()[-1]


FIXTURE = """
import pytest

@pytest.fixture
def model():
    import {name}

def test_of_a_fixture(model):
    pass
"""

FALLBACK = """sys
    try:
        import detectron2
    except ImportError:
        import no_such_module
"""


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("test_it.py", FIXTURE.format(name="no_such_module")),
        ("test_it.py", FIXTURE.format(name=FALLBACK)),
        ("test_it.py", "import no_such_module\ndef test_it(): pass\n"),
        ("folder/conftest.py", "import no_such_module\n"),
    ],
    ids=["fixture", "fixture in place of Detectron2", "test file", "conftest"],
)
def test_another_module_that_is_missing_is_a_failure(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (path.parent / "test_other.py").write_text("def test_other(): pass\n")
    done = python_without_detectron2("-m", "pytest", "-p", "conftest", str(tmp_path))
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 5) and "No module named 'no_such_module'" in output, output


@pytest.mark.usefixtures("needs_detectron2")
def test_fixture_that_fails_to_import_where_detectron2_is_installed_is_a_failure(tmp_path):
    (tmp_path / "test_it.py").write_text(FIXTURE.format(name="detectron2.no_such_module"))
    done = python("-m", "pytest", "-p", "conftest", str(tmp_path), path=sys.path)
    assert "1 error" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.mark.usefixtures("needs_detectron2")
def test_run_folders_without_detectron2_have_its_defaults():
    config = yaml.safe_load(config_text({}))
    for key, default in DEFAULTS.items():
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == default, key
