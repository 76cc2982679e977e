"""The first run: ``make`` installs what can be installed, and says in one sentence what cannot.

The Makefile and its scripts are the real ones, in a copy. Python's ``venv`` is a stand-in whose
environments hold a program that notes its arguments and does what ``world`` says.
"""

import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from child_process import git_repository

ROOT = Path(__file__).parents[1]
COPIED = [
    *("Makefile", "setup.py", "requirements.txt", "requirements-dev.txt"),
    *("tools/install.py", "tools/check_source.py"),
]
UNREACHABLE = "git+file:///nowhere/detectron2.git@main"
# Stands for ``python -m venv FOLDER``, and FOLDER/bin/python for all that it runs.
VENV = """
import os, pathlib, sys

python = pathlib.Path(sys.argv[1]) / "bin" / "python"
python.parent.mkdir(parents=True, exist_ok=True)
python.write_text(os.environ["STAND_IN"])
python.chmod(0o755)
"""
PYTHON = """#!/bin/sh
echo "$*" >> "$WORLD/log"
case "$*" in
  *"detectron2._C"*) [ -e "$WORLD/detectron2" ] ;;
  *"import detectron2"*) [ -e "$WORLD/detectron2_that_does_not_run" ] ;;
  *"pip install"*detectron2*)
    [ -e "$WORLD/build_fails" ] && { echo "ERROR: no compiler" >&2; exit 1; }
    touch "$WORLD/detectron2" ;;
  *"pip install -r"*)
    [ -e "$WORLD/index_fails" ] && { echo "ERROR: no index" >&2; exit 1; }
    true ;;
esac
"""


