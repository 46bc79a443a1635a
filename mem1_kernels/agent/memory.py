"""What an agent remembers of a user from one task to the next: `UserMemory`, one SQLite file.

    agent = MemoryEfficientAgent(model, memory="memory.db")
    agent.process("Order", ["Which shoes fit me?"], user="ana")
    agent.process("Order", ["And which socks?"], user="ana")   # begins with ana's last state

A task opens the user's notes and, when it is over, replaces the notes that it opened by its last
internal state. Tasks of one user that overlap replace nothing of each other: each leaves its state,
and the next task opens them all.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mem1_kernels._text import printable
from mem1_kernels.rollout.engine import check_count

_APPLICATION = 0x4D454D31  # "MEM1"
_LONGEST_USER = 256
_SCHEMA = """
CREATE TABLE users (
    user TEXT PRIMARY KEY, token TEXT NOT NULL,
    keep INTEGER NOT NULL DEFAULT 1, max_characters INTEGER, max_age REAL
) WITHOUT ROWID;
CREATE TABLE states (
    number INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL,
    state TEXT NOT NULL, cut INTEGER NOT NULL, written REAL NOT NULL, expires REAL
);
CREATE INDEX states_of ON states (user);
"""


@dataclass(frozen=True)
class Notes:
    """What a task opened of a user: hand it back to `UserMemory.save`.

    Args:
        user: whose they are.
        states: the states, the oldest first; more than one only after tasks that overlapped.
        cut: for each state, how many characters were cut from its end.
        numbers, token: what `save` replaces, and whether it still may.
    """

    user: str
    states: tuple[str, ...]
    cut: tuple[int, ...]
    numbers: tuple[int, ...]
    token: str

    @property
    def text(self) -> str:
        """The states as one text; "" where there is none.

        >>> print(Notes("ana", ("Size 39.", "Likes red."), (0, 12), (1, 2), "").text)
        Size 39.
        <BLANKLINE>
        Likes red. [12 characters were cut here]
        """
        parts = zip(self.states, self.cut, strict=True)
        return "\n\n".join(
            state + (f" [{cut} characters were cut here]" if cut else "") for state, cut in parts
        )


class UserMemory:
    """The last internal state of each user, in one SQLite file (WAL) for any number of processes.

    Users are told apart by their exact id. Deleted text is overwritten in the file. The file is
    created readable by its owner only; it is not encrypted.

    Args:
        path: the file. It is created if it is missing; its folder must exist. SQLite keeps two
            more files beside it (`-wal`, `-shm`), and needs a file system with locks, so not NFS.
        max_characters: the most characters kept of a state; a longer one loses its end, and the
            next task reads how much.
        max_age: seconds after which a state expires; None: never. The date is fixed when the state
            is saved.
        timeout: seconds to wait for other processes' writes.

    Raises:
        TypeError, ValueError: an argument out of its range; a file that is something else.
        OSError: a file that cannot be created.
        sqlite3.OperationalError: the file is locked for longer than `timeout`, or the disk is full.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> memory = UserMemory(Path(folder.name) / "memory.db")
    >>> memory.save(memory.open("ana"), "Size 39.")
    True
    >>> memory.open("ana").text, memory.open("bo").text
    ('Size 39.', '')
    >>> memory.forget("ana"), memory.open("ana").text
    (1, '')
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_characters: int = 8000,
        max_age: float | None = None,
        timeout: float = 30.0,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: expected a path, got {type(path).__name__}")
        check_count("max_characters", max_characters)
        if max_age is not None:
            _check_seconds("max_age", max_age)
        _check_seconds("timeout", timeout)
        self.path = Path(path)
        self.max_characters = max_characters
        self.max_age = max_age
        self.timeout = timeout
        self._create()

    def open(self, user: str) -> Notes:
        """The notes of a user, as a task begins: those that have not expired.

        Raises:
            TypeError, ValueError: no user id: text of 1 to 256 characters.
        """
        _check_user(user)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO users (user, token) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (user, secrets.token_hex(8)),
            )
            _expire(db)
            (token,) = db.execute("SELECT token FROM users WHERE user = ?", (user,)).fetchone()
            rows = db.execute(
                "SELECT number, state, cut FROM states WHERE user = ? ORDER BY number", (user,)
            ).fetchall()
        numbers, states, cut = zip(*rows, strict=True) if rows else ((), (), ())
        return Notes(user, states, cut, numbers, token)

    def save(self, notes: Notes, state: str) -> bool:
        """Replaces the notes that a task opened by the state that it ended with.

        Returns:
            False, and nothing is saved, where the user was forgotten since, or is not to be
            remembered.

        Raises:
            TypeError: a state that is not text.
            ValueError: an empty state, or text that is not valid Unicode.
        """
        if not isinstance(state, str):
            raise TypeError(f"state: expected text, got {type(state).__name__}")
        if not state:
            raise ValueError("state: expected text, got an empty one")
        _check_unicode("state", state)
        now = time.time()
        with self._transaction() as db:
            row = db.execute(
                "SELECT keep, max_characters, max_age FROM users WHERE user = ? AND token = ?",
                (notes.user, notes.token),
            ).fetchone()
            if row is None or not row[0]:
                return False
            limit = self.max_characters if row[1] is None else row[1]
            age = self.max_age if row[2] is None else row[2]
            _expire(db)
            db.executemany(
                "DELETE FROM states WHERE number = ? AND user = ?",
                [(number, notes.user) for number in notes.numbers],
            )
            db.execute(
                "INSERT INTO states (user, state, cut, written, expires) VALUES (?, ?, ?, ?, ?)",
                (
                    notes.user,
                    state[:limit],
                    max(0, len(state) - limit),
                    now,
                    None if age is None else now + age,
                ),
            )
        return True

    def retain(
        self,
        user: str,
        *,
        keep: bool = True,
        max_characters: int | None = None,
        max_age: float | None = None,
    ) -> None:
        """Sets how one user is remembered, in place of what was set before. It outlives `forget`.

        Args:
            user: whose states.
            keep: False: the user is not remembered; what is there is deleted now.
            max_characters, max_age: for this user's next states; None: as for everybody.

        Raises:
            TypeError, ValueError: an argument out of its range.
        """
        _check_user(user)
        if not isinstance(keep, bool):
            raise TypeError(f"keep: expected True or False, got {keep!r}")
        if max_characters is not None:
            check_count("max_characters", max_characters)
        if max_age is not None:
            _check_seconds("max_age", max_age)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO users (user, token, keep, max_characters, max_age) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT (user) DO UPDATE SET keep = excluded.keep, "
                "max_characters = excluded.max_characters, max_age = excluded.max_age",
                (user, secrets.token_hex(8), keep, max_characters, max_age),
            )
        if not keep:
            self.forget(user)

    def forget(self, user: str) -> int:
        """Deletes the states of a user, and returns how many.

        Tasks of the user that are running now save nothing when they end.

        Raises:
            TypeError, ValueError: no user id.
        """
        _check_user(user)
        with self._transaction() as db:
            count = db.execute("DELETE FROM states WHERE user = ?", (user,)).rowcount
            db.execute(
                "DELETE FROM users WHERE user = ? AND keep AND max_characters IS NULL "
                "AND max_age IS NULL",
                (user,),
            )
            db.execute("UPDATE users SET token = ? WHERE user = ?", (secrets.token_hex(8), user))
        self._overwrite_log()
        return count

    def expire(self) -> int:
        """Deletes what has expired, of all users, and returns how many states that were.

        Expired states are never opened or exported, whether this is called or not.
        """
        with self._transaction() as db:
            count = _expire(db)
        self._overwrite_log()
        return count

    def export(self, user: str) -> dict[str, Any]:
        """All that is stored of a user, ready for `json.dumps`.

        Returns:
            "user"; "keep", "max_characters", "max_age" as `retain` has them; "states": for each
            "state", "cut" (characters), "written" and "expires" (ISO 8601, UTC, or None).

        Raises:
            TypeError, ValueError: no user id.
        """
        _check_user(user)
        with self._transaction() as db:
            _expire(db)
            row = db.execute(
                "SELECT keep, max_characters, max_age FROM users WHERE user = ?", (user,)
            ).fetchone() or (1, None, None)
            states = db.execute(
                "SELECT state, cut, written, expires FROM states WHERE user = ? ORDER BY number",
                (user,),
            ).fetchall()
        return {
            "user": user,
            "keep": bool(row[0]),
            "max_characters": row[1],
            "max_age": row[2],
            "states": [
                {"state": s, "cut": cut, "written": _date(written), "expires": _date(expires)}
                for s, cut, written, expires in states
            ],
        }

    def users(self) -> list[str]:
        """The ids that have something stored, in order."""
        with self._transaction() as db:
            _expire(db)
            rows = db.execute(
                "SELECT user FROM states UNION SELECT user FROM users WHERE NOT keep "
                "OR max_characters IS NOT NULL OR max_age IS NOT NULL ORDER BY user"
            ).fetchall()
        return [user for (user,) in rows]

    def _create(self) -> None:
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        name = printable(str(self.path))
        try:
            with self._transaction() as db:
                (application,) = db.execute("PRAGMA application_id").fetchone()
                (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if tables and application != _APPLICATION:
                    raise ValueError(f"path: expected a memory of users, got another one: {name}")
                if not tables:
                    db.execute(f"PRAGMA application_id = {_APPLICATION}")
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
            self._use_wal()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise ValueError(f"path: expected an SQLite file, got {name} ({error})") from None

    def _use_wal(self) -> None:
        """Turns the log on. SQLite does not wait for others here, so this does."""
        end = time.monotonic() + self.timeout
        while True:
            try:
                with self._connection() as db:
                    db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _overwrite_log(self) -> None:
        """Empties the log, which holds the pages as they were before a deletion.

        Another process that is reading now holds it; the log is then emptied by a later call.
        """
        with self._connection() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # One connection per call: it may be made in any thread, and on either side of a fork.
        db = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None)
        try:
            db.execute("PRAGMA secure_delete = ON")
            yield db
        finally:
            db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _expire(db: sqlite3.Connection) -> int:
    return db.execute("DELETE FROM states WHERE expires <= ?", (time.time(),)).rowcount


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def _check_user(user: Any) -> None:
    if not isinstance(user, str):
        raise TypeError(f"user: expected text, got {type(user).__name__}")
    if not 1 <= len(user) <= _LONGEST_USER:
        raise ValueError(f"user: expected 1 to {_LONGEST_USER} characters, got {len(user)}")
    _check_unicode("user", user)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected valid Unicode ({error.reason})") from None


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected seconds, got {value!r}")
    if not 0 < value < 1e11:
        raise ValueError(f"{name}: expected more than 0 seconds, got {value}")
