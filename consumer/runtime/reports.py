"""Stripe's reports of events that it took and rejected later: what they say, and which totals these events billed."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import msgspec

from consumer import totals
from consumer.deliver.entries import (
    Entry,
    Outcome,
    State,
    decode_outcome,
    encode_outcome,
    is_total,
    refused,
    rejects,
    total_of,
    unpack,
)
from consumer.storage import Append, Archive, Log, Stage
from consumer.times import parse_time
from consumer.totals import Rejection, Report

TYPES: Final = frozenset({"v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"})
"""The events of Stripe's that are such reports."""

BEFORE_MS: Final = 3_600_000
"""So long before Stripe looked at an event we may have heard that it was taken: seconds are usual, none promised."""

UNDATED_MS: Final = 24 * 3_600_000
"""How long before now Stripe looked at the events of a report that does not say it."""

SAMPLES: Final = 300
CODES: Final = 50
LONGEST_KEY: Final = 255
"""Characters of an Idempotency-Key that Stripe takes."""
LONGEST_CODE: Final = 100
LONGEST_MESSAGE: Final = 500
MOST: Final = 10**15


class Malformed(Exception):
    """What Stripe says is no report, and will not become one."""


class Sample(msgspec.Struct, frozen=True):
    """One event that was rejected."""

    key: str
    """The Idempotency-Key of the request that it came by."""
    code: str
    message: str


class Reported(msgspec.Struct, frozen=True):
    """What a report says."""

    report: str
    """The id of Stripe's event."""
    meter: str | None
    """The id of Stripe's meter, where there is one."""
    since: int
    until: int
    """When Stripe looked at the events in it, in seconds since the epoch."""
    errors: dict[str, int]
    """How many events were rejected, by code."""
    samples: tuple[Sample, ...]


class Matched(msgspec.Struct, frozen=True):
    """A rejected event of ours."""

    rejection: Rejection
    customer: str
    """As events name the customer: by it the rejection lies in its total's partition."""
    event_name: str
    moving: bool = False
    """Its total is being tried. It may have ended when stage 2 reads of this; then it has to be told again."""


# What a report says


class _Request(msgspec.Struct):
    identifier: str | None = None
    idempotency_key: str | None = None


class _Sample(msgspec.Struct):
    error_message: str | None = None
    request: _Request | None = None


class _Kind(msgspec.Struct):
    code: str | None = None
    error_count: int | None = None
    sample_errors: list[_Sample] | None = None


class _Reason(msgspec.Struct):
    error_count: int | None = None
    error_types: list[_Kind] | None = None


class _Data(msgspec.Struct):
    reason: _Reason
    validation_start: str | None = None
    validation_end: str | None = None


class _Related(msgspec.Struct):
    id: str | None = None


class _Event(msgspec.Struct):
    data: _Data
    created: str | None = None
    related_object: _Related | None = None


