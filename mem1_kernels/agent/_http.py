"""JSON over HTTP for the tools: time limits, retries, and errors that say what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mem1_kernels.agent.environment import ToolError

if TYPE_CHECKING:
    import httpx

RETRIED = {408, 425, 429, 500, 502, 503, 504}
SHOWN = 200


class HTTP:
    """An HTTP client whose every failure is a `ToolError` that names the service.

    Args:
        service: who is asked, for error messages; the address is never shown beyond its host, as a
            key may stand in it.
        timeout: seconds for a connection and for each read.
        retries: further attempts after a lost connection, a time-out or a status that may pass;
            the pause between attempts starts at `pause` seconds and doubles.
    """

    def __init__(
        self, service: str, *, timeout: float = 30.0, retries: int = 3, pause: float = 0.5
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                f"{service}: httpx is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        if timeout <= 0:
            raise ValueError(f"timeout: expected more than 0 seconds, got {timeout}")
        if retries < 0:
            raise ValueError(f"retries: expected at least 0, got {retries}")
        self.service = service
        self.retries = retries
        self.pause = pause
        self._client = httpx.Client(timeout=timeout, follow_redirects=True)

    def request(self, method: str, url: str, **arguments: Any) -> httpx.Response:
        """Sends a request and returns a response of status 2xx."""
        import httpx

        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                response = self._client.request(method, url, **arguments)
            except httpx.InvalidURL as error:
                raise ToolError(f"{self.service}: not an address: {error}") from None
            except httpx.TimeoutException as error:
                problem = f"no answer in time ({type(error).__name__})"
            except httpx.TransportError as error:
                problem = f"no connection ({type(error).__name__}: {error})"
            except httpx.RequestError as error:  # a loop of redirects, a body that does not unpack
                raise ToolError(f"{self.service}: {type(error).__name__}: {error}") from None
            else:
                if response.is_success:
                    return response
                problem = f"status {response.status_code}: {response.text[:SHOWN]!r}"
                if response.status_code not in RETRIED:
                    raise ToolError(f"{self.service}: {problem}")
        tries = f"{self.retries + 1} attempt{'s' if self.retries else ''}"
        raise ToolError(f"{self.service}: {problem}, after {tries}")

    def json(self, method: str, url: str, read: Callable[[Any], Any], **arguments: Any) -> Any:
        """Sends a request and returns `read(its JSON)`; a shape `read` trips over is an error."""
        response = self.request(method, url, **arguments)
        try:
            content = response.json()
        except ValueError:
            raise ToolError(
                f"{self.service}: expected JSON, got {response.text[:SHOWN]!r}"
            ) from None
        try:
            return read(content)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            shape = sorted(content) if isinstance(content, Mapping) else type(content).__name__
            raise ToolError(
                f"{self.service}: unexpected reply ({type(error).__name__}: {error}), got {shape}"
            ) from error
