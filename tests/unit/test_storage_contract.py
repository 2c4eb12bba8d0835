"""What every store has to do. A further store joins by a parameter of the fixture ``fresh``."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consumer.storage import Append, Changes, Log, Stage, Store
from consumer.storage.kafka import KafkaStore
from consumer.storage.sqlite import SqliteStore
from tests.kafka.stores import Pipeline

PARTITIONS: Final = 3


class Backend(Protocol):
    """Durable state of one pipeline, empty at first, for topics with three partitions."""

    def open(self) -> AbstractContextManager[Store]:
        """As a process opens it that starts; the end of the context is the end of that process."""

    def logged(self, log: Log) -> list[tuple[bytes, bytes]]:
        """What readers of the log see: keys and values, those of one key in their order."""


class SqliteBackend:
    """A file of its own."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "state.db"

    @contextmanager
    def open(self) -> Iterator[SqliteStore]:
        with SqliteStore.open(self._path, now=lambda: 1_700_000_000_000, create=True, lock=True) as store:
            yield store

    def logged(self, log: Log) -> list[tuple[bytes, bytes]]:
        with SqliteStore.open(self._path, now=lambda: 0, create=False, lock=False) as store:
            return [(row.key, row.value) for row in store.read(log, 0, 1_000_000)]


class KafkaBackend:
    """Topics of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    @contextmanager
    def open(self) -> Iterator[KafkaStore]:
        with self._pipeline.store() as store:
            for stage in Stage:
                for partition in range(PARTITIONS):
                    store.restore(stage, partition)
            yield store

    def logged(self, log: Log) -> list[tuple[bytes, bytes]]:
        return [(record.key, record.value) for record in self._pipeline.logged(log)]


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Backend]]:
    if request.param == "sqlite":
        yield lambda: SqliteBackend(tmp_path_factory.mktemp("store"))
    else:
        kafka = request.getfixturevalue("kafka")
        with ExitStack() as opened:
            yield lambda: KafkaBackend(opened.enter_context(closing(Pipeline(kafka, partitions=PARTITIONS))))


@pytest.fixture
def backend(fresh: Callable[[], Backend]) -> Backend:
    return fresh()


def restored(store: Store, stage: Stage, partition: int) -> tuple[int, dict[bytes, bytes]] | None:
    found = store.restore(stage, partition)
    if found is None:
        return None
    entries = list(found.entries)

    assert len({key for key, _ in entries}) == len(entries)
    return found.offset, dict(entries)


def by_key(records: list[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for key, value in records:
        found.setdefault(key, []).append(value)
    return found


def test_a_processor_that_never_committed_has_nothing_to_restore(backend: Backend) -> None:
    with backend.open() as store:
        assert restored(store, Stage.AGGREGATE, 0) is None
        store.commit(Stage.AGGREGATE, {0: Changes(5, {b"k": b"v"})})
        assert restored(store, Stage.AGGREGATE, 1) is None
        assert restored(store, Stage.DELIVER, 0) is None


def test_a_commit_is_restored_by_the_same_process_and_by_the_next(backend: Backend) -> None:
    with backend.open() as store:
        store.commit(Stage.AGGREGATE, {1: Changes(5, {b"k": b"v", b"other": b"w"})})
        assert restored(store, Stage.AGGREGATE, 1) == (5, {b"k": b"v", b"other": b"w"})
    with backend.open() as store:
        assert restored(store, Stage.AGGREGATE, 1) == (5, {b"k": b"v", b"other": b"w"})


def test_a_commit_changes_what_it_names_and_nothing_else(backend: Backend) -> None:
    with backend.open() as store:
        store.commit(Stage.DELIVER, {0: Changes(5, {b"kept": b"1", b"changed": b"1", b"gone": b"1"})})
        store.commit(Stage.DELIVER, {0: Changes(9, {b"changed": b"2", b"new": b"2"}, [b"gone", b"never there"])})
        assert restored(store, Stage.DELIVER, 0) == (9, {b"kept": b"1", b"changed": b"2", b"new": b"2"})


def test_an_entry_that_was_deleted_can_be_put_again(backend: Backend) -> None:
    with backend.open() as store:
        store.commit(Stage.AGGREGATE, {0: Changes(1, {b"k": b"1"})})
        store.commit(Stage.AGGREGATE, {0: Changes(2, deletes=[b"k"])})
        store.commit(Stage.AGGREGATE, {0: Changes(3, {b"k": b"3"})})
        assert restored(store, Stage.AGGREGATE, 0) == (3, {b"k": b"3"})


def test_a_commit_without_entries_moves_the_offset(backend: Backend) -> None:
    with backend.open() as store:
        store.commit(Stage.AGGREGATE, {0: Changes(5, {b"k": b"v"})})
        store.commit(Stage.AGGREGATE, {0: Changes(6)})
        assert restored(store, Stage.AGGREGATE, 0) == (6, {b"k": b"v"})


def test_the_same_key_of_another_stage_or_partition_is_another_entry(backend: Backend) -> None:
    with backend.open() as store:
        store.commit(Stage.AGGREGATE, {0: Changes(1, {b"k": b"a0"}), 1: Changes(2, {b"k": b"a1"})})
        store.commit(Stage.DELIVER, {0: Changes(3, {b"k": b"d0"})})
        store.commit(Stage.AGGREGATE, {1: Changes(4, deletes=[b"k"])})
        assert restored(store, Stage.AGGREGATE, 0) == (1, {b"k": b"a0"})
        assert restored(store, Stage.AGGREGATE, 1) == (4, {})
        assert restored(store, Stage.DELIVER, 0) == (3, {b"k": b"d0"})


def test_keys_and_values_are_any_bytes(backend: Backend) -> None:
    entries = {b"\x00": b"", b"\x00\xff": b"\x00", "ключ".encode(): bytes(range(256)), b"'\"%": b"x" * 65_536}
    with backend.open() as store:
        store.commit(Stage.AGGREGATE, {0: Changes(2**53, entries)})
        assert restored(store, Stage.AGGREGATE, 0) == (2**53, entries)


def test_appended_records_are_read_in_their_order(backend: Backend) -> None:
    with backend.open() as store:
        first = [Append(Log.TOTALS, b"k", b"1"), Append(Log.OUTCOMES, b"k", b"o"), Append(Log.TOTALS, b"k", b"2")]
        store.commit(Stage.AGGREGATE, {0: Changes(1, appends=first), 1: Changes(1, appends=[])})
        store.commit(Stage.AGGREGATE, {0: Changes(2, appends=[Append(Log.TOTALS, b"k", b"3")])})
        store.commit(Stage.DELIVER, {0: Changes(2, appends=[Append(Log.DEAD_LETTERS, b"", b"\x00")])})
    assert backend.logged(Log.TOTALS) == [(b"k", b"1"), (b"k", b"2"), (b"k", b"3")]
    assert backend.logged(Log.OUTCOMES) == [(b"k", b"o")]
    assert backend.logged(Log.DEAD_LETTERS) == [(b"", b"\x00")]


keys = st.sampled_from([b"a", b"b", b"c", b"\x00", b"a\x00", b"\xff" * 40])
values = st.binary(max_size=20)
changes = st.builds(
    lambda step, puts, deletes, appends: Changes(step, puts, [key for key in deletes if key not in puts], appends),
    st.integers(0, 5),
    st.dictionaries(keys, values, max_size=4),
    st.lists(keys, unique=True, max_size=4),
    st.lists(st.builds(Append, st.sampled_from(Log), keys, values), max_size=4),
)
commits = st.tuples(
    st.sampled_from(Stage), st.dictionaries(st.integers(0, PARTITIONS - 1), changes, min_size=1, max_size=PARTITIONS)
)
histories = st.lists(st.one_of(st.just(None), commits), max_size=12)
"""Commits, whose offsets are steps from the one before, and None where the process ends and another one starts."""


Histories = list[tuple[Stage, Mapping[int, Changes]] | None]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories)
@pytest.mark.parametrize("fresh", ["sqlite"], indirect=True)
def test_whatever_is_committed_is_restored(fresh: Callable[[], Backend], history: Histories) -> None:
    check(fresh, history)


# Few, for each of them has topics of its own.
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories)
@pytest.mark.parametrize("fresh", [pytest.param("kafka", marks=pytest.mark.kafka)], indirect=True)
def test_whatever_is_committed_to_kafka_is_restored(fresh: Callable[[], Backend], history: Histories) -> None:
    check(fresh, history)


def check(fresh: Callable[[], Backend], history: Histories) -> None:
    backend, remaining = fresh(), deque(history)
    state: dict[tuple[Stage, int], tuple[int, dict[bytes, bytes]]] = {}
    logs: dict[Log, list[tuple[bytes, bytes]]] = {log: [] for log in Log}
    while True:
        with backend.open() as store:
            for stage in Stage:
                for partition in range(PARTITIONS):
                    assert restored(store, stage, partition) == state.get((stage, partition))
            if not remaining:
                break
            while remaining and (commit := remaining.popleft()) is not None:
                stage, steps = commit
                moved = {}
                for partition, step in steps.items():
                    offset, entries = state.get((stage, partition), (0, {}))
                    moved[partition] = Changes(offset + step.offset, step.puts, step.deletes, step.appends)
                    kept = {key: value for key, value in entries.items() if key not in step.deletes}
                    state[stage, partition] = (moved[partition].offset, kept | step.puts)
                    for log, key, value in step.appends:
                        logs[log].append((key, value))
                store.commit(stage, moved)
    for log in Log:
        assert by_key(backend.logged(log)) == by_key(logs[log])
