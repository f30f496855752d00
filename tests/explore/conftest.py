"""One run for all tests of this folder; its store is read, but for what is kept in `explore/`."""

from pathlib import Path

import pytest
from tiny_run import make_run


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("store") / "results")
