"""The tools of an MCP server (Model Context Protocol), over stdio or HTTP.

with MCPTools(["python", "server.py"]) as server:        # or MCPTools("http://127.0.0.1:8000/mcp")
    agent = MemoryEfficientAgent(model, environment=ToolBox(server.tools))
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from mem1_kernels._secrets import public_address
from mem1_kernels._text import error_text
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.tools import Tool
from mem1_kernels.plugs._loop import Loop

_CLOSING = 60.0  # seconds; a command that does not end is killed before


class MCPTools:
    """A connection to an MCP server, which stays open until it is closed.

    Args:
        server: an address (streamable HTTP), or the command that starts a server which speaks over
            stdio, as a list of its words.
        names: the tools that may be called. Default: all that the server has.
        timeout: seconds for the connection and for each call.

    Attributes:
        tools: for `ToolBox`. A result's texts are joined by line feeds; another part is named by
            its kind, such as "[image]". A result that is an error comes back as text.

    Raises:
        ImportError: `mcp` is not installed (`pip install mem1-kernels[mcp]`; 2.3 or newer).
        TypeError: a server of another type.
        ToolError: no server there, or one that breaks off; from a call too.
        ValueError: a name that the server does not have.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        names: Sequence[str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        try:
            import mcp
        except ImportError as error:
            raise ImportError("mcp is not installed (`pip install mem1-kernels[mcp]`)") from error
        where: Any = server
        if not isinstance(server, str):
            words = list(server) if isinstance(server, Sequence) else []
            if not words or not all(isinstance(word, str) for word in words):
                raise TypeError(f"server: expected an address or a list of words, got {server!r}")
            where = mcp.StdioServerParameters(command=words[0], args=words[1:])
        self.timeout = timeout
        self._name = public_address(server) if isinstance(server, str) else words[0]
        self._loop = Loop()
        self._closing = asyncio.Event()
        self._ready: asyncio.Future[Any] | None = None
        try:
            client, listed = self._loop.run(self._open(mcp.Client(where)), timeout)
        except BaseException as error:
            self.close()
            raise self._error(error) from None
        self._client = client
        offered = {tool.name: tool for tool in listed}
        unknown = [name for name in names or () if name not in offered]
        if unknown:
            self.close()
            raise ValueError(f"names: expected some of {list(offered)}, got {unknown}")
        self.tools = [
            Tool(tool.name, tool.description or "", tool.input_schema, self._caller(tool.name))
            for tool in offered.values()
            if names is None or tool.name in names
        ]

    def close(self) -> None:
        """Ends the connection, and a server that was started."""
        if self._ready is not None:
            self._loop.run(self._finish(), _CLOSING)
        self._loop.close()

    def __enter__(self) -> MCPTools:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _open(self, client: Any) -> tuple[Any, list[Any]]:
        # The task that opens the client must be the one that closes it.
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._ready = ready
        self._task = asyncio.create_task(self._hold(client, ready))
        return await asyncio.shield(ready)

    async def _hold(self, client: Any, ready: asyncio.Future[Any]) -> None:
        try:
            async with client:
                tools, cursor = [], None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if not cursor:
                        break
                ready.set_result((client, tools))
                await self._closing.wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _finish(self) -> None:
        self._closing.set()
        assert self._ready is not None
        if not self._ready.done():
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()  # it was told to the caller

    def _caller(self, name: str) -> Any:
        def call(arguments: dict[str, Any]) -> str:
            try:
                result = self._loop.run(self._client.call_tool(name, arguments), self.timeout)
            except Exception as error:
                raise self._error(error) from None
            parts = [
                part.text if part.type == "text" else f"[{part.type}]" for part in result.content
            ]
            return ("error: " if result.is_error else "") + "\n".join(parts)

        return call

    def _error(self, error: BaseException) -> BaseException:
        inside: Any = getattr(error, "exceptions", None)
        if inside and len(inside) == 1:  # a group of one
            return self._error(inside[0])
        if not isinstance(error, Exception):
            return error
        late = isinstance(error, TimeoutError | asyncio.TimeoutError)
        reason = f"no answer within {self.timeout:g} s" if late else error_text(error)
        return ToolError(f"MCP server {self._name}: {reason}")
