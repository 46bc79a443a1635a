"""Research over 26 sources in one task: 105 turns, real HTTP, and a context that stays flat.

python examples/research.py                                   a scripted policy
python examples/research.py Qwen/Qwen2.5-7B-Instruct          any model

Each source is four pages on a web server of this machine, one link behind the other. The answer is
a sum over all pages, so nothing can be left out.
"""

import random
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import urlopen

from mem1_kernels.agent import MemoryEfficientAgent, QATask, Result
from mem1_kernels.agent.tools import Tool, ToolBox
from mem1_kernels.plugs.chat import TextEngine

SOURCES, PAGES = 26, 4
rng = random.Random(0)
TONNES = [rng.randint(10, 99) for _ in range(SOURCES * PAGES)]


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        at = int(self.path.strip("/"))
        more = f"Go on at /{at + 1}." if at + 1 < len(TONNES) else "This was the last page."
        prose = " ".join(rng.choices(["harvest", "market", "weather", "rail", "port"], k=40))
        body = f"Source {at // PAGES + 1}. {prose}. Tonnes: {TONNES[at]}. {more}"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None:
        """Quiet."""


def scripted(context: str) -> str:
    """Sees the live context only: what it needs later stands in its state."""
    states = re.findall(r"<think>sum (\d+)</think>", context)
    pages = re.findall(r"Tonnes: (\d+)\. (?:Go on at (/\d+))?", context)
    if not pages:
        return '<think>sum 0</think><tool>{"name": "get", "arguments": {"path": "/0"}}</tool>'
    total = int(states[-1]) + int(pages[-1][0])
    if not pages[-1][1]:
        return f"<think>sum {total}</think><answer>{total}</answer>"
    call = f'{{"name": "get", "arguments": {{"path": "{pages[-1][1]}"}}}}'
    return f"<think>sum {total}</think><tool>{call}</tool>"


def main(model: Any = None, tokenizer: Any = None, max_turns: int = 110) -> Result:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path: str) -> str:
        """Gets a page of the site, such as /0, which is the first."""
        if not re.fullmatch(r"/\d+", path):
            raise ValueError("expected a path such as /0")
        with urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=10) as reply:
            return str(reply.read().decode())

    task = QATask(("How many tonnes do all pages report together?",), ((str(sum(TONNES)),),))
    engine = TextEngine(scripted) if model is None else "pruned"
    box = ToolBox([Tool.of(get)])
    agent = MemoryEfficientAgent(model, tokenizer=tokenizer, engine=engine, environment=box)
    try:
        result = agent.run([task], max_turns=max_turns)[0]
    finally:
        server.shutdown()
        server.server_close()
    print(f"{len(result.turns)} turns, reward {result.reward}, answer {result.answer!r}")
    print(f"context: at most {result.peak_context:,} of {result.total_tokens:,} tokens")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
