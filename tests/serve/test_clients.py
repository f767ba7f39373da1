"""If this breaks: agents and programs that use langchain, instructor or litellm get errors from this server, or values of another type."""

import importlib.util

import pytest

PACKAGES = ("langchain_openai", "instructor", "litellm")


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in PACKAGES),
                    reason="langchain-openai, instructor and litellm are not installed here; `clients.py` says how to run it")
def test_clients_that_others_wrote(calling):
    from clients import main

    assert not main(calling.url, "calling")
