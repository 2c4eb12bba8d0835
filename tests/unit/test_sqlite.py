"""The embedded store beyond the contract: its logs and facts, its lock, and every way in which a file can fail."""

import os
import random
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Barrier, Thread

import pytest

from consumer.storage import Append, Changes, Facts, Log, Logged, Stage, StorageError, sqlite, sqlite_file
from consumer.storage.sqlite import SqliteStore

FACTS = Facts("prod", "cluster-1", "usage-events", "topic-1", bill_from=1_000, partitions=2, created_at=2_000)
FIRST = {0: Changes(10, {b"first": b"0"}), 1: Changes(20, {b"first": b"1"})}
REPOSITORY = Path(__file__).parents[2]


class Clock:
    """Milliseconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tallyman.db"


@pytest.fixture
def service(path: Path, clock: Clock) -> Iterator[SqliteStore]:
    with SqliteStore.open(path, now=clock, create=True, lock=True) as store:
        yield store


def opened(path: Path) -> object:
    """As the service opens it, at once closed again."""
    with SqliteStore.open(path, now=lambda: 0, create=True, lock=True) as store:
        return store


def committed(path: Path, *, number: int = 1, filler: int = 0) -> None:
    """A file with this commit, written by a process that has ended."""
    with SqliteStore.open(path, now=lambda: 0, create=True, lock=True) as store:
        store.commit(Stage.AGGREGATE, numbered(number, filler))


def numbered(number: int, filler: int = 0) -> dict[int, Changes]:
    """Commit number n: offset, entry and both logs all say n."""
    name = b"%d" % number
    puts = {b"n": name} | {b"%06d" % i: os.urandom(200) for i in range(filler)}
    return {0: Changes(number, puts, appends=[Append(log, b"k", name) for log in (Log.TOTALS, Log.OUTCOMES)])}


def last_number(path: Path) -> int:
    """The number of the last commit, of which entries, offset and logs have to be."""
    with SqliteStore.open(path, now=lambda: 0, create=False, lock=False) as store:
        restored = store.restore(Stage.AGGREGATE, 0)
        if restored is None:
            return 0
        entries = dict(restored.entries)

        assert entries[b"n"] == b"%d" % restored.offset
        assert [row.value for log in (Log.TOTALS, Log.OUTCOMES) for row in store.read(log, 0, 100_000)[-1:]] == [
            entries[b"n"],
            entries[b"n"],
        ]
        return restored.offset


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A directory, and a user whom file permissions bind (root is bound by none)."""
    directory = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(directory, 65_534, 65_534)
        os.seteuid(65_534)
    try:
        yield directory
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)
        shutil.rmtree(directory)


