"""Fixtures of the tests in this folder."""

import pytest
from lives import Lives


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """Real commands in processes that are forked from one, for the tests of a file."""
    lives = Lives(tmp_path_factory.mktemp("lives"))
    yield lives
    lives.close()
