"""A support desk: several tickets, real SQLite, and preferences remembered per customer.

python examples/support_desk.py                               a scripted policy
python examples/support_desk.py Qwen/Qwen2.5-7B-Instruct      any model

Ana says once that she wants vouchers; her next ticket takes it from the memory, Bo's never sees it.
"""

import re
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from mem1_kernels.agent import MemoryEfficientAgent
from mem1_kernels.agent.tools import Tool, ToolBox
from mem1_kernels.plugs.chat import TextEngine

TICKETS = [
    ("ana", "Refund order 1, please. I always want vouchers, never money."),
    ("bo", "Refund order 2, please."),
    ("ana", "Refund order 3, please."),
    ("bo", "Refund order 9, please."),
]


class Desk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.sql("CREATE TABLE orders (id INTEGER PRIMARY KEY, state TEXT)")
        self.sql("INSERT INTO orders VALUES (1, 'paid'), (2, 'paid'), (3, 'paid')")

    def sql(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path)) as db, db:
            return db.execute(text, values).fetchall()

    def look_up(self, order: int) -> str:
        """The state of an order."""
        rows = self.sql("SELECT state FROM orders WHERE id = ?", order)
        return f"order {order}: {rows[0][0] if rows else 'unknown'}"

    def refund(self, order: int, how: str) -> str:
        """Pays a paid order back, as money or as a voucher."""
        if how not in ("money", "voucher"):
            raise ValueError("how: expected money or voucher")
        change = "UPDATE orders SET state = ? WHERE id = ? AND state = 'paid' RETURNING id"
        done = self.sql(change, f"refunded: {how}", order)
        return f"order {order}: {'refunded' if done else 'cannot be refunded'}"


def scripted(context: str) -> str:
    """Sees the live context only; the notes of earlier tickets stand in it."""
    order = re.findall(r"Refund order (\d+)", context)[-1]
    how = "voucher" if "voucher" in context.partition("Refund order")[2] else "money"
    state = f"<think>This customer wants: {how}.</think>"
    if not (seen := re.findall(r"order \d+: ([\w ]+)<", context)):
        return f'{state}<tool>{{"name": "look_up", "arguments": {{"order": {order}}}}}</tool>'
    if seen[-1] == "paid":
        call = f'{{"name": "refund", "arguments": {{"order": {order}, "how": "{how}"}}}}'
        return f"{state}<tool>{call}</tool>"
    return f"{state}<answer>{seen[-1]}</answer>"


def main(model: Any = None, tokenizer: Any = None, max_turns: int = 6) -> tuple[list[Any], Any]:
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder) / "orders.db")
        engine = TextEngine(scripted) if model is None else "pruned"
        box = ToolBox([Tool.of(desk.look_up), Tool.of(desk.refund)])
        options = {"engine": engine, "environment": box, "memory": Path(folder) / "memory.db"}
        agent = MemoryEfficientAgent(model, tokenizer=tokenizer, **options)
        results = [agent.process(text, user=user, max_turns=max_turns) for user, text in TICKETS]
        orders = desk.sql("SELECT id, state FROM orders ORDER BY id")
    print(*[f"{user}: {r.answer}" for (user, _), r in zip(TICKETS, results)], orders, sep="\n")
    return results, orders


if __name__ == "__main__":
    main(*sys.argv[1:2])
