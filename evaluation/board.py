"""What the processes of an evaluation share: open work, results, and the end."""

from __future__ import annotations

from common.processes import Processes


class Board:
    """Numbers handed out once, and messages to the first process: what a work queue needs, without any process waiting for another.

    The processes may be far apart in time, on several machines; only the first one must live as long as the others.
    """

    def __init__(self, processes: Processes, name: str) -> None:
        """The board called `name`, the same for every process that asks for it."""
        self._store, self._name, self._read = processes.store, name, 0

    def take(self) -> int:
        """The next of the numbers 0, 1, 2, …; no other process gets the same."""
        return self._store.add(f"{self._name}/taken", 1) - 1

    def post(self, message: bytes) -> None:
        """Leave a message (at most a few MB) for the first process."""
        number = self._store.add(f"{self._name}/posted", 1)
        self._store.set(f"{self._name}/message/{number}", message)

    def messages(self) -> list[bytes]:
        """What has been posted since the last call; for the first process only."""
        found = []
        while self._read < self._store.add(f"{self._name}/posted", 0):
            self._read += 1
            key = f"{self._name}/message/{self._read}"
            found.append(self._store.get(key))  # waits the moment between counting and writing
            self._store.delete_key(key)
        return found

    def skip(self, number: int) -> None:
        """Tell every process that evaluation `number` needs no more work."""
        self._store.add(f"{self._name}/skipped/{number}", 1)

    def skipped(self, number: int) -> bool:
        """Whether evaluation `number` needs no more work."""
        return self._store.add(f"{self._name}/skipped/{number}", 0) > 0

    def close(self, reason: str = "") -> None:
        """Tell every process that the work is over, and why if it failed. The first reason stays."""
        if self._store.add(f"{self._name}/closed", 1) == 1:
            self._store.set(f"{self._name}/reason", reason)

    def closed(self) -> str | None:
        """None while the work goes on, then the reason it ended."""
        return self._store.get(f"{self._name}/reason").decode() if self._store.add(f"{self._name}/closed", 0) else None