class TestLogs:
    def test_offsets_start_at_one_and_go_up_by_one(self, service: SqliteStore, clock: Clock) -> None:
        assert service.end(Log.TOTALS) == 1
        service.commit(Stage.AGGREGATE, {0: Changes(1, appends=[Append(Log.TOTALS, b"a", b"1")])})
        clock.now += 5
        service.append([Append(Log.TOTALS, b"b", b"2"), Append(Log.OUTCOMES, b"b", b"3")])
        assert service.read(Log.TOTALS, 0, 10) == [
            Logged(0, 1, b"a", 1_700_000_000_000, b"1", None),
            Logged(0, 2, b"b", 1_700_000_000_005, b"2", None),
        ]
        assert (service.end(Log.TOTALS), service.end(Log.OUTCOMES), service.end(Log.DEAD_LETTERS)) == (3, 2, 1)

    def test_a_log_is_read_in_portions(self, service: SqliteStore) -> None:
        service.append([Append(Log.TOTALS, b"k", b"%d" % n) for n in range(1, 6)])
        assert [row.offset for row in service.read(Log.TOTALS, 0, 2)] == [1, 2]
        assert [row.offset for row in service.read(Log.TOTALS, 2, 2)] == [3, 4]
        assert [row.offset for row in service.read(Log.TOTALS, 4, 2)] == [5]
        assert service.read(Log.TOTALS, 5, 2) == []

    def test_commands_read_and_append_while_the_service_runs(
        self, service: SqliteStore, path: Path, clock: Clock
    ) -> None:
        service.commit(Stage.AGGREGATE, numbered(1))
        with SqliteStore.open(path, now=clock, create=False, lock=False) as command:
            assert [row.value for row in command.read(Log.TOTALS, 0, 10)] == [b"1"]
            command.append([Append(Log.TOTALS, b"k", b"a command")])
            service.commit(Stage.AGGREGATE, numbered(2))
        assert [row.value for row in service.read(Log.TOTALS, 0, 10)] == [b"1", b"a command", b"2"]

    def test_old_records_expire_but_none_that_is_still_to_be_read(self, service: SqliteStore, clock: Clock) -> None:
        for age in range(5):
            clock.now = age
            service.append([Append(Log.TOTALS, b"k", b"%d" % age)])
        assert service.expire(Log.TOTALS, before_ms=2, below_offset=100) == 2
        assert service.expire(Log.TOTALS, before_ms=100, below_offset=4) == 1
        assert service.expire(Log.TOTALS, before_ms=100, below_offset=4) == 0
        assert [row.offset for row in service.read(Log.TOTALS, 0, 10)] == [4, 5]

    def test_a_log_expires_from_its_beginning_only(self, service: SqliteStore, clock: Clock) -> None:
        """A clock that was set back leaves no holes in the audit trail."""
        for clock.now in (1, 9, 2):
            service.append([Append(Log.OUTCOMES, b"k", b"")])
        assert service.expire(Log.OUTCOMES, before_ms=5, below_offset=100) == 1
        assert [row.offset for row in service.read(Log.OUTCOMES, 0, 10)] == [2, 3]

    def test_what_was_appended_since_a_time_is_found_among_what_is_left(
        self, service: SqliteStore, clock: Clock
    ) -> None:
        begin, offsets = clock.now, dict[int, int]()
        for number in range(1, 38):
            clock.now = begin + number // 3 * 1000
            service.commit(Stage.AGGREGATE, numbered(number))
            offsets.setdefault(clock.now, number)
        assert service.expire(Log.OUTCOMES, begin + 2000, service.end(Log.OUTCOMES)) == 5
        for at, first in offsets.items():
            for asked in (at - 999, at):
                (start,) = service.since(Log.OUTCOMES, asked).values()
                assert [each.offset for each in service.logged(Log.OUTCOMES, {0: start})][:1] == [max(first, 6)]
        assert service.since(Log.OUTCOMES, clock.now + 1) == service.ends(Log.OUTCOMES)
        assert service.since(Log.DEAD_LETTERS, begin) == service.ends(Log.DEAD_LETTERS)

    def test_the_offset_of_an_expired_record_is_not_given_again(self, path: Path, clock: Clock) -> None:
        with SqliteStore.open(path, now=clock, create=True, lock=True) as store:
            store.append([Append(Log.TOTALS, b"k", b"")] * 3)
            assert store.expire(Log.TOTALS, clock.now + 1, 100) == 3
        with SqliteStore.open(path, now=clock, create=True, lock=True) as store:
            assert store.end(Log.TOTALS) == 4
            store.append([Append(Log.TOTALS, b"k", b"")])
            assert [row.offset for row in store.read(Log.TOTALS, 0, 10)] == [4]

    def test_it_is_remembered_which_dead_letters_were_redriven(self, service: SqliteStore, clock: Clock) -> None:
        service.append([Append(Log.DEAD_LETTERS, b"k", b"%d" % n) for n in range(3)])
        clock.now = 42
        service.mark_redriven(each for each in service.logged(Log.DEAD_LETTERS) if each.offset != 2)
        assert [row.redriven_at for row in service.read(Log.DEAD_LETTERS, 0, 10)] == [42, None, 42]

    def test_a_restore_sees_one_moment_whatever_is_committed_meanwhile(self, service: SqliteStore) -> None:
        service.commit(Stage.AGGREGATE, {0: Changes(1, {b"%04d" % n: b"old" for n in range(1_000)})})
        restored = service.restore(Stage.AGGREGATE, 0)
        assert restored is not None
        first = next(restored.entries)
        service.commit(Stage.AGGREGATE, {0: Changes(2, {b"%04d" % n: b"new" for n in range(1_000)})})

        assert {value for _, value in [first, *restored.entries]} == {b"old"}

    def test_the_entries_of_a_restore_are_of_the_moment_of_its_offset(self, service: SqliteStore) -> None:
        """With those of a later commit, what that one had read would be read, and counted, once more."""
        service.commit(Stage.AGGREGATE, {0: Changes(1, {b"n": b"old"})})
        restored = service.restore(Stage.AGGREGATE, 0)
        service.commit(Stage.AGGREGATE, {0: Changes(2, {b"n": b"new"})})
        assert restored is not None
        assert (restored.offset, dict(restored.entries)) == (1, {b"n": b"old"})

    def test_the_write_ahead_log_is_emptied_when_it_has_grown(
        self, service: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "WAL_BYTES", 100_000)
        monkeypatch.setattr(service, "_checkpoint_at", 100_000)
        grown = []
        for number in range(1, 100):
            service.commit(Stage.AGGREGATE, numbered(number, filler=20))
            grown.append(path.with_name("tallyman.db-wal").stat().st_size)
        assert max(grown) < 200_000
        assert 0 in grown
        assert last_number(path) == 99

    def test_a_reader_that_does_not_end_delays_one_commit_and_not_all(
        self, service: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.commit(Stage.AGGREGATE, numbered(1))
        unread = service.restore(Stage.AGGREGATE, 0)
        monkeypatch.setattr(service, "_checkpoint_at", 100_000)
        waits: list[sqlite3.Connection] = []

        def counted(connection: sqlite3.Connection) -> None:
            waits.append(connection)
            sqlite_file.checkpoint(connection)

        monkeypatch.setattr(sqlite, "checkpoint", counted)
        for number in range(1, 100):
            service.commit(Stage.AGGREGATE, numbered(number, filler=20))
        assert len(waits) == 1
        assert unread is not None

    def test_both_stages_commit_from_their_own_threads(self, service: SqliteStore) -> None:
        together = Barrier(2)
        failures: list[BaseException] = []

        def commit(stage: Stage) -> None:
            try:
                together.wait(10)
                for number in range(1, 51):
                    service.commit(stage, numbered(number))
                    restored = service.restore(stage, 0)
                    assert restored is not None
                    assert restored.offset == number
                    assert service.read(Log.TOTALS, 0, 1_000)
            except BaseException as failure:  # noqa: BLE001 - handed over to the test
                failures.append(failure)

        threads = [Thread(target=commit, args=(stage,)) for stage in Stage]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert sorted(int(row.value) for row in service.read(Log.TOTALS, 0, 1_000)) == sorted([*range(1, 51)] * 2)


class TestFacts:
    def test_a_first_start_records_the_facts_and_a_commit_for_each_partition(self, path: Path, clock: Clock) -> None:
        with SqliteStore.open(path, now=clock, create=True, lock=True) as store:
            assert store.facts() is None
            store.begin(FACTS, FIRST)
        with SqliteStore.open(path, now=clock, create=True, lock=True) as store:
            assert store.facts() == FACTS
            for partition, changes in FIRST.items():
                restored = store.restore(Stage.AGGREGATE, partition)
                assert restored is not None
                assert (restored.offset, dict(restored.entries)) == (changes.offset, changes.puts)

    def test_a_second_first_start_is_refused_and_changes_nothing(self, service: SqliteStore) -> None:
        service.begin(FACTS, FIRST)
        with pytest.raises(StorageError, match=r"tallyman\.db has begun already.*tallyman reset"):
            service.begin(Facts("other", "c", "t", "i", 1, 1, 1), {0: Changes(99, {b"first": b"other"})})
        assert service.facts() == FACTS
        restored = service.restore(Stage.AGGREGATE, 0)
        assert restored is not None
        assert restored.offset == 10

    def test_a_first_start_without_some_partition_is_a_mistake(self, service: SqliteStore) -> None:
        with pytest.raises(ValueError, match="each of the 2 partitions"):
            service.begin(FACTS, {0: Changes(1)})
        assert service.facts() is None

    def test_new_partitions_are_recorded_with_their_first_commits(self, service: SqliteStore) -> None:
        service.begin(FACTS, FIRST)
        service.grow(4, {2: Changes(0, {b"first": b"2"}), 3: Changes(0, {b"first": b"3"})})
        facts = service.facts()
        assert facts is not None
        assert facts.partitions == 4
        assert service.restore(Stage.AGGREGATE, 3) is not None
        with pytest.raises(ValueError, match="partitions 4 to 5 are new"):
            service.grow(6, {3: Changes(0), 4: Changes(0), 5: Changes(0)})

    def test_partitions_cannot_grow_before_the_first_start(self, service: SqliteStore) -> None:
        with pytest.raises(StorageError, match="has not begun"):
            service.grow(1, {0: Changes(0)})

    def test_a_reset_keeps_the_old_file_complete_and_makes_room_for_a_new_one(self, path: Path, clock: Clock) -> None:
        committed(path, number=7)
        archive = SqliteStore.reset(path, now=clock)

        assert archive.name == "tallyman.db.before-20231114T221320.000000"
        assert sorted(file.name for file in path.parent.iterdir()) == [archive.name, "tallyman.db.lock"]
        assert last_number(archive) == 7
        with SqliteStore.open(path, now=clock, create=True, lock=True) as store:
            assert store.facts() is None
            assert store.end(Log.TOTALS) == 1

    def test_a_reset_never_writes_over_an_archive(self, path: Path, clock: Clock) -> None:
        committed(path, number=7)
        archive = SqliteStore.reset(path, now=clock)
        committed(path, number=8)
        with pytest.raises(StorageError, match="exists already"):
            SqliteStore.reset(path, now=clock)
        assert (last_number(archive), last_number(path)) == (7, 8)

    def test_a_reset_is_refused_while_the_service_or_a_command_has_the_file_open(
        self, path: Path, clock: Clock
    ) -> None:
        committed(path)
        with SqliteStore.open(path, now=clock, create=True, lock=True), pytest.raises(StorageError, match="in use by"):
            SqliteStore.reset(path, now=clock)
        with SqliteStore.open(path, now=clock, create=False, lock=False) as command:
            with pytest.raises(StorageError, match="locked by another process"):
                SqliteStore.reset(path, now=clock)
            command.append([Append(Log.TOTALS, b"k", b"1")])
        assert last_number(path) == 1


class TestFailures:
    """Each names the place and the cure, and the last commit is intact."""

    def test_a_second_service_is_kept_out_and_told_by_whom(self, service: SqliteStore, path: Path) -> None:
        with pytest.raises(
            StorageError, match=f"{path} is in use by pid {os.getpid()} on {socket.gethostname()}: stop"
        ):
            opened(path)
        service.commit(Stage.AGGREGATE, numbered(1))

    def test_the_lock_is_the_same_whatever_links_lead_to_the_file(self, service: SqliteStore, path: Path) -> None:
        link = path.with_name("link.db")
        link.symlink_to(path)
        with pytest.raises(StorageError, match="is in use"):
            opened(link)
        service.commit(Stage.AGGREGATE, numbered(1))

    def test_the_lock_is_free_when_the_service_has_ended(self, path: Path) -> None:
        committed(path)
        committed(path, number=2)
        assert last_number(path) == 2

    def test_a_missing_directory_is_not_created(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"there is no directory .*/not-mounted: create or mount it"):
            opened(tmp_path / "not-mounted" / "tallyman.db")
        assert not (tmp_path / "not-mounted").exists()

    def test_a_command_does_not_create_a_file(self, path: Path) -> None:
        with (
            pytest.raises(StorageError, match="does not exist: correct the path"),
            SqliteStore.open(path, now=lambda: 0, create=False, lock=False),
        ):
            pass
        path.touch()
        with (
            pytest.raises(StorageError, match="is empty: correct the path"),
            SqliteStore.open(path, now=lambda: 0, create=False, lock=False),
        ):
            pass
        assert path.stat().st_size == 0

    def test_a_file_of_a_newer_schema_is_refused(self, path: Path) -> None:
        committed(path)
        with closing(sqlite3.connect(path)) as newer:
            newer.execute(f"PRAGMA user_version = {sqlite.SCHEMA_VERSION + 1}")
        with pytest.raises(StorageError, match="has schema 2, and this version knows 1: run the newer one"):
            opened(path)

    def test_a_database_of_another_application_is_not_touched(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE theirs (x)")
        before = path.read_bytes()
        with pytest.raises(StorageError, match="belongs to another application"):
            opened(path)
        assert path.read_bytes() == before

    def test_a_file_that_is_no_database_is_refused(self, path: Path) -> None:
        path.write_text("pipeline: prod\n" * 1_000)
        with pytest.raises(StorageError, match="is not a SQLite database"):
            opened(path)
        assert path.read_text() == "pipeline: prod\n" * 1_000

    def test_a_directory_in_the_place_of_the_file_is_refused(self, path: Path) -> None:
        path.mkdir()
        with pytest.raises(StorageError, match="cannot be opened: it has to be a file"):
            opened(path)

    def test_damage_in_the_middle_of_the_state_is_found_at_the_start(self, path: Path, clock: Clock) -> None:
        """And a reset keeps the damaged file, for whoever repairs it."""
        committed(path, filler=5_000)
        damage(path, b"002500")
        with pytest.raises(StorageError, match=r"is damaged: stop.*tallyman reset"):
            opened(path)
        size = path.stat().st_size
        assert SqliteStore.reset(path, now=clock).stat().st_size == size
        committed(path)

    def test_damage_in_a_log_is_found_when_it_is_read(self, path: Path) -> None:
        with SqliteStore.open(path, now=lambda: 0, create=True, lock=True) as store:
            store.append([Append(Log.TOTALS, b"%06d" % n, bytes(200)) for n in range(5_000)])
        damage(path, b"002500")
        with (
            SqliteStore.open(path, now=lambda: 0, create=True, lock=True) as store,
            pytest.raises(StorageError, match=f"{path} is damaged"),
        ):
            store.read(Log.TOTALS, 0, 10_000)

    def test_damage_during_a_restore_is_reported_and_not_taken_for_the_end(self, path: Path) -> None:
        committed(path, filler=5_000)
        damage(path, b"002500")
        with SqliteStore.open(path, now=lambda: 0, create=True, lock=False) as store:
            restored = store.restore(Stage.AGGREGATE, 0)
            assert restored is not None
            with pytest.raises(StorageError, match="is damaged"):
                list(restored.entries)

    def test_a_truncated_file_is_refused(self, path: Path) -> None:
        committed(path, filler=5_000)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(StorageError, match="is damaged"):
            opened(path)

    def test_a_directory_that_may_not_be_written_is_refused(self) -> None:
        with unprivileged() as directory:
            directory.chmod(0o500)
            with pytest.raises(StorageError, match=r"tallyman\.db\.lock cannot be used: it has to be writable"):
                opened(directory / "tallyman.db")

    def test_a_file_that_may_not_be_written_can_be_read_and_not_appended_to(self) -> None:
        with unprivileged() as directory:
            path = directory / "tallyman.db"
            committed(path, number=3)
            path.chmod(0o400)
            assert last_number(path) == 3
            with SqliteStore.open(path, now=lambda: 0, create=False, lock=False) as store:
                with pytest.raises(StorageError, match="is read-only for this user: make the file"):
                    store.append([Append(Log.TOTALS, b"k", b"")])
                assert store.end(Log.TOTALS) == 2

    def test_a_write_that_fails_leaves_the_last_commit_and_the_next_one_succeeds(
        self, service: SqliteStore, path: Path
    ) -> None:
        service.commit(Stage.AGGREGATE, numbered(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("tallyman.db-wal").stat().st_size + 50_000, hard))
        try:
            with pytest.raises(StorageError, match="cannot be read or written: look at the disk"):
                service.commit(Stage.AGGREGATE, numbered(2, filler=1_000))
            assert last_number(path) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert last_number(path) == 1
        service.commit(Stage.AGGREGATE, numbered(2, filler=1_000))
        assert last_number(path) == 2

    def test_a_full_disk_leaves_the_last_commit_and_so_does_one_that_became_read_only(self, tmp_path: Path) -> None:
        if not shutil.which("unshare"):
            pytest.skip("no file system can be mounted here: there is no unshare")
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNTS, sys.executable, tmp_path, SMALL_DISK],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 77 or "unshare" in done.stderr:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        full, retried, read_only = done.stdout.splitlines()
        assert "tallyman.db has no room on its disk: make room and start again" in full
        assert retried == "the last commit, then the next one"
        assert "cannot be used: it has to be writable" in read_only
        assert done.stderr == ""

    def test_a_file_that_somebody_else_keeps_locked_is_waited_for_within_bounds(
        self, service: SqliteStore, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.commit(Stage.AGGREGATE, numbered(1))
        monkeypatch.setattr(sqlite_file, "PATIENCE", 0.05)
        with (
            SqliteStore.open(path, now=clock, create=False, lock=False) as command,
            closing(sqlite3.connect(path, isolation_level=None)) as somebody,
        ):
            somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageError, match="is locked by another process: end what has it open"):
                command.append([Append(Log.TOTALS, b"k", b"")])
            assert last_number(path) == 1
            somebody.execute("ROLLBACK")
            command.append([Append(Log.TOTALS, b"k", b"1")])

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm", ".lock"])
    @pytest.mark.parametrize("happened", ["deleted", "replaced"])
    def test_a_file_that_is_taken_away_in_use_is_noticed_before_the_next_commit(
        self, service: SqliteStore, path: Path, suffix: str, happened: str
    ) -> None:
        """Where the file was moved away with its log, what was acknowledged is found there."""
        service.commit(Stage.AGGREGATE, numbered(1))
        part = path.with_name(path.name + suffix)
        elsewhere = path.parent / "elsewhere"
        elsewhere.mkdir()
        part.rename(elsewhere / part.name)
        if happened == "replaced":
            part.write_bytes((elsewhere / part.name).read_bytes() if suffix else b"")

        with pytest.raises(StorageError, match=f"{part} was {happened} while in use: stop, put back"):
            service.commit(Stage.AGGREGATE, numbered(2))
        with pytest.raises(StorageError, match=f"was {happened} while in use"):
            service.restore(Stage.AGGREGATE, 0)

        part.unlink(missing_ok=True)
        (elsewhere / part.name).rename(part)
        assert last_number(path) == 1
        service.commit(Stage.AGGREGATE, numbered(2))
        assert last_number(path) == 2

    def test_a_log_without_its_file_is_not_deleted(self, service: SqliteStore, path: Path) -> None:
        """SQLite itself would start an empty file and delete the log, and with it the last commits."""
        service.commit(Stage.AGGREGATE, numbered(1))
        lost = path.parent / "lost.db"
        subprocess.run(["cp", f"{path}-wal", f"{lost}-wal"], check=True)
        with pytest.raises(
            StorageError, match=r"lost\.db-wal holds commits, and .*lost\.db is not there: put back both"
        ):
            opened(lost)
        assert lost.with_name("lost.db-wal").stat().st_size > 0

    def test_a_lost_write_ahead_log_is_an_earlier_commit_or_reported_as_damage(self, path: Path) -> None:
        """The file cannot know of it; the offset that the consumer group keeps does."""
        with SqliteStore.open(path, now=lambda: 0, create=True, lock=True) as store:
            store.commit(Stage.AGGREGATE, numbered(1))
            sqlite_file.checkpoint(store._writer)
            store.commit(Stage.AGGREGATE, numbered(2))
            copied = path.with_name("copy.db")
            # Through another process: closing the file in this one would drop the store's locks on it.
            subprocess.run(["cp", path, copied], check=True)
        assert last_number(copied) == 1

    def test_an_older_sqlite_is_refused(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
        with pytest.raises(StorageError, match=r"is too old: use a Python that is linked with 3\.37"):
            opened(path)

    def test_a_mistake_of_the_caller_is_not_blamed_on_the_file(self, service: SqliteStore, path: Path) -> None:
        service.commit(Stage.AGGREGATE, numbered(1))
        with pytest.raises(sqlite3.IntegrityError):
            service.commit(Stage.AGGREGATE, {0: Changes(2, {b"n": "text"})})  # type: ignore[dict-item]  # on purpose
        assert last_number(path) == 1


def damage(path: Path, content: bytes) -> None:
    """Scribble over the page on which this stands."""
    with path.open("r+b") as file:
        place = file.read().index(content)
        file.seek(place - place % 4096)
        file.write(b"\x55" * 4096)


MOUNTS = """
mkdir "$1/disk" && mount -t tmpfs -o size=1m tmpfs "$1/disk" || exit 77
"$0" -c "$2" "$1/disk" full && mount -o remount,ro "$1/disk" && "$0" -c "$2" "$1/disk" read-only
"""

SMALL_DISK = """
import sys
from pathlib import Path
from consumer.storage import StorageError
from tests.unit.test_sqlite import SqliteStore, Stage, committed, last_number, numbered, opened

path = Path(sys.argv[1]) / "tallyman.db"
if sys.argv[2] == "full":
    filler = path.with_name("filler")
    with SqliteStore.open(path, now=lambda: 0, create=True, lock=True) as store:
        store.commit(Stage.AGGREGATE, numbered(1))
        filler.write_bytes(bytes(600_000))
        try:
            store.commit(Stage.AGGREGATE, numbered(2, filler=1_500))
        except StorageError as error:
            print(error)
        assert last_number(path) == 1
        filler.unlink()
        store.commit(Stage.AGGREGATE, numbered(2))
        assert last_number(path) == 2
    print("the last commit, then the next one")
else:
    try:
        opened(path)
    except StorageError as error:
        print(error)
"""

COMMITS = """
import sys
from pathlib import Path
from consumer.storage import Append, Changes, Log, Stage, sqlite
from consumer.storage.sqlite import SqliteStore

sqlite.WAL_BYTES = 200_000
with SqliteStore.open(Path(sys.argv[1]), now=lambda: 0, create=True, lock=True) as store:
    restored = store.restore(Stage.AGGREGATE, 0)
    number = int(dict(restored.entries)[b"n"]) if restored else 0
    while True:
        number += 1
        value = b"%d" % number
        changes = Changes(
            number,
            {b"n": value, b"k%d" % (number % 50): value * 20},
            [b"k%d" % ((number + 25) % 50)],
            [Append(log, b"k", value) for log in Log],
        )
        store.commit(Stage.AGGREGATE, {0: changes, 1: changes})
        print(number, flush=True)
"""


def test_a_service_that_is_killed_has_lost_nothing_that_it_acknowledged(path: Path) -> None:
    """At whatever moment: what is found is one commit, the last acknowledged one or the one after it, in all parts."""
    moments = random.Random(20_231_114)  # noqa: S311 - a choice of moments, not a secret
    acknowledged = 0
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", COMMITS, path], cwd=REPOSITORY, stdout=subprocess.PIPE)
        with child:
            assert child.stdout is not None
            for _ in range(moments.randrange(1, 150)):
                acknowledged = int(child.stdout.readline())
            time.sleep(moments.random() / 100)  # waits for nothing: the moment within a commit is to be any
            child.kill()
            acknowledged = int(([b"%d" % acknowledged, *child.stdout.read().splitlines()])[-1])

        with SqliteStore.open(path, now=lambda: 0, create=False, lock=False) as store:
            for partition in (0, 1):
                restored = store.restore(Stage.AGGREGATE, partition)
                assert restored is not None
                number = restored.offset
                assert number in (acknowledged, acknowledged + 1)
                assert dict(restored.entries) == expected(number)
            for log in Log:
                values = [int(row.value) for row in store.read(log, 0, 1_000_000)]
                assert values == sorted([*range(1, number + 1)] * 2)
        acknowledged = number


def expected(number: int) -> dict[bytes, bytes]:
    """The entries after this many commits of the child."""
    entries: dict[bytes, bytes] = {}
    for n in range(1, number + 1):
        entries.pop(b"k%d" % ((n + 25) % 50), None)
        entries |= {b"n": b"%d" % n, b"k%d" % (n % 50): (b"%d" % n) * 20}
    return entries
