"""Lock a folder for the single process that may write it, or report which process holds the lock.

The lock is the operating system's (POSIX record locks; a locked byte on Windows, which is not tested on Windows): it
is released when its process ends in any way, is not inherited by workers, and needs no cleanup. Its reach:

- On a local disk: all processes of the machine, including those in containers.
- On NFS, Lustre and similar: all machines that mount it with locks, which is the default of NFS 4. The lock of a
  machine that dies is kept until the server releases it (NFS 4: about 90 seconds; NFS 3: until the machine restarts).
- On a file system without locks: by the content of the lock file. On the same machine a dead process is recognised. A
  process of another machine is assumed to be alive, unless SLURM restarted this same job.

Threads of one process do not exclude each other.
"""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lit_llm.errors import InputError

NAME = ".lock"                                      # in a folder that is being written
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


WINDOWS = os.name == "nt"
BEYOND = 1 << 30                                    # position of the byte that is locked on Windows, after the text


def lock_on_posix(file: IO[str], *, shared: bool = False) -> None:
    """Lock an open file without waiting; closing the file releases the lock.

    Args:
        file: The open file; for an exclusive lock it is open for writing.
        shared: Whether other shared locks are allowed.

    Raises:
        OSError: Another process holds the lock, or the file system has no locks.
    """
    import fcntl

    fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def lock_on_windows(file: IO[str], *, shared: bool = False) -> None:
    """Do the same on Windows, where a lock is always exclusive and forbids reading what it covers; not tested there.

    Args:
        file: The open file. A single byte behind the text is locked, so that others can read who holds the lock.
        shared: Has no effect.

    Raises:
        OSError: Another process holds the lock.
    """
    import msvcrt

    os.lseek(file.fileno(), BEYOND, os.SEEK_SET)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)


lock_file = lock_on_windows if WINDOWS else lock_on_posix


class HeldError(InputError):
    """Another process holds the lock."""


class Lock:
    """At most one file, locked by this process."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._handle: IO[str] | None = None

    def take(self, file: Path, where: str, what: Path | None = None) -> InputError | None:
        """Lock a file and release the previous one; returns null, or an error that names the holder.

        Args:
            file: The lock file, created if necessary in an existing folder.
            where: The key or option for what is written.
            what: What is written; null is the file's folder.
        """
        if self.holds(file):
            return None                             # closing a second handle would release the lock
        while True:
            try:
                handle = open(file, "a+", encoding="utf-8")  # noqa: SIM115  (held until `release`)
            except OSError as error:
                return InputError(f"cannot be written: {error.strerror}", where=str(file.parent))
            try:
                lock_file(handle)
                is_held = False
            except OSError as error:
                is_held = error.errno in HELD or (error.errno in NO_LOCKS and _is_alive(_read(handle)))
                if not is_held and error.errno not in NO_LOCKS:
                    handle.close()
                    return InputError(f"cannot be locked: {error.strerror}", where=str(file))
            if is_held:
                refusal = _refusal(file, what or file.parent, _read(handle), where)
                handle.close()
                return refusal
            if _is_same(file, handle):              # otherwise its holder has removed it
                break
            handle.close()
        with suppress(OSError):                     # a full disk does not matter
            handle.truncate(0)
            handle.write(json.dumps(_me()))
            handle.flush()
        self._close()
        self._file, self._handle = file, handle
        return None

    def holds(self, file: Path) -> bool:
        """Whether this process holds the lock on this file."""
        return self._file == file and self._handle is not None and _is_same(file, self._handle)

    def release(self) -> None:
        """Remove the file and release the lock."""
        if self._file is not None and self._handle is not None and _is_same(self._file, self._handle):
            with suppress(OSError):
                self._file.unlink()
            if WINDOWS:                             # where an open file cannot be removed
                self._handle.close()
                with suppress(OSError):             # the next holder has opened it
                    self._file.unlink()
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            with suppress(OSError):
                self._handle.close()
        self._file = self._handle = None


def is_held(file: Path) -> bool:
    """Whether another process holds the lock on a file. Never for this process's own, which it would release."""
    try:
        with open(file, encoding="utf-8") as handle:
            try:
                lock_file(handle, shared=True)
            except OSError as error:
                return error.errno in HELD or _is_alive(_read(handle))
    except OSError:
        return False                                # there is none
    return False


def _is_same(file: Path, handle: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle.fileno()))
    except OSError:
        return False


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid()), "time": time.time(),
            "job": os.environ.get("SLURM_JOB_ID")}


def _began(pid: int) -> str | None:
    """Start time of a process in the kernel's ticks, because process ids are reused; null if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(handle: IO[str]) -> dict[str, Any]:
    try:
        handle.seek(0)
        holder = json.loads(handle.read(4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote the file may still run, on file systems without locks."""
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
        return not (again and holder.get("job") and holder.get("job") == os.environ.get("SLURM_JOB_ID"))
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if WINDOWS:
        return True                                 # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass                                        # a process of another user
    return _began(pid) == holder.get("began")


def _refusal(file: Path, what: Path, holder: dict[str, Any], where: str) -> HeldError:
    who = "another process"
    if holder:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder.get("time") or 0)))
        who = f"process {holder.get('pid')} on {str(holder.get('host'))[:100]}, since {began}"
    return HeldError(f"{what} is being written by {who}", where=where, fix="wait for it, stop it, or write "
                      f"into another folder; if it certainly no longer runs, delete {file}")
