"""What the Kafka store writes: a processor's position, and the logs' records as CloudEvents that anyone can read."""

import struct
from typing import Final

import msgspec
from xxhash import xxh64_intdigest

from consumer.storage import Facts, Log, StorageError

POSITION_KEY: Final = b"\x00offset"
"""The entry that says how far a processor has read. Each commit writes it as the partition's last record."""

Headers = list[tuple[str, str | bytes | None]]

_METADATA: Final = struct.Struct("=7si")
_METADATA_MAGIC: Final = b"CGMDv2:"


class Position(msgspec.Struct, frozen=True):
    """How far a processor has read, and what its state belongs to."""

    offset: int
    sequence: int
    """Of the partition's commits: each is one above the one before it."""
    spread: int
    """The number of partitions of the totals log: with another one, customers would be elsewhere."""
    facts: Facts


_encoder = msgspec.json.Encoder()
_positions = msgspec.json.Decoder(Position)


def encode_position(position: Position) -> bytes:
    """The value of the position's entry."""
    return _encoder.encode(position)


def decode_position(value: bytes) -> Position:
    """The position that was encoded; raises ``StorageError`` for anything else."""
    try:
        return _positions.decode(value)
    except msgspec.DecodeError as failed:
        raise StorageError(
            f"a position of the state cannot be read ({failed}): use the version that wrote it"
        ) from None


def partition_of(key: bytes, partitions: int) -> int:
    """Where a log keeps the records of this key. Fixed for ever: another rule would put customers out of order."""
    return xxh64_intdigest(key) % partitions


def is_member(metadata: bytes) -> bool:
    """Whether a consumer's group metadata are those of a member.

    Kafka takes the offsets of a transaction unchecked from somebody without generation and member id, whoever the
    members are. A consumer that has not joined yet, or not again, is just such a somebody.
    """
    if len(metadata) < _METADATA.size:
        return False
    magic, generation = _METADATA.unpack_from(metadata)
    member = metadata[_METADATA.size :].split(b"\x00")[1:2]
    return magic == _METADATA_MAGIC and generation >= 0 and bool(member) and bool(member[0])


MARK_KEY: Final = b"redriven"
_MARK: Final = b'{"kind":"redriven",'


class Mark(msgspec.Struct, frozen=True, tag_field="kind", tag="redriven"):
    """Dead letters that were produced again. It lies in their log, behind them in their partition, and no reader of
    letters takes it for one."""

    partition: int
    offsets: list[int]
    at: int
    """Milliseconds since the epoch, by the operator's clock."""


_marks = msgspec.json.Decoder(Mark)


def encode_mark(mark: Mark) -> bytes:
    """A record of the log of dead letters."""
    return _encoder.encode(mark)


def mark_in(value: bytes) -> Mark | None:
    """The mark that a record of the log of dead letters is, told without decoding what is none."""
    return _marks.decode(value) if value.startswith(_MARK) else None


class _Seen(msgspec.Struct):
    """What tells one record of a log from another."""

    kind: str = ""
    identifier: str = ""
    how: str = ""
    report: str = ""
    action: str = ""
    at: int = 0
    partition: int = 0
    offset: int = 0
    offsets: list[int] = []
    clock: int = 0
    traceparent: str = ""
    tracestate: str = ""


_seen = msgspec.json.Decoder(_Seen)


def cloud_event(pipeline: str, log: Log, value: bytes) -> Headers:
    """The headers that make a log's record a CloudEvent in binary mode; none for a value that is not one of ours.

    Within a source (a log of a pipeline) an id is never given twice: it is that of the thing itself, not of the record.
    """
    try:
        seen = _seen.decode(value)
    except msgspec.MsgspecError:
        return []
    kind, name = _named(log, seen)
    trace = (("traceparent", seen.traceparent), ("tracestate", seen.tracestate))
    return [
        ("ce_specversion", b"1.0"),
        ("ce_id", name.encode()),
        ("ce_source", f"/tallyman/{pipeline}/{log.value}".encode()),
        ("ce_type", f"tallyman.{kind}.v1".encode()),
        *((f"ce_{attribute}", text.encode()) for attribute, text in trace if text),
        ("content-type", b"application/json"),
    ]


def _named(log: Log, seen: _Seen) -> tuple[str, str]:
    if log is Log.OUTCOMES:
        return "outcome", f"{seen.identifier}:{seen.how}"
    if seen.kind == "redriven":
        return "redriven", f"{seen.partition}-{seen.offsets[0]}:{seen.at}"
    if log is Log.DEAD_LETTERS:
        return "dead_letter", f"{seen.partition}-{seen.offset}"
    names = {
        "advance": f"{seen.partition}-{seen.offset}-{seen.clock}",
        "command": f"{seen.identifier}:{seen.action}:{seen.at}",
        "rejection": f"{seen.identifier}:rejection:{seen.report}",
        "report": seen.report,
        "comparison": f"comparison:{seen.at}",
    }
    return (seen.kind, names[seen.kind]) if seen.kind in names else ("total", seen.identifier)
