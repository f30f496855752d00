"""Results trees of whole runs, built once for all tests of the report."""

from pathlib import Path

import pages
import pytest
import trees


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> dict[str, Path]:
    """The folders of a whole run."""
    return trees.build_tree(tmp_path_factory.mktemp("results"), trees.settings())


@pytest.fixture(scope="session")
def bare_tree(tmp_path_factory) -> dict[str, Path]:
    """A run with one phase, two experts, and data without labels."""
    return trees.build_bare_tree(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def full(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "full"
    pages.write(tree, out)
    return out


@pytest.fixture(scope="session")
def bare(bare_tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "bare"
    pages.write(bare_tree, out)
    return out
