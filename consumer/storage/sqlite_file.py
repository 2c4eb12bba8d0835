"""The file under the embedded store: how it is opened, kept to one service, watched, and what its failures mean."""

import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from consumer.storage import StorageError

PATIENCE: float = 10.0
"""Seconds to wait for another process's transaction; ours take less than one."""

_OLDEST_SQLITE: Final = (3, 37, 0)

_SETTINGS: Final = (
    # In WAL mode only FULL syncs the log at each commit: with NORMAL a power cut takes back acknowledged commits.
    "PRAGMA synchronous = FULL",
    # On macOS fsync leaves data in the drive's cache; these ask for more. Elsewhere they change nothing.
    "PRAGMA fullfsync = ON",
    "PRAGMA checkpoint_fullfsync = ON",
    # SQLite up to 3.51.2 can lose pages when a checkpoint meets another connection's commit (its "WAL-reset bug"):
    # nobody checkpoints in passing, the store alone does, in a mode that keeps writers out meanwhile.
    "PRAGMA wal_autocheckpoint = 0",
    # Reading a damaged page fails at once, instead of returning what happens to stand there.
    "PRAGMA cell_size_check = ON",
    # A file from elsewhere runs nothing.
    "PRAGMA trusted_schema = OFF",
    # A read error of a mapped file would be a signal and the end of the process, not an exception.
    "PRAGMA mmap_size = 0",
)

_MEANINGS: Final = {
    sqlite3.SQLITE_BUSY: "is locked by another process: end what has it open (`fuser` names it); nothing was written",
    sqlite3.SQLITE_FULL: "has no room on its disk: make room and start again; the last commit is intact",
    sqlite3.SQLITE_READONLY: (
        "is read-only for this user: make the file, those beside it and their directory writable; "
        "the last commit is intact"
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "cannot be opened: it has to be a file, in a directory where this user may write the -wal and -shm beside it"
    ),
    sqlite3.SQLITE_IOERR: (
        "cannot be read or written: look at the disk, its quota and the kernel's log, and start again; "
        "the last commit is intact"
    ),
    sqlite3.SQLITE_NOTADB: (
        "is not a SQLite database, or its beginning is destroyed: correct the path, or keep it and its -wal elsewhere "
        "and put back an intact copy"
    ),
    sqlite3.SQLITE_CORRUPT: (
        "is damaged: stop, look at the disk, and put back an intact copy, or start over with "
        "`tallyman reset --bill-from`, which keeps this file"
    ),
}


def beside(path: Path, suffix: str) -> Path:
    """The file that belongs to this one: SQLite's -wal and -shm, our .lock."""
    return path.with_name(path.name + suffix)


def connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time; transactions are begun and ended in SQL."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StorageError(
            f"SQLite {sqlite3.sqlite_version} is too old: use a Python that is linked with 3.37 or newer"
        )
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={'rwc' if create else 'rw'}",
        uri=True,
        timeout=PATIENCE,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        for setting in _SETTINGS:
            connection.execute(setting)
    except BaseException:
        connection.close()
        raise
    return connection


def write_ahead(connection: sqlite3.Connection, path: Path) -> None:
    """Put the file in WAL mode, in which it stays."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StorageError(f"{path} is on a file system without shared memory for SQLite's WAL: use a local disk")


def checkpoint(connection: sqlite3.Connection) -> None:
    """Copy the write-ahead log into the file and empty it.

    TRUNCATE holds the right to write while it copies. Where a reader needs the log for longer than a quarter of a
    second the copy is left unfinished, for the next time.
    """
    connection.execute("PRAGMA busy_timeout = 250")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(PATIENCE * 1000)}")


def verify(connection: sqlite3.Connection, path: Path, table: str) -> None:
    """Read the whole table and raise where its pages do not fit together; they have no checksums."""
    # Counting reads the pages forwards. The check does so backwards, which defeats the disk's read-ahead: on a cold
    # file it takes several times as long by itself.
    connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - a table of our own
    (found,) = connection.execute(f"PRAGMA quick_check({table})").fetchone()
    if found != "ok":
        raise StorageError(f"{path} {_MEANINGS[sqlite3.SQLITE_CORRUPT]} ({found})")


class Watch:
    """Notices files that were deleted or replaced: what is written to them then goes where nobody looks.

    It asks the file system only: closing a descriptor of a database would drop the locks that SQLite has on it.
    """

    def __init__(self, path: Path, guard: Path | None) -> None:
        """The database is open; ``guard`` is the lock file of a service."""
        parts = (path, beside(path, "-wal"), beside(path, "-shm"), *([guard] if guard else []))
        self._path = path
        self._seen = {part: _identity(part) for part in parts}

    def check(self) -> None:
        """Raise where one of the files is not the one that was opened."""
        for part, opened in self._seen.items():
            try:
                found = _identity(part)
            except FileNotFoundError:
                found = None
            if found != opened:
                raise StorageError(
                    f"{part} was {'replaced' if found else 'deleted'} while in use: stop, put back {self._path} with "
                    f"the -wal that belongs to it (what was committed is in these two), and start again"
                )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Hold the lock file beside it, which says by whom; it stays, for removing it would race with the next holder."""
    guard = beside(path, ".lock")
    with explained(guard):
        descriptor = os.open(guard, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with explained(guard):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 400, 0).decode(errors="replace") or "another process"
                raise StorageError(
                    f"{path} is in use by {holder}: stop that first, or give this service a file of its own"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield guard
    finally:
        os.close(descriptor)


def held_by(path: Path) -> str | None:
    """The service that has this file, as its lock says; None where there is none."""
    guard = beside(path.resolve(), ".lock")
    try:
        descriptor = os.open(guard, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as failed:
        raise StorageError(f"{guard} cannot be read: {failed.strerror}") from None
    try:
        # Shared: commands that ask at the same time do not take each other for a service.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 400, 0).decode(errors="replace") or "another process"
    finally:
        os.close(descriptor)
    return None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever SQLite or the file system has against this file, as a StorageError that says what to do."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
        raise  # the caller's mistake, not the file's
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0)
        meaning = _MEANINGS.get(code & 0xFF, "cannot be used")
        raise StorageError(f"{path} {meaning} ({getattr(error, 'sqlite_errorname', 'SQLite')}: {error})") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be used: it has to be writable, on a local disk ({error})") from error
