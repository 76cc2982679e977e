"""For all tests: registrations are undone, what did not run is counted at the end.

``make test`` leaves out the tests marked ``slow``. Where Detectron2 is not installed, test files
that import it are left out too, and so are tests of which a fixture needs it; a test that imports
it by itself fails. What was left out is said in the last lines, with its number.
"""

import ast
import importlib.util
import logging
import runpy
import sys
from pathlib import Path

import pytest

from kd_detectron.distillers import DISTILLER_REGISTRY

DETECTRON2_IS_MISSING = importlib.util.find_spec("detectron2") is None

slow: set[str] = set()
files_without_detectron2: set[Path] = set()
tests_without_detectron2: set[str] = set()


@pytest.fixture(autouse=True)
def no_handlers_left_behind():
    """Detectron2's loggers write to the stdout of the test that set them up, which is closed."""
    yield
    module = sys.modules.get("detectron2.utils.logger")
    if module is None:
        return
    for name in ("detectron2", "fvcore", "kd_detectron", "kd_detectron.inherit"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
    module.setup_logger.cache_clear()


@pytest.fixture(autouse=True)
def no_datasets_left_behind():
    """Detectron2's catalogs are global: names that a test adds are removed."""
    module = sys.modules.get("detectron2.data")
    if module is None:
        yield
        return
    known = set(module.DatasetCatalog)
    yield
    for name in set(module.DatasetCatalog) - known:
        module.DatasetCatalog.remove(name)
        if name in module.MetadataCatalog:
            module.MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def no_distillers_left_behind():
    """Distillers that a test registers are removed; fvcore's registry has no public way to."""
    known = dict(DISTILLER_REGISTRY)
    yield
    for name in {name for name, _ in DISTILLER_REGISTRY} - set(known):
        DISTILLER_REGISTRY._obj_map.pop(name)


# ---- tests that need Detectron2, where it is not installed ----


@pytest.fixture
def needs_detectron2():
    """For a test that itself imports Detectron2: it is left out where that is not installed."""
    import detectron2  # noqa: F401


def _needs_detectron2(error: BaseException | None) -> bool:
    while error is not None:
        # Ours (kd_detectron.get_config) says so in words.
        if isinstance(error, ImportError) and (
            (error.name or "").startswith("detectron2") or "needs Detectron2" in str(error)
        ):
            return True
        # Not its context: an import that failed in place of Detectron2's is a failure of its own.
        error = error.__cause__
    return False


class ModuleWithoutDetectron2(pytest.Module):
    """A test file that has no tests if it cannot be imported without Detectron2."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            if not _needs_detectron2(error):
                raise
            files_without_detectron2.add(self.path)
            return []


def pytest_pycollect_makemodule(module_path, parent):
    if DETECTRON2_IS_MISSING:
        return ModuleWithoutDetectron2.from_parent(parent, path=module_path)
    return None


def pytest_ignore_collect(collection_path, config):
    """Leaves out folders whose ``conftest.py`` needs Detectron2."""
    conftest = collection_path / "conftest.py"
    if (
        not DETECTRON2_IS_MISSING
        or not conftest.is_file()
        or collection_path == Path(__file__).parent
    ):
        return None
    try:
        runpy.run_path(str(conftest))
    except ImportError as error:
        if not _needs_detectron2(error):
            raise
        files_without_detectron2.update(collection_path.rglob("test_*.py"))
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Leaves out a test of which a fixture needs Detectron2."""
    try:
        return (yield)
    except ImportError as error:
        if not DETECTRON2_IS_MISSING or not _needs_detectron2(error):
            raise
        tests_without_detectron2.add(f"{item.path}::{item.originalname}")
    pytest.skip("needs Detectron2")


def _test_functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f"{file}::{name}" for name in functions if name.startswith("test_")}


# ---- what did not run, in the last lines; under pytest-xdist the workers report it ----


def pytest_deselected(items):
    slow.update(item.nodeid for item in items if item.get_closest_marker("slow"))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = sorted(slow)
        files = [str(file) for file in sorted(files_without_detectron2)]
        session.config.workeroutput["files_without_detectron2"] = files
        session.config.workeroutput["tests_without_detectron2"] = sorted(tests_without_detectron2)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    output = getattr(node, "workeroutput", {})
    slow.update(output.get("slow", ()))
    files_without_detectron2.update(map(Path, output.get("files_without_detectron2", ())))
    tests_without_detectron2.update(output.get("tests_without_detectron2", ()))


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    if slow:
        reporter.write_line(f"not run: {len(slow)} tests marked slow; make test-all runs them")
    functions = tests_without_detectron2.union(*map(_test_functions, files_without_detectron2))
    if functions:
        files = {function.partition("::")[0] for function in functions}
        reporter.write_line(
            f"not run: {len(functions)} test functions in {len(files)} files, which need "
            "Detectron2: it is not installed here"
        )
