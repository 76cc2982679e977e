"""Makes Detectron2 unimportable where this folder comes first on PYTHONPATH, for tests."""

from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


def _find_spec_of_others(name, path=None, target=None):
    return None if name.split(".")[0] == "detectron2" else _find_spec(name, path, target)


PathFinder.find_spec = _find_spec_of_others
