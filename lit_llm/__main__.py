"""`python -m lit_llm VERB`."""

import os
import signal
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    """Until a run listens itself there is nothing to save. Ctrl-C within an import would be a crash in a library."""
    if number == signal.SIGINT:
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame is None:
            raise KeyboardInterrupt
    os.write(2, b"error: stopped\n")
    os._exit(130 if number == signal.SIGINT else 143)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end)
    from lit_llm.cli import main

    main()
