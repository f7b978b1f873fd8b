"""The folder in which processes share jobs: a result per job, and a lock while somebody is at it."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adaptclip.errors import StorageError
from adaptclip.seals import read_sealed, write_sealed
from adaptclip.storage import digest


def launch_id() -> str:
    """Returns a name that the processes of one launch share on a machine, and no other launch has.

    Address and port are always the same under `accelerate launch`: what tells its launches apart is the launcher, which
    is the parent of its processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        return digest([*(os.environ.get(name, "") for name in names), socket.gethostname(), str(os.getppid())])[:16]
    return uuid.uuid4().hex[:16]


class Board:
    """Results and claims of jobs.

    A job is done when its result file is there, and files come whole or not at all. A claim is a lock that the
    operating system takes back when its process ends in whatever way, so that a killed process leaves nothing to clean
    up and no job is done twice. A failure counts for the launch in which it happened; the next one tries again.

        <folder>/<key>.json          result
        <folder>/<key>.failed.json   why it has none
        <folder>/<key>.lock          exists while and after somebody worked on it
    """

    def __init__(self, folder: Path, launch: str) -> None:
        """Shares jobs in `folder`, which need not exist yet, with all processes that name the same one."""
        self.folder, self._launch = folder, launch

    def result(self, key: str) -> dict[str, Any] | None:
        """Returns the result of a job, or None where there is none (or only a damaged one)."""
        try:
            found, _ = read_sealed(self.folder, f"{key}.json")
        except StorageError:
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def failure(self, key: str) -> dict[str, Any] | None:
        """Returns why a job failed in this launch, or None."""
        try:
            found, _ = read_sealed(self.folder, f"{key}.failed.json")
        except StorageError:
            return None
        return found if isinstance(found, dict) and found.get("launch") == self._launch else None

    def is_settled(self, key: str) -> bool:
        """Whether there is nothing left to do: the job has a result, or failed in this launch."""
        return self.result(key) is not None or self.failure(key) is not None

    def finish(self, key: str, result: dict[str, Any]) -> None:
        """Writes the result of a job."""
        write_sealed(self.folder / f"{key}.json", {"key": key, **result})
        (self.folder / f"{key}.failed.json").unlink(missing_ok=True)

    def fail(self, key: str, failure: dict[str, Any]) -> None:
        """Writes why a job has no result."""
        write_sealed(self.folder / f"{key}.failed.json", {"key": key, "launch": self._launch, **failure})

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yields whether the job is this process's now; it is given back when the block ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{key}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            # Somebody may have finished it between the last look and the lock.
            yield not self.is_settled(key)
        finally:
            lock.release()
