"""Put this folder first on PYTHONPATH to run anything as if Detectron2 were not installed."""

import sys

sys.modules["detectron2"] = None  # find_spec() is None, every import an ImportError
