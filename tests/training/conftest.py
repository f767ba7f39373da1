"""Fixtures of the tests in this folder."""

import pytest
from run_processes import RunProcesses


@pytest.fixture(scope="module")
def run_processes(tmp_path_factory, fork_server):
    """Real commands in processes that are forked from one, in a folder for the tests of a file."""
    return RunProcesses(tmp_path_factory.mktemp("run_processes"), fork_server)
