"""The whole story of one total: where it came from, what was tried, what people decided, and how it ended."""

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from consumer import totals
from consumer.deliver.entries import BILLED, LONGEST, Decision, Entry, Outcome, identifier_of
from consumer.runtime.audit import Particulars, Standing, everything, line_of, unread
from consumer.storage import Archive, Log, Logged
from consumer.totals import Command, Total


class Unknown(Exception):
    """No record is about this identifier; the message says where to look instead."""


class Generation(msgspec.Struct, frozen=True, omit_defaults=True):
    """One generation of a total's identifier."""

    identifier: str
    """As Stripe was told it."""
    at_stripe: Literal["yes", "maybe", "no"]
    attempts: int = 0
    """Those that are recorded; a refused total that was released goes on counting."""
    stripe_customer: str | None = None
    first_unproven: int | None = None
    """Milliseconds since the epoch."""


class Decided(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operator's command said, and whether it was carried out."""

    action: Literal["release", "discard"]
    by: str
    reason: str
    at: int
    """Milliseconds since the epoch."""
    carried_out: Literal["yes", "no", "not yet"]
    parked: str | None = None
    """Why the total was parked then."""
    message: str | None = None
    """What Stripe had said."""


class Story(Particulars, frozen=True, omit_defaults=True, kw_only=True):
    """All that is kept of one total."""

    pipeline: str
    edition: str
    partition: int
    """Of the source topic."""
    generations: list[Generation]
    decisions: list[Decided]
    first_offset: int | None = None
    """None where the record in the totals log is not kept any more."""
    last_offset: int | None = None
    due: int | None = None
    """Milliseconds since the epoch, like all times below."""
    rounded: str | None = None
    finished_at: int | None = None
    key: str | None = None
    """The last Idempotency-Key."""
    reason: str | None = None
    """Why it is parked."""
    message: str | None = None
    """What Stripe said, where that is why it is parked or refused."""
    parked_at: int | None = None
    next_look: int | None = None
    """When it is tried again, where it is to be retried."""


def explain(store: Archive, identifier: str) -> Story:
    """The story of the total of this identifier, or of this generation of it; raises ``Unknown``.

    Reads the logs from end to end: a matter of seconds for a million totals.
    """
    base = re.sub(r"-g[0-9]+$", "", identifier)
    found = next((each for each in everything(store) if _identifier(each) in {identifier, base}), None)
    if found is None:
        raise Unknown(
            f"{identifier}: no total has this identifier. `tallyman totals` shows those that are kept; whatever was "
            "finished longer ago than limits.keep is not"
        )
    below = unread(store)
    total, commands = _logged(store, _identifier(found))
    decided = [
        Decided(
            each.action, each.by, each.reason, each.at, "no" if at.offset < below.get(at.partition, 0) else "not yet"
        )
        for each, at in commands
    ]
    return _told(found, total, decided)


def _identifier(each: Outcome | Entry | Total) -> str:
    return each.total.identifier if isinstance(each, Entry) else each.identifier


def _logged(store: Archive, identifier: str) -> tuple[Total | None, list[tuple[Command, Logged]]]:
    """What the totals log has of it: itself, and what was commanded, and where."""
    total: Total | None = None
    commands: list[tuple[Command, Logged]] = []
    name = identifier.encode()
    for each in store.logged(Log.TOTALS):
        if name not in each.value:
            continue
        record = totals.decode(each.value)
        if isinstance(record, Total) and record.identifier == identifier:
            total = total or record
        elif isinstance(record, Command) and record.identifier == identifier:
            commands.append((record, each))
    return total, commands


def _told(found: Outcome | Entry | Total, logged: Total | None, commands: list[Decided]) -> Story:
    line = line_of(found)
    entry = found if isinstance(found, Entry) else None
    outcome = found if isinstance(found, Outcome) else None
    decisions = list(() if isinstance(found, Total) else found.decisions)
    of: Outcome | Total
    total: Total | None
    if isinstance(found, Outcome):
        of, total = found, logged
    else:
        of = total = found.total if isinstance(found, Entry) else found
    return Story(
        **{name: getattr(line, name) for name in Particulars.__struct_fields__},
        pipeline=of.pipeline,
        edition=of.edition,
        partition=of.partition,
        generations=list(_generations(found, decisions)),
        decisions=_decided(decisions, commands),
        first_offset=total.first_offset if total else None,
        last_offset=total.last_offset if total else None,
        due=total.due if total else None,
        rounded=outcome.rounded if outcome and outcome.how in BILLED else None,
        finished_at=line.at,
        key=outcome.key if outcome else entry.key if entry and entry.attempts else None,
        reason=entry.reason if entry else None,
        message=entry.message if entry else line.reason if line.state is Standing.REFUSED else None,
        parked_at=entry.parked_at or None if entry and line.state is Standing.PARKED else None,
        next_look=entry.next_look or None if entry and line.state is Standing.PENDING else None,
    )


def _generations(found: Outcome | Entry | Total, decisions: list[Decision]) -> Iterator[Generation]:
    identifier = _identifier(found)
    last = 1 if isinstance(found, Total) else found.generation
    billed_as = (found.billed_as or identifier) if isinstance(found, Outcome) and found.how in BILLED else None
    for number in range(1, last + 1):
        before = [each for each in decisions if each.generation == number]
        name = identifier_of(identifier, number)
        doubts = [each for each in before if each.first_unproven is not None]
        if (
            number < last
            or (billed_as and billed_as != name)
            or (isinstance(found, Outcome) and found.how == "discarded")
        ):
            known = (doubts or before)[-1:]
            yield Generation(
                name,
                "yes" if name == billed_as else "maybe" if doubts else "no",
                known[0].attempts if known else 0,
                known[0].stripe_customer if known else None,
                known[0].first_unproven if known else None,
            )
        elif isinstance(found, Total):
            yield Generation(name, "no")
        elif isinstance(found, Outcome):
            maybe = found.how == "refused" and found.first_unproven is not None
            there: Literal["yes", "maybe", "no"] = "yes" if found.how in BILLED else "maybe" if maybe else "no"
            yield Generation(name, there, found.attempts, found.stripe_customer)
        else:
            maybe = found.first_unproven is not None
            yield Generation(name, "maybe" if maybe else "no", found.attempts, found.customer, found.first_unproven)


def _decided(decisions: list[Decision], commands: list[Decided]) -> list[Decided]:
    """What was carried out, and the commands in the log that were not, in the order in which they were given."""
    done = [
        Decided(each.action, each.by, each.reason, each.at, "yes", str(each.parked), each.message) for each in decisions
    ]
    known = {(each.action, each.by, each.at) for each in done}
    others = [each for each in commands if (each.action, each.by[:LONGEST], each.at) not in known]
    return sorted(done + others, key=lambda each: each.at)
