"""The ``engine`` fixture: each test that takes it runs over every engine that is installed."""

import pytest
from engines import ENGINES


@pytest.fixture(params=ENGINES)
def engine(request, tmp_path):
    return ENGINES[request.param](tmp_path)
