"""Whether the state, the group's offsets and the log belong together: judged before anything is read.

The state says how far stage 1 has read. The offsets that its consumer group has committed are a witness: they show that
there once was a state where none is left, or a newer one than this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from consumer.runtime.source import Ends, Topic
from consumer.storage import Facts

LONGEST_BACK: Final = timedelta(days=34)
"""Stripe takes events of the last 35 days."""


class StartRefused(Exception):
    """Going on would lose or repeat usage; the message says what does not fit and what to do."""


@dataclass(frozen=True, slots=True)
class Found:
    """What Kafka says, per partition: the oldest offset left, the end, and what the group has committed."""

    topic: Topic
    group: str
    beginnings: Mapping[int, int]
    ends: Mapping[int, int]
    committed: Mapping[int, int]


def first_start(pipeline: str, bill_from: int | None, found: Found, now: int, *, place: str) -> int:
    """Judge a start without any state; ``place`` is where one would be. Returns from when to bill, in milliseconds."""
    if found.committed:
        raise StartRefused(
            f"{place} holds no state, but the consumer group {found.group} has read {found.topic.name} before: the "
            "state was lost, or this is the wrong place. Starting anew would bill again what has been billed. Bring it "
            "back from a backup; if it is gone for good, `tallyman reset --bill-from T` starts over with events from T "
            "on."
        )
    if bill_from is None:
        raise StartRefused(
            f"the pipeline {pipeline} has not run before: set bill_from in the configuration to the time from which "
            f"events are to be billed, for instance bill_from: {shown(now)}. Events before it are ignored."
        )
    oldest = now - int(LONGEST_BACK.total_seconds() * 1000)
    if bill_from < oldest:
        raise StartRefused(
            f"bill_from is {shown(bill_from)}, more than {LONGEST_BACK.days} days back: Stripe refuses older usage. "
            f"The earliest time possible is {shown(oldest)}."
        )
    return bill_from


def next_start(
    pipeline: str, bill_from: int | None, state: Facts, offsets: Mapping[int, int], found: Found, *, place: str
) -> range:
    """Judge a start with state, which has read up to these offsets. Returns the partitions that have been added."""
    anew = "`tallyman reset --bill-from T` starts over with events from T on."
    for what, recorded, now in (
        ("pipeline", state.pipeline, pipeline),
        ("Kafka cluster", state.cluster_id, found.topic.cluster_id),
        ("topic", f"{state.topic} ({state.topic_id})", f"{found.topic.name} ({found.topic.topic_id})"),
    ):
        if recorded != now:
            raise StartRefused(
                f"{place} belongs to the {what} {recorded}, and this is {now}. Offsets and identifiers of one mean "
                f"nothing in the other. Correct the configuration; {anew}"
            )
    if bill_from is not None and bill_from != state.bill_from:
        raise StartRefused(
            f"bill_from is {shown(bill_from)}, but the pipeline started with {shown(state.bill_from)}: it is fixed "
            f"from the first start on. Set it back; {anew}"
        )
    if found.topic.partitions < state.partitions:
        raise StartRefused(
            f"{found.topic.name} had {state.partitions} partitions and has {found.topic.partitions}. {anew}"
        )
    for partition in range(state.partitions):
        offset = offsets.get(partition)
        if offset is None:
            raise StartRefused(
                f"{place} has no offset for partition {partition}: it is damaged. Restore a backup; {anew}"
            )
        if offset < found.committed.get(partition, 0):
            raise StartRefused(
                f"{place} has read partition {partition} up to {offset}, but the group {found.group} up to "
                f"{found.committed[partition]}: the state is older than what has been billed. Bring back the "
                f"newest one; {anew}"
            )
        check_within(found, partition, offset)
    return range(state.partitions, found.topic.partitions)


def check_newest(ends: Ends, said: Ends, group: str, *, place: str) -> None:
    """Raise ``StartRefused`` where the state's logs end before what the group has seen of them."""
    for what, here, seen in (("totals", ends.totals, said.totals), ("outcomes", ends.outcomes, said.outcomes)):
        if here < seen:
            raise StartRefused(
                f"{place} ends its {what} log at {here}, but the group {group} has seen it end at {seen}: the file is "
                "older than what has been billed. Put back the newest one; `tallyman reset --bill-from T` archives "
                "the state and starts over with events from T on."
            )


def check_within(found: Found, partition: int, offset: int) -> None:
    """Raise ``StartRefused`` where the next record to read is not in the log any more, or not yet."""
    beginning, end = found.beginnings[partition], found.ends[partition]
    anew = "`tallyman reset --bill-from T` gives them up and starts over with events from T on."
    if offset < beginning:
        raise StartRefused(
            f"partition {partition} of {found.topic.name} was to be read from {offset} on, but retention has deleted "
            f"what is before {beginning}: {beginning - offset} records are gone unread. Bring them back from a backup; "
            f"{anew}"
        )
    if offset > end:
        raise StartRefused(
            f"partition {partition} of {found.topic.name} was to be read from {offset} on, but ends at {end}: the log "
            f"has lost records that were counted (an unclean election?). Find out what happened before going on; {anew}"
        )


def shown(time: int) -> str:
    """Milliseconds since the epoch, as the configuration writes times."""
    return datetime.fromtimestamp(time / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
