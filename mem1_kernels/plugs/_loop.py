"""An event loop in a thread of its own, for packages that are asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Loop:
    """Runs coroutines from any thread, all in one event loop, until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, _Result]) -> Any:
        """Starts a coroutine; the future is one of `concurrent.futures`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, _Result], timeout: float | None = None) -> _Result:
        """The result of a coroutine.

        Raises:
            TimeoutError: it took longer than `timeout` seconds; it is cancelled.
        """

        async def limited() -> _Result:
            return await asyncio.wait_for(work, timeout)

        return self.start(limited()).result()

    def close(self) -> None:
        """Ends the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
