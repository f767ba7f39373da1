"""Private names of LitServe; nothing else in this package may use them.

`tests/test_private_names.py` tries each function against the installed version and names the one that moved.
"""

from typing import Any

OF_BASE_CLASSES = {"litserve.LitServer": ("_init_manager", "_start_server", "_start_worker_monitoring")}    # overridden


def response_transport(server: Any) -> Any:
    """Carries what workers answer to the processes of the API."""
    return server._transport


def request_queue(server: Any, path: str) -> Any:
    """Carries requests of a path to the worker."""
    return server._get_request_queue(path)


def shutdown_event(server: Any) -> Any:
    """Ends the server when set."""
    return server._shutdown_event


def queues_pid(manager: Any) -> int:
    """Process that holds the queues."""
    return int(manager._process.pid)
