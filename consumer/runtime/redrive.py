"""Dead letters: to read them, and to produce them again once what was wrong is mended.

A redriven event arrives anew, on its own partition, with the same key and headers. It is given its event time where
it has none, so that it is billed in the window in which it took place. Whatever is produced is marked batch by batch:
an interrupted redrive goes on where it stopped, and what a crash made it produce twice is a duplicate to stage 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from consumer import deadletters
from consumer.config import Config
from consumer.deadletters import DeadLetter
from consumer.events import Decoder, Malformed
from consumer.runtime.source import Source, SourceError
from consumer.storage import Archive, Log, Logged
from consumer.storage.kafka_client import made

BATCH: Final = 100
"""Letters produced between two marks; all of them are in memory, with events of up to a megabyte."""
READ_S: Final = 10.0
DELIVERY_MS: Final = 30_000

DIES_AGAIN: Final = frozenset({"late", "future"})
"""Reasons that mending an event or a path does not cure."""

_REFUSED: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD})
"""Errors about one record, which will not be better next time."""

_DECODER: Final = Decoder((), ())
_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])

Headers = list[tuple[str, str | bytes | None]]


class RedriveRefused(Exception):
    """Nothing can be produced again; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter and its place in the log of dead letters."""

    number: int
    letter: DeadLetter
    record: Logged

    @property
    def redriven_at(self) -> int | None:
        """When it was produced again, in milliseconds since the epoch."""
        return self.record.redriven_at

    @property
    def kept(self) -> bool:
        """Whether the event is here; if not, it was too large, and is read from its topic."""
        return self.letter.value is not None

    @property
    def event(self) -> tuple[str, str] | None:
        """The event's source and id, if they can be read."""
        if self.letter.value is None:
            return None
        try:
            event = _DECODER.decode(self.letter.headers, self.letter.value)
        except Malformed:
            return None
        return event.source, event.id


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters are asked for. ``since`` is an arrival, in milliseconds; no numbers are all of them."""

    reason: str | None = None
    partition: int | None = None
    since: int | None = None
    numbers: frozenset[int] = frozenset()

    def __contains__(self, each: Letter) -> bool:
        letter = each.letter
        return (
            (self.reason is None or letter.reason == self.reason)
            and (self.partition is None or letter.partition == self.partition)
            and (self.since is None or letter.timestamp >= self.since)
            and (not self.numbers or each.number in self.numbers)
        )


def letters(store: Archive, wanted: Wanted) -> Iterator[Letter]:
    """The letters that are wanted, those of one partition of their log in its order.

    Only those that are there now: what is redriven and dies again is a new letter, and would never come to an end.
    """
    there = store.logged(Log.DEAD_LETTERS, ends=store.ends(Log.DEAD_LETTERS))
    return (letter for each in there if (letter := opened(store, each)) in wanted)


def opened(store: Archive, record: Logged) -> Letter:
    """The letter in a record of the log."""
    return Letter(store.number(record), deadletters.decode(record.value), record)


@dataclass(slots=True)
class Redriven:
    """What a redrive did, in letters."""

    produced: int = 0
    before: int = 0
    """Not produced, because they were redriven before."""
    old: int = 0
    """Not produced, because they are older than ``deduplicate_for``."""
    earlier: int = 0
    """Not produced, because they were buried before the pipeline began anew, which has read their events again."""
    gone: list[int] = field(default_factory=list)
    """Numbers of those that were kept in the topic alone, and cannot be read there any more."""
    refused: list[int] = field(default_factory=list)
    """Numbers of those that the broker refused, whatever became of the others."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Of those produced, by why they are dead."""


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a redrive does although it may be wrong to."""

    again: bool = False
    """Those that were redriven before."""
    even_old: bool = False
    """Those older than ``deduplicate_for``, or than the pipeline's last beginning: of an earlier redrive nothing may be
    remembered any more."""


def redrive(
    config: Config,
    store: Archive,
    source: Source,
    wanted: Wanted,
    allowed: Permissions,
    *,
    now: int,
    dry_run: bool = False,
    told: Callable[[Redriven], None] = lambda _: None,
) -> Redriven:
    """Produce letters again; ``told`` hears of the progress after every batch.

    Raises ``RedriveRefused`` where the topic is not the one that the letters came from, and ``SourceError`` where Kafka
    does not take them; what was produced until then is marked.
    """
    topic, facts = source.describe(), store.facts()
    if facts is not None and facts.topic_id != topic.topic_id:
        raise RedriveRefused(
            f"the dead letters in {store.place} came from the topic {facts.topic} ({facts.topic_id}), and this is "
            f"{topic.name} ({topic.topic_id}): nothing was produced. Correct the configuration."
        )
    done = Redriven()
    begun = facts.created_at if facts is not None else 0
    oldest = now - int(config.windows.deduplicate_for)
    chosen = (each for each in letters(store, wanted) if _may(each, done, allowed, oldest=oldest, begun=begun))
    with closing(source.consumer()) as consumer:
        producer = _Again(config, topic.name)
        while batch := list(islice(chosen, BATCH)):
            whole = [(each, _whole(each, consumer, source, begun=begun)) for each in batch]
            done.gone += [each.number for each, event in whole if event is None]
            found = [(each, event) for each, event in whole if event is not None]
            if not dry_run:
                found = _produced(found, producer, store, done)
            done.produced += len(found)
            for each, _ in found:
                done.reasons[each.letter.reason] = done.reasons.get(each.letter.reason, 0) + 1
            told(done)
    return done


def _may(each: Letter, done: Redriven, allowed: Permissions, *, oldest: int, begun: int) -> bool:
    if each.redriven_at is not None and not allowed.again:
        done.before += 1
    elif each.record.appended_at < begun and not allowed.even_old:
        done.earlier += 1
    elif each.letter.timestamp < oldest and not allowed.even_old:
        done.old += 1
    else:
        return True
    return False


def _whole(each: Letter, consumer: Consumer, source: Source, *, begun: int) -> DeadLetter | None:
    """The letter with its event, from the topic where it is not kept here; None where it is gone."""
    if each.kept:
        return each.letter
    # Before the pipeline's beginning the topic may have been another one, with other events at the same offsets.
    return None if each.record.appended_at < begun else _fetch(each.letter, consumer, source)


def _fetch(letter: DeadLetter, consumer: Consumer, source: Source) -> DeadLetter | None:
    beginning, end = source.beginnings([letter.partition]), source.ends([letter.partition])
    if not beginning[letter.partition] <= letter.offset < end[letter.partition]:
        return None
    consumer.assign([TopicPartition(source.topic, letter.partition, letter.offset)])
    message = consumer.poll(READ_S)
    consumer.unassign()
    if message is None:
        raise SourceError(
            f"partition {letter.partition} of {source.topic} did not give up offset {letter.offset} within "
            f"{READ_S:.0f} s: try again"
        )
    error = message.error()
    if error is not None and error.name() not in {"_PARTITION_EOF", "_AUTO_OFFSET_RESET"}:
        raise SourceError(f"partition {letter.partition} of {source.topic} cannot be read: {error.str()}")
    if error is not None or message.offset() != letter.offset:
        return None
    try:
        headers: Any = message.headers()  # bytes all of them, though the client's types allow for text
    except UnicodeDecodeError:
        return None  # names that are no text cannot be produced again
    return msgspec.structs.replace(letter, key=message.key(), headers=headers or [], value=message.value())


def _produced(
    found: Sequence[tuple[Letter, DeadLetter]], producer: "_Again", store: Archive, done: Redriven
) -> list[tuple[Letter, DeadLetter]]:
    """Produce these, mark those that the broker has, and return them; raise where it has not, but for single ones."""
    errors = producer.send([whole for _, whole in found])
    sent = [each for each, error in zip(found, errors, strict=True) if error is None]
    store.mark_redriven(each.record for each, _ in sent)
    for (each, _), error in zip(found, errors, strict=True):
        if error is not None and error.code() in _REFUSED:
            done.refused.append(each.number)
        elif error is not None:
            raise SourceError(
                f"the topic did not take all letters ({error.str()}). Those that it took are marked as redriven: the "
                "same command goes on with the others."
            )
    return sent


class _Again:
    """Produces letters to the topic, and tells what became of each."""

    def __init__(self, config: Config, topic: str) -> None:
        self._topic = topic
        self._producer = made(
            Producer,
            {
                "log_level": "0",
                "enable.idempotence": "true",
                "compression.type": "lz4",
                "batch.num.messages": "1",  # one that is refused takes nothing with it
                "message.max.bytes": str(64 * 2**20),  # the broker took it once: its limit decides
                "message.timeout.ms": str(DELIVERY_MS),
            }
            | config.kafka_client(),
        )

    def send(self, whole: Sequence[DeadLetter]) -> list[KafkaError | None]:
        """For each letter, None once it is in the topic, or why it is not."""
        errors: list[KafkaError | None] = [KafkaError(KafkaError._MSG_TIMED_OUT)] * len(whole)  # noqa: SLF001 - so it is named
        for number, letter in enumerate(whole):
            value, headers = with_time(letter)

            def delivered(error: KafkaError | None, _: object, number: int = number) -> None:
                errors[number] = error

            try:
                self._producer.produce(
                    self._topic, value, letter.key, letter.partition, on_delivery=delivered, headers=headers
                )
            except KafkaException as failed:
                errors[number] = failed.args[0]
        self._producer.flush()  # ends by message.timeout.ms
        return errors


def with_time(letter: DeadLetter) -> tuple[bytes, Headers]:
    """Value and headers of the event, with an event time: its own or, where it has none, its first arrival."""
    value, headers = letter.value or b"", [*(letter.headers or ())]
    names = {name.lower(): text for name, text in headers}
    written = datetime.fromtimestamp(letter.timestamp / 1000, UTC).isoformat(timespec="milliseconds")
    written = written.replace("+00:00", "Z")
    media = (names.get("content-type") or b"").lstrip().lower()
    if not media.startswith(b"application/cloudevents") and any(name.startswith("ce_") for name in names):
        return value, headers if "ce_time" in names else [*headers, ("ce_time", written.encode())]
    try:
        members = _MEMBERS.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return value, headers  # no event: without a time it is none either
    time = members.get("time")
    if time is not None and bytes(time) != b"null":
        return value, headers
    # The other members stay the text that they are: no number passes through a float.
    return msgspec.json.encode(members | {"time": written}), headers
