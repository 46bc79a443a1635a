"""A limit on the time of an HTTP exchange, whatever the server does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping
from typing import Any


class Clock:
    """Ends an exchange that takes too long: shuts its connection, whatever is being waited for.

    A time limit of a socket is one for each read, so a server that sends a byte now and then, of
    the handshake, the headers or the body, would never exceed it. `trace` goes into the extensions
    of a request of httpx. The request must open its own connection
    (`max_keepalive_connections=0`).

    Args:
        seconds: from now to the end of the exchange.

    Attributes:
        expired: the time is up.
    """

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end)
        self._timer.daemon = True
        self._timer.start()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpcore at each step; remembers the connection."""
        if event.endswith("connect_tcp.complete"):
            opened = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._close()
                # A second handle on the connection: TLS takes the first one over, and other threads
                # may be reading from it.
                self._socket = opened.dup()
                if self.expired:
                    self._shut()

    def stop(self) -> None:
        """The exchange is over."""
        self._timer.cancel()
        with self._lock:
            self._close()

    def _end(self) -> None:
        with self._lock:
            self.expired = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