def understood(report: str, event: Mapping[str, Any], now: int) -> Reported:
    """The report of this id, as Stripe gives it; ``now`` is in milliseconds.

    Codes are an open list: an unknown one is kept as it is. What is missing is done without. Raises ``Malformed``.
    """
    try:
        said = msgspec.convert(event, _Event)
    except msgspec.ValidationError as failed:
        raise Malformed(str(failed)) from None
    until = _time(said.data.validation_end) or _time(said.created) or now
    since = min(_time(said.data.validation_start) or min(until, now) - UNDATED_MS, until, now)
    reason = said.data.reason
    errors: dict[str, int] = {}
    samples: list[Sample] = []
    for kind in reason.error_types or ():
        code = _cut(kind.code or "unknown", LONGEST_CODE)
        if code not in errors and len(errors) >= CODES:
            code = "other"
        given = kind.sample_errors or []
        errors[code] = errors.get(code, 0) + _count(kind.error_count, len(given))
        samples += _samples(given[: SAMPLES - len(samples)], code)
    if not errors:
        errors["unknown"] = _count(reason.error_count, 0)
    return Reported(
        report=report,
        meter=said.related_object.id if said.related_object else None,
        since=max(0, since) // 1000,
        until=-(-until // 1000),
        errors=errors,
        samples=tuple(samples),
    )


def _samples(given: list[_Sample], code: str) -> Iterator[Sample]:
    for each in given:
        request = each.request or _Request()
        key = request.identifier or request.idempotency_key or ""
        if 0 < len(key) <= LONGEST_KEY:
            yield Sample(key, code, _cut(each.error_message or "", LONGEST_MESSAGE))


def _time(text: str | None) -> int | None:
    try:
        return parse_time(text) if text else None
    except ValueError:
        return None


def _count(said: int | None, at_least: int) -> int:
    return min(max(said or 0, at_least), MOST)


def _cut(text: str, length: int) -> str:
    # A lone surrogate can be written in JSON, and not be written again.
    return text[:length].encode(errors="replace").decode()


# Which totals are meant


def matched(store: Archive, reported: Reported, now: int) -> list[Matched]:
    """The events of the report that bill totals of ours, or may yet; ``now`` is in milliseconds.

    What is finished stays finished. So of the totals that have no outcome yet the entries are read, and then the
    outcomes that have been added: a total leaves the one place in the same commit that brings it to the other.
    """
    wanted: dict[str, list[Sample]] = {}
    for sample in {each.key: each for each in reported.samples}.values():
        if (identifier := total_of(sample.key)) is not None:
            wanted.setdefault(identifier, []).append(sample)
    if not wanted:
        return []
    ends = store.ends(Log.OUTCOMES)
    finished = _finished(store, wanted, store.since(Log.OUTCOMES, max(0, reported.since * 1000 - BEFORE_MS)), ends)
    unfinished: dict[str, Entry] = {}
    if missing := wanted.keys() - finished.keys():
        unfinished = _unfinished(store, missing)
        finished |= _finished(store, missing, ends, store.ends(Log.OUTCOMES))
    found: list[Matched] = []
    for identifier, samples in wanted.items():
        if (ended := finished.get(identifier)) is not None:
            for each in [each for each in samples if _rejects(ended, each)][:1]:
                then = refused(ended, f"{each.code}: {each.message}", now)
                rejection = _rejection(each, identifier, reported, now, encode_outcome(then))
                found.append(Matched(rejection, ended.customer, ended.event_name))
        elif (entry := unfinished.get(identifier)) is not None:
            total, moving = entry.total, entry.state is not State.PARKED and entry.first_unproven is not None
            for each in samples:
                rejection = _rejection(each, identifier, reported, now, b"null")
                found.append(Matched(rejection, total.customer, total.stripe.event_name, moving))
    return found


def _rejects(ended: Outcome, sample: Sample) -> bool:
    return rejects(ended.how, ended.key, ended.billed_as or ended.identifier, sample.key)


def _rejection(sample: Sample, identifier: str, reported: Reported, now: int, then: bytes) -> Rejection:
    return Rejection(
        identifier=identifier,
        key=sample.key,
        code=sample.code,
        message=sample.message,
        report=reported.report,
        at=now,
        outcome=msgspec.Raw(then),
    )


def _finished(
    store: Archive, identifiers: Collection[str], starts: Mapping[int, int], ends: Mapping[int, int]
) -> dict[str, Outcome]:
    """The last outcomes of these totals: one that is rejected already has two."""
    keys = {identifier.encode(errors="replace") for identifier in identifiers}
    found = (decode_outcome(each.value) for each in store.logged(Log.OUTCOMES, starts, ends) if each.key in keys)
    return {each.identifier: each for each in found}


def _unfinished(store: Archive, identifiers: Collection[str]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    keys = {identifier.encode(errors="replace") for identifier in identifiers}
    for partition in store.ends(Log.TOTALS):
        restored = store.restore(Stage.DELIVER, partition)
        for key, value in restored.entries if restored else ():
            if key in keys and is_total(key):
                entry = unpack(value)
                found[entry.total.identifier] = entry
    return found


def records(reported: Reported, found: Collection[Matched], event_name: str | None, now: int) -> list[Append]:
    """What stage 2 is told: each rejection beside its total, and the report once nothing in it is moving any more."""
    report = Report(
        report=reported.report,
        at=now,
        event_name=event_name,
        since=reported.since,
        until=reported.until,
        errors=reported.errors,
        named=len(found),
    )
    told = [Append(Log.TOTALS, each.customer.encode(), totals.encode(each.rejection)) for each in found]
    if not any(each.moving for each in found):
        told.append(Append(Log.TOTALS, reported.report.encode(), totals.encode(report)))
    return told
