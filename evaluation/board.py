"""State shared by the processes of an evaluation: open tasks, results, and the end of the work."""

from __future__ import annotations

from common.processes import Processes


class Board:
    """A counter and messages to the first process, in torch's store: a work queue without synchronisation of the processes.

    The processes may run at different times, on several machines. Only the first process must live as long as the others.
    """

    def __init__(self, processes: Processes, name: str) -> None:
        """Open the board `name`; processes that use the same name share it."""
        self._store, self._name, self._read = processes.store, name, 0

    def take(self) -> int:
        """Return the next of the numbers 0, 1, 2, …; each number is returned to one process only."""
        return self._store.add(f"{self._name}/taken", 1) - 1

    def post(self, message: bytes) -> None:
        """Send a message (at most a few MB) to the first process."""
        number = self._store.add(f"{self._name}/posted", 1)
        self._store.set(f"{self._name}/message/{number}", message)

    def messages(self) -> list[bytes]:
        """Return the messages posted since the last call; for the first process only."""
        found = []
        while self._read < self._store.add(f"{self._name}/posted", 0):
            self._read += 1
            key = f"{self._name}/message/{self._read}"
            found.append(self._store.get(key))  # waits if the message is counted but not yet written
            self._store.delete_key(key)
        return found

    def skip(self, number: int) -> None:
        """Mark evaluation `number` as one that needs no more work, for all processes."""
        self._store.add(f"{self._name}/skipped/{number}", 1)

    def skipped(self, number: int) -> bool:
        """Return whether evaluation `number` needs no more work."""
        return self._store.add(f"{self._name}/skipped/{number}", 0) > 0

    def close(self, reason: str = "") -> None:
        """Mark the work as ended for all processes, with a reason if it failed. The first reason is kept."""
        if self._store.add(f"{self._name}/closed", 1) == 1:
            self._store.set(f"{self._name}/reason", reason)

    def closed(self) -> str | None:
        """Return None during the work, and the reason of its end afterwards."""
        return self._store.get(f"{self._name}/reason").decode() if self._store.add(f"{self._name}/closed", 0) else None
