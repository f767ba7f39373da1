"""Fixtures of the tests in this folder."""

import pytest
from run_processes import RunProcesses


@pytest.fixture(scope="module")
def run_processes(tmp_path_factory):
    """Real commands in processes that are forked from one, for the tests of a file."""
    run_processes = RunProcesses(tmp_path_factory.mktemp("run_processes"))
    yield run_processes
    run_processes.close()
