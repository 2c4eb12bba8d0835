"""The embedded store: one SQLite file, one process that runs both stages, one SQL transaction per commit.

The file is in WAL mode, so that other processes (the operators' commands) read and append while the service runs. A
lock beside it keeps a second service out. Why each setting is what it is: docs/decisions/0002-sqlite-settings.md.
"""

import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Any, Final

from consumer.storage import Append, Changes, Facts, Log, Logged, Restored, Stage, StorageError
from consumer.storage.sqlite_file import (
    Watch,
    beside,
    checkpoint,
    connect,
    explained,
    held_by,
    locked,
    verify,
    write_ahead,
)

SCHEMA_VERSION: Final = 1

APPLICATION_ID: Final = 0x54414C59
"""Marks the file as Tallyman's in SQLite's header ("TALY"), so that no other application's file is touched."""

WAL_BYTES: Final = 64 * 2**20
"""The write-ahead log is copied into the file when it has grown to this: rarely, yet soon read after a crash."""

EXPIRE_ROWS: Final = 10_000
READ_ROWS: Final = 1_000

_SCHEMA: Final = (
    """CREATE TABLE facts (
        one INTEGER PRIMARY KEY CHECK (one = 1), pipeline TEXT NOT NULL, cluster_id TEXT NOT NULL, topic TEXT NOT NULL,
        topic_id TEXT NOT NULL, bill_from INTEGER NOT NULL, partitions INTEGER NOT NULL, created_at INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE offsets (
        stage TEXT NOT NULL, partition INTEGER NOT NULL, "offset" INTEGER NOT NULL, PRIMARY KEY (stage, partition)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE entries (
        stage TEXT NOT NULL, partition INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
        PRIMARY KEY (stage, partition, key)
    ) STRICT, WITHOUT ROWID""",
    *(
        # AUTOINCREMENT: the offset of an expired record is never given again.
        f"""CREATE TABLE {log} (
            "offset" INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, appended_at INTEGER NOT NULL,
            redriven_at INTEGER, value BLOB NOT NULL
        ) STRICT"""
        for log in Log
    ),
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_STATE: Final = ("facts", "offsets", "entries")
"""What is verified before it is used. The logs may be gigabytes: damage there is reported when it is read."""

_PUT: Final = (
    "INSERT INTO entries (stage, partition, key, value) VALUES (?, ?, ?, ?) "
    "ON CONFLICT DO UPDATE SET value = excluded.value"
)
_DELETE: Final = "DELETE FROM entries WHERE stage = ? AND partition = ? AND key = ?"
_MOVE: Final = (
    'INSERT INTO offsets (stage, partition, "offset") VALUES (?, ?, ?) '
    'ON CONFLICT DO UPDATE SET "offset" = excluded."offset"'
)
# All logs have the same shape; the one name in braces is the log's.
_APPEND: Final = "INSERT INTO {} (key, appended_at, value) VALUES (?, ?, ?)"
_READ: Final = (
    'SELECT 0, "offset", key, appended_at, value, redriven_at FROM {} WHERE "offset" > ? ORDER BY "offset" LIMIT ?'
)
_OLDEST: Final = 'SELECT "offset", appended_at FROM {} WHERE "offset" < ? ORDER BY "offset" LIMIT ?'
_FROM: Final = 'SELECT "offset", appended_at FROM {} WHERE "offset" >= ? ORDER BY "offset" LIMIT 1'
_EXPIRE: Final = 'DELETE FROM {} WHERE "offset" <= ?'


class SqliteStore:
    """Restore and commit on one file; every method may be called from any thread.

    Two connections, each behind a lock: SQLite has one writer at a time in any case, and a lock hands over at once
    where SQLite would poll; a reader does not wait for the writer.
    """

    def __init__(
        self,
        path: Path,
        now: Callable[[], int],
        connections: tuple[sqlite3.Connection, sqlite3.Connection],
        watch: Watch,
    ) -> None:
        """Used by ``open``."""
        self.path = path
        self._now = now
        self._writer, self._reader = connections
        self._writing, self._reading = Lock(), Lock()
        self._watch = watch
        self._wal = beside(path, "-wal")
        self._checkpoint_at = WAL_BYTES

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, now: Callable[[], int], create: bool, lock: bool) -> Iterator["SqliteStore"]:
        """The store in this file, until the end of the context, when no thread may be using it any more.

        Args:
            path: the file. Its directory has to exist: creating a missing mount point would start a second truth.
            now: milliseconds since the epoch, for the records of the logs.
            create: start an empty store where there is none.
            lock: be the one service on this file; commands, which only read and append, do not take the lock.

        Raises:
            StorageError: the file cannot be used, or another service uses it.
        """
        path = _place(path, create=create)
        with ExitStack() as opened:
            guard = opened.enter_context(locked(path)) if lock else None
            with explained(path):
                writer = opened.enter_context(closing(connect(path, create=create)))
                _prepare(writer, path, create=create)
                if lock:
                    for table in _STATE:
                        verify(writer, path, table)
                reader = opened.enter_context(closing(connect(path)))
                reader.execute("PRAGMA query_only = ON")
                reader.execute("SELECT 1 FROM facts").fetchall()
                watch = Watch(path, guard)
            yield cls(path, now, (writer, reader), watch)

    @staticmethod
    def reset(path: Path, *, now: Callable[[], int]) -> Path:
        """Move a file that no service uses aside, complete and in one piece, so that ``open`` can create a new one.

        Returns where it is now: beside the old place, with the time in its name. Nothing is lost.
        """
        path = _place(path, create=False)
        moment = datetime.fromtimestamp(now() / 1000, UTC)
        archive = path.with_name(f"{path.name}.before-{moment:%Y%m%dT%H%M%S.%f}")
        with locked(path), explained(path), closing(connect(path)) as connection:
            if archive.exists():
                raise StorageError(f"{archive} exists already: move it away and try again")
            _prepare(connection, path, create=True)
            # Outside WAL mode all of it is in the one file, and with this lock nobody else has that open.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("BEGIN EXCLUSIVE")
            path.rename(archive)
            connection.execute("ROLLBACK")
        return archive

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """The processor's last commit; its entries are read from the file as they are asked for, in order of keys.

        They are of one moment, whatever is committed meanwhile. Until they are exhausted or closed the write-ahead
        log keeps growing: they are to be read without delay.
        """
        with explained(self.path):
            self._watch.check()  # first: SQLite would put the remaining files in order around a file that is not ours
            snapshot = connect(self.path)
            try:
                snapshot.execute("BEGIN")
                row = snapshot.execute(
                    'SELECT "offset" FROM offsets WHERE stage = ? AND partition = ?', (stage, partition)
                ).fetchone()
            except BaseException:
                snapshot.close()
                raise
        if row is None:
            snapshot.close()
            return None
        entries = self._entries(snapshot, stage, partition)
        next(entries)  # started: from here on it closes the snapshot, even where nobody reads any further
        return Restored(row[0], entries)

    def offsets(self, stage: Stage) -> dict[int, int]:
        """How far the stage's processors have read, by partition."""
        return dict(self._query('SELECT partition, "offset" FROM offsets WHERE stage = ?', (stage,)))

    def commit(self, stage: Stage, changes: Mapping[int, Changes]) -> None:
        """Make the changes of these partitions' processors durable, all or none."""
        with self._transaction() as transaction:
            self._apply(transaction, stage, changes)

    def append(self, appends: Iterable[Append]) -> None:
        """Append records that belong to no commit: operators' commands, from any process."""
        with self._transaction() as transaction:
            _append(transaction, appends, self._now())

    def facts(self) -> Facts | None:
        """What the state belongs to, or None before ``begin``."""
        rows = self._query("SELECT pipeline, cluster_id, topic, topic_id, bill_from, partitions, created_at FROM facts")
        return Facts(*rows[0]) if rows else None

    def begin(self, facts: Facts, changes: Mapping[int, Changes]) -> None:
        """The first start: the facts, and the first commit of stage 1 on every partition, in one step."""
        if changes.keys() != set(range(facts.partitions)):
            raise ValueError(f"each of the {facts.partitions} partitions needs its first commit, not {[*changes]}")
        with self._transaction() as transaction:
            if transaction.execute("SELECT 1 FROM facts").fetchone():
                raise StorageError(f"{self.path} has begun already: go on with it, or archive it with `tallyman reset`")
            transaction.execute("INSERT INTO facts VALUES (1, ?, ?, ?, ?, ?, ?, ?)", astuple(facts))
            self._apply(transaction, Stage.AGGREGATE, changes)

    def grow(self, partitions: int, changes: Mapping[int, Changes]) -> None:
        """The topic has more partitions: their number, and the first commit of stage 1 on the new ones, in one step."""
        with self._transaction() as transaction:
            recorded = transaction.execute("SELECT partitions FROM facts").fetchone()
            if recorded is None:
                raise StorageError(f"{self.path} has not begun: its partitions are recorded at the first start")
            if changes.keys() != set(range(recorded[0], partitions)):
                raise ValueError(f"partitions {recorded[0]} to {partitions - 1} are new, not {[*changes]}")
            transaction.execute("UPDATE facts SET partitions = ?", (partitions,))
            self._apply(transaction, Stage.AGGREGATE, changes)

    @property
    def place(self) -> str:
        """The file."""
        return str(self.path)

    def holder(self) -> str | None:
        """The service that has this file, as its lock says; None where there is none."""
        return held_by(self.path)

    def logged(
        self, log: Log, starts: Mapping[int, int] | None = None, ends: Mapping[int, int] | None = None
    ) -> Iterator[Logged]:
        """The records of a log from an offset on and below another, a few at a time; the one partition is 0."""
        at = (starts or {}).get(0, 0)
        below = (self.ends(log) if ends is None else ends).get(0, 0)
        while at < below and (records := self.read(log, at - 1, READ_ROWS)):
            yield from takewhile(lambda each: each.offset < below, records)
            at = records[-1].offset + 1

    def ends(self, log: Log) -> dict[int, int]:
        """``end``, of the one partition."""
        return {0: self.end(log)}

    def settled(self, log: Log) -> dict[int, int]:
        """The same: what can be read has been committed."""
        return self.ends(log)

    def since(self, log: Log, time: int) -> dict[int, int]:
        """The first offset of a record that was appended at a time or later: by bisection, for there is no index."""
        low, high = 1, self.end(log)
        while low < high:
            middle = (low + high) // 2
            rows = self._query(_FROM.format(log), (middle,))
            if not rows or rows[0][1] >= time:
                high = middle
            else:
                low = rows[0][0] + 1
        return {0: low}

    def shortened(self, log: Log) -> set[int]:
        """The one partition, where its first records are not kept any more."""
        first = self.read(log, 0, 1)
        return {0} if (first[0].offset if first else self.end(log)) > 1 else set()

    def number(self, letter: Logged) -> int:
        """Its offset."""
        return letter.offset

    def letter(self, number: int) -> Logged | None:
        """The dead letter of this number, if it is there."""
        found = self.read(Log.DEAD_LETTERS, number - 1, 1)
        return found[0] if found and found[0].offset == number else None

    def read(self, log: Log, after_offset: int, limit: int) -> list[Logged]:
        """The first records of a log above this offset, at most as many as the limit."""
        return [Logged(*row) for row in self._query(_READ.format(log), (after_offset, limit))]

    def end(self, log: Log) -> int:
        """The offset that the log's next record will get."""
        rows = self._query("SELECT seq FROM sqlite_sequence WHERE name = ?", (log,))
        return int(rows[0][0]) + 1 if rows else 1

    def expire(self, log: Log, before_ms: int, below_offset: int) -> int:
        """Delete the log's oldest records, as far as they were appended before a time and lie below an offset.

        At most 10,000 at once, so that commits need not wait; returns how many, to be called again until it is none.
        """
        with self._transaction() as transaction:
            oldest = transaction.execute(_OLDEST.format(log), (below_offset, EXPIRE_ROWS)).fetchall()
            expired = [offset for offset, _ in takewhile(lambda row: row[1] < before_ms, oldest)]
            if expired:
                transaction.execute(_EXPIRE.format(log), (expired[-1],))
        return len(expired)

    def mark_redriven(self, letters: Iterable[Logged]) -> None:
        """Record that these dead letters have been produced again, now; who reads them is told."""
        with self._transaction() as transaction:
            now = self._now()
            transaction.executemany(
                'UPDATE dead_letters SET redriven_at = ? WHERE "offset" = ?', [(now, each.offset) for each in letters]
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, explained(self.path):
            # Immediate: a transaction that starts by reading can be refused when it comes to write.
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._watch.check()
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            if self._wal.stat().st_size >= self._checkpoint_at:
                checkpoint(self._writer)
                # Where a reader prevented it, there is no use in trying, and waiting, at every commit.
                self._checkpoint_at = self._wal.stat().st_size + WAL_BYTES

    def _apply(self, transaction: sqlite3.Connection, stage: Stage, changes: Mapping[int, Changes]) -> None:
        now = self._now()
        for partition, changed in changes.items():
            # In order of keys every page of the tree is visited once.
            transaction.executemany(_DELETE, [(stage, partition, key) for key in sorted(changed.deletes)])
            transaction.executemany(_PUT, [(stage, partition, *put) for put in sorted(changed.puts.items())])
            transaction.execute(_MOVE, (stage, partition, changed.offset))
            _append(transaction, changed.appends, now)

    def _entries(
        self, snapshot: sqlite3.Connection, stage: Stage, partition: int
    ) -> Generator[tuple[bytes, bytes], None, None]:
        with closing(snapshot), explained(self.path):
            yield b"", b""
            yield from snapshot.execute(
                "SELECT key, value FROM entries WHERE stage = ? AND partition = ? ORDER BY key", (stage, partition)
            )

    def _query(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with self._reading, explained(self.path):
            return self._reader.execute(sql, parameters).fetchall()


def _append(transaction: sqlite3.Connection, appends: Iterable[Append], now: int) -> None:
    rows: dict[Log, list[tuple[bytes, int, bytes]]] = {}
    for log, key, value in appends:
        rows.setdefault(log, []).append((key, now, value))
    for log, added in rows.items():
        transaction.executemany(_APPEND.format(log), added)


def _place(path: Path, *, create: bool) -> Path:
    """The file itself, whatever links lead to it: SQLite puts its -wal there, and the lock belongs beside that."""
    with explained(path):
        path = path.resolve()
        if not path.parent.is_dir():
            raise StorageError(f"{path}: there is no directory {path.parent}: create or mount it, or correct the path")
        if not create and not path.exists():
            raise StorageError(f"{path} does not exist: correct the path, or start the service once")
        wal = beside(path, "-wal")
        # SQLite would start an empty file and delete the log.
        if not (path.exists() and path.stat().st_size) and wal.exists() and wal.stat().st_size:
            raise StorageError(f"{wal} holds commits, and {path} is not there: put back both, or move the -wal away")
        return path


def _prepare(connection: sqlite3.Connection, path: Path, *, create: bool) -> None:
    """Leave the file in WAL mode and with our schema, or raise; a file of somebody else's is not touched."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not tables:
        if not create:
            raise StorageError(f"{path} is empty: correct the path, or start the service once")
        write_ahead(connection, path)
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("COMMIT")
    elif application != APPLICATION_ID:
        raise StorageError(f"{path} belongs to another application: correct the path")
    elif version != SCHEMA_VERSION:
        raise StorageError(
            f"{path} has schema {version}, and this version knows {SCHEMA_VERSION}: run the newer one that wrote it"
        )
    else:
        write_ahead(connection, path)