class Project:
    """A copy of the Makefile and what it needs; ``world`` has a file for all that is the case."""

    def __init__(self, folder: Path):
        self.folder, self.world = folder / "project", folder / "world"
        self.stand_ins = folder / "stand_ins"
        for path in (self.folder / "tools", self.world, self.stand_ins):
            path.mkdir(parents=True)
        for name in COPIED:
            shutil.copy(ROOT / name, self.folder / name)
        (self.stand_ins / "venv.py").write_text(VENV)
        self.source(UNREACHABLE)

    def source(self, url: str) -> None:
        """Where requirements-detectron2.txt says that Detectron2 comes from."""
        text = f"# Built against torch.\ndetectron2 @ {url}\n"
        (self.folder / "requirements-detectron2.txt").write_text(text)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        (self.world / "log").write_text("")
        variables = {
            key: value
            for key, value in os.environ.items()
            if key not in ("MAKEFLAGS", "MAKELEVEL", "ENGINE", "DETECTRON2", "VENV")
        }
        return subprocess.run(
            ["make", f"PYTHON={sys.executable}", *arguments],
            cwd=self.folder,
            env=variables
            | {"PYTHONPATH": str(self.stand_ins), "STAND_IN": PYTHON, "WORLD": str(self.world)}
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def did(self, words: str) -> int:
        """How many commands with these words the last ``make`` ran."""
        return (self.world / "log").read_text().count(words)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def repository(tmp_path):
    """The URL of a git repository that answers."""
    git_repository(tmp_path / "there")
    return f"git+file://{tmp_path / 'there'}"


# ---- Detectron2 can be installed ----


def test_reachable_detectron2_is_installed_once_and_nothing_is_said_of_it(project, repository):
    project.source(f"{repository}@main")
    first, second = (project.make("demo") for _ in range(2))
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("", "")
    assert project.did("pip install") == 0
    assert project.did("tools/demo.py") == 1


def test_detectron2_that_is_there_needs_no_source(project):
    """As after ``git pull`` without a network: setup.py has changed."""
    project.make("test")
    (project.world / "detectron2").touch()
    os.utime(project.folder / "setup.py", (time.time() + 5, time.time() + 5))
    for goal in ("demo", "test", "install"):
        done = project.make(goal)
        assert done.returncode == 0, done.stderr
        assert "cannot" not in done.stdout + done.stderr
        assert project.did("requirements-detectron2") == 0


def test_new_torch_that_detectron2_does_not_fit_has_it_built_again(project, repository):
    project.source(f"{repository}@main")
    assert project.make("install").returncode == 0
    (project.world / "detectron2").unlink()
    future = time.time() + 5
    os.utime(project.folder / "requirements.txt", (future, future))
    assert project.make("install").returncode == 0
    assert project.did("pip install --no-build-isolation -r requirements-detectron2.txt") == 1


# ---- Detectron2 cannot be installed ----


@pytest.mark.parametrize(
    ("goal", "otherwise", "ran"),
    [
        ("demo", "the demo runs on torchvision's detectors", "tools/demo.py"),
        ("test", "the tests that need it are left out", "-m pytest"),
    ],
)
def test_unreachable_detectron2_is_said_once_and_the_rest_runs(project, goal, otherwise, ran):
    for _ in range(2):
        done = project.make(goal)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (sentence,) = [line for line in done.stdout.splitlines() if "Detectron2" in line]
        assert sentence == (
            "Detectron2 cannot be installed (file:///nowhere/detectron2.git cannot be reached), "
            f"so {otherwise}"
        )
        assert project.did(ran) == 1 and project.did("requirements-detectron2") == 0
    assert project.did("pip install") == 0


def test_detectron2_that_does_not_run_is_removed_so_that_the_rest_runs_without_it(project):
    (project.world / "detectron2_that_does_not_run").touch()
    assert project.make("test").returncode == 0
    log = (project.world / "log").read_text()
    assert 0 < log.index("pip uninstall -y detectron2") < log.index("-m pytest")


@pytest.mark.parametrize("goal", ["install", "test-all", "demo ENGINE=detectron2"])
def test_where_detectron2_is_demanded_its_lack_is_an_error_before_any_download(project, goal):
    done = project.make(*goal.split())
    assert done.returncode != 0
    assert done.stderr.startswith("error: Detectron2 cannot be installed (file:///nowhere")
    assert (project.world / "log").read_text() == ""


@pytest.mark.parametrize("goal", ["demo", "test"])
@pytest.mark.parametrize("source", ["/nowhere/d2.whl", "d2.whl", UNREACHABLE, "http://localhost:1"])
def test_named_source_that_is_not_there_is_refused_before_any_download(
    project, repository, goal, source
):
    project.source(f"{repository}@main")
    done = project.make(goal, f"DETECTRON2={source}")
    assert done.returncode != 0
    sentence, *rest = done.stderr.splitlines()
    assert sentence.startswith("error: Detectron2 cannot be installed (")
    assert re.search(r"there is no file|cannot be reached", sentence)
    assert all(line.startswith("make: ***") for line in rest) and done.stdout == ""
    assert (project.world / "log").read_text() == ""


def test_named_source_whose_build_fails_is_an_error(project, tmp_path):
    (project.world / "build_fails").touch()
    (tmp_path / "detectron2.whl").touch()
    for _ in range(2):
        done = project.make("demo", f"DETECTRON2={tmp_path / 'detectron2.whl'}")
        assert done.returncode != 0
        assert "no compiler" in done.stderr and "error: Detectron2 cannot" in done.stderr
        assert project.did("detectron2.whl") == 1 and project.did("tools/demo.py") == 0


def test_failed_build_is_tried_again_by_make_install_only(project, repository):
    project.source(f"{repository}@main")
    (project.world / "build_fails").touch()
    first, second = (project.make("test") for _ in range(2))
    assert "no compiler" in first.stderr and "no compiler" not in second.stderr
    assert "make install tries again" in second.stdout
    for done in (first, second):
        assert done.returncode == 0
        assert "so the tests that need it are left out" in done.stdout
    assert project.did("pip install") == 0 and project.did("-m pytest") == 1
    assert project.make("install").returncode != 0
    (project.world / "build_fails").unlink()
    assert project.make("install").returncode == 0
    assert project.make("test").stdout.count("Detectron2") == 0


def test_failure_of_the_index_is_shown_in_its_own_words_and_downloads_nothing_twice(
    project, repository
):
    project.source(f"{repository}@main")
    (project.world / "index_fails").touch()
    for goal in ("demo", "test", "install", "lint"):
        done = project.make(goal)
        assert done.returncode != 0
        assert "ERROR: no index" in done.stderr
        assert "Detectron2" not in done.stdout + done.stderr
        assert project.did("pip install") == 1
        assert project.did("tools/demo.py") == project.did("pytest") == 0


def test_engine_torchvision_needs_no_detectron2(project):
    done = project.make("demo", "ENGINE=torchvision")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert project.did("tools/demo.py --engine torchvision") == 1
    assert project.did("detectron2") == 0


def test_unknown_engine_is_refused_before_anything_is_installed(project, repository):
    project.source(f"{repository}@main")
    done = project.make("demo", "ENGINE=foo")
    assert done.returncode != 0
    assert "ENGINE is 'foo'; it can be detectron2 or torchvision" in done.stderr
    assert done.stderr.count("\n") == 1 and (project.world / "log").read_text() == ""


def test_without_git_the_sentence_says_so(project, tmp_path):
    tools = tmp_path / "path"
    tools.mkdir()
    for name in ("make", "sh", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    done = project.make("demo", PATH=str(tools))
    assert done.returncode == 0, done.stderr
    assert "(git, which fetches it, is not installed), so the demo runs on" in done.stdout


# ---- tools/check_source.py ----


def check_source(argument, *options: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tools" / "check_source.py"), str(argument), *options]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.fixture
def serve():
    """``serve(seconds)`` starts a web server that answers after so long; returns its address."""
    servers = []

    def start(seconds: float) -> str:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                path = self.rfile.readline().split()[1].decode()
                closing.wait(seconds)
                body = f"{'0' * 40}\trefs/heads/main\n" if "info/refs" in path else "ref: x\n"
                status = "404 Not Found" if "gone" in path else "200 OK"
                head = f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
                self.wfile.write((head + body).encode())

        closing = threading.Event()
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append((server, closing))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, closing in servers:
        closing.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("form", ["{}/d2.whl", "git+{}/d2.git@main"])
def test_slow_server_is_waited_for_and_a_silent_one_is_not_for_ever(serve, form):
    no_proxy = {"no_proxy": "*", "NO_PROXY": "*"}
    assert check_source(form.format(serve(2)), **no_proxy) == (0, "")
    begun = time.monotonic()
    code, sentence = check_source(form.format(serve(60)), "--patience", "0.5", **no_proxy)
    assert code == 1 and "does not answer" in sentence
    assert time.monotonic() - begun < 15


def test_wheel_that_a_server_does_not_have_is_unreachable(serve):
    code, sentence = check_source(f"{serve(0)}/gone.whl", no_proxy="*")
    assert code == 1 and "gone.whl does not exist" in sentence


@pytest.mark.parametrize("form", ["{}@feature/x", "{}@main", "{}", "detectron2@{}@a/b/c#egg=x"])
def test_branch_of_a_git_url_may_have_a_slash(repository, form):
    assert check_source(form.format(repository)) == (0, "")


def test_missing_git_has_a_sentence_and_an_exit_code_of_its_own(repository, tmp_path):
    assert check_source(repository, PATH=str(tmp_path)) == (
        3,
        "git, which fetches it, is not installed\n",
    )


def test_files_that_are_not_there_have_an_exit_code_of_their_own(tmp_path):
    (tmp_path / "d2.whl").touch()
    for form in ("{}/d2.whl", "file://{}/d2.whl", "detectron2 @ file://{}/d2.whl", "{}[all]"):
        assert check_source(form.format(tmp_path)) == (0, ""), form
    for form in ("{}/gone.whl", "file://{}/gone.whl", "{}/gone[all]", "gone.whl", "./gone"):
        code, sentence = check_source(form.format(tmp_path))
        assert code == 4 and sentence.startswith("there is no file or folder "), form
    assert check_source("detectron2==0.6") == (0, "")


def test_requirements_file_of_comments_names_no_package(tmp_path):
    (tmp_path / "requirements.txt").write_text("# Nothing yet.\n\n")
    code, sentence = check_source(tmp_path / "requirements.txt")
    assert code == 4 and sentence.endswith("requirements.txt names no package\n")
