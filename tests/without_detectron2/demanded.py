"""``pytest -p demanded``: the run fails where a part that needs no Detectron2 has run no test.

Otherwise one import in a ``conftest.py`` would leave a whole folder out, and nobody would notice.
"""

from pathlib import PurePath

import pytest

# Folders and files of ``tests/`` whose subject works without Detectron2.
DEMANDED = (
    "data/test_synthetic.py",
    "distillers",
    "losses",
    "runs/test_tables.py",
    "test_docs.py",
    "torchvision",
    "visualize",
)

files_that_ran: set[PurePath] = set()


def without_a_test() -> list[str]:
    """The demanded folders and files of which no test ran."""
    parts = {
        PurePath(*file.parts[: n + 1]) for file in files_that_ran for n in range(len(file.parts))
    }
    return [name for name in DEMANDED if PurePath("tests", name) not in parts]


def pytest_runtest_logreport(report):
    if report.when == "call" and not report.skipped:
        files_that_ran.add(PurePath(report.nodeid.partition("::")[0]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    # With pytest-xdist each worker knows its own part only; the reports of all come together here.
    if without_a_test() and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config):
    missing, reporter = without_a_test(), config.pluginmanager.get_plugin("terminalreporter")
    if missing and reporter and not hasattr(config, "workerinput"):
        reporter.write_line(f"error: no test ran of {', '.join(missing)} (tests/)")
