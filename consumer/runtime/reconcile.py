"""Totals against Stripe: what was delivered beside what Stripe counts, by customer and day, within a budget of calls.

Our side is read from the logs, before Stripe and, where they differ, once more after it: what changed in between is
open, not wrong. Differences are then narrowed down to hours, to the totals in them, and to where those came from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from consumer import totals
from consumer.config import Config, CustomerFile
from consumer.deliver import reconciling
from consumer.deliver.customers import Customers, UnmappedError
from consumer.deliver.entries import Entry, Outcome
from consumer.deliver.reconciling import DAY, HOUR, Book, Books, Judgement, Record, Span, Standing, Subject, Sum, Who
from consumer.runtime import audit, customers
from consumer.runtime.stripe_reads import BudgetSpent, NotThere, StripeReads
from consumer.storage import Archive, Log
from consumer.totals import Total, plain

BUDGET: Final = 300
"""Calls by default: Stripe grants at least 10,000 reads a month, and this may be run every day."""

MOST_DAYS: Final = reconciling.ROWS

_NOT_THERE: Final = "Stripe knows no such meter or customer: was the customer deleted, or is the key another account's?"


class ReconcileRefused(Exception):
    """It cannot be compared as it was asked for; the message says what can."""


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """One total in an hour that differs, and where it came from in the source topic."""

    identifier: str
    state: str
    value: str
    partition: int | None = None
    first_offset: int | None = None
    last_offset: int | None = None


class Hour(msgspec.Struct, frozen=True):
    """An hour that differs."""

    start: int
    """Seconds since the epoch."""
    ours: str
    stripe: str
    totals: tuple[Part, ...]
    """All totals of this customer, meter and hour."""


class Day(msgspec.Struct, frozen=True, tag_field="kind", tag="day"):
    """A customer's day that is not equal."""

    event_name: str
    customer: str
    start: int
    """Seconds since the epoch."""
    ours: str
    stripe: str
    difference: str
    state: Standing
    why: str
    hours: tuple[Hour, ...] = ()
    """Where it differs; empty where it was not asked."""


class Compared(msgspec.Struct, tag_field="kind", tag="compared"):
    """What was compared altogether."""

    since: int
    until: int
    calls: int = 0
    customers: int = 0
    """Customers and meters that were asked for."""
    not_asked: int = 0
    """Those that the budget left out."""
    equal: int = 0
    """Customers' days."""
    equal_value: str = "0"
    open: int = 0
    doubt: int = 0
    differs: int = 0


class _Found(msgspec.Struct):
    """A day that is not equal, while it is looked into."""

    subject: Subject
    start: int
    stripe: Sum
    judgement: Judgement
    ours: Book
    hours: dict[int, Sum] | None = None


def reconcile(
    config: Config,
    store: Archive,
    stripe: StripeReads,
    span: Span,
    *,
    event_names: frozenset[str] | None = None,
    customer: str | None = None,
    budget: int = BUDGET,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Day | Compared]:
    """Compare; the days that are not equal, the worst first, then what was compared altogether.

    ``stripe`` has the same budget. Raises ``ReconcileRefused``, and what reading raises.
    """
    _check(config, store, span, stripe.now())
    comparison = _Comparison(store, stripe, span, _who(config), budget)
    known = {
        subject: days
        for subject, days in comparison.ours(DAY, audit.everything(store)).items()
        if (event_names is None or subject.event_name in event_names) and customer in {None, subject.customer}
    }
    comparison.ask(known, progress)
    comparison.look_again()
    yield from comparison.days()
    yield comparison.compared


def _check(config: Config, store: Archive, span: Span, now: int) -> None:
    if span.end <= span.start:
        raise ReconcileRefused("there is no day between --since and --until")
    if span.end - span.start > MOST_DAYS * DAY:
        raise ReconcileRefused(f"that is more than {MOST_DAYS} days: ask for less with --since and --until")
    if store.shortened(Log.OUTCOMES) and span.start * 1000 < now - int(config.limits.keep):
        raise ReconcileRefused(
            f"outcomes are kept for {config.limits.keep} (limits.keep): what was delivered before is not known any "
            "more; give a later --since"
        )


def _who(config: Config) -> Who:
    known: Customers = customers.Passthrough()
    if isinstance(config.customers, CustomerFile):
        known = customers.CustomerFile(config.customers.path).customers

    def who(name: str) -> str | None:
        try:
            return known.stripe_customer(name)
        except UnmappedError:
            return None

    return who


class _Comparison:
    """One run: what was asked, and what was found."""

    def __init__(self, store: Archive, stripe: StripeReads, span: Span, who: Who, budget: int) -> None:
        self._store = store
        self._stripe = stripe
        self._span = span
        self._who = who
        self._budget = budget
        # An active meter, where there is one, comes after the inactive ones of its name.
        meters = sorted(stripe.meters(), key=lambda each: each.status == "active")
        self._meters = {meter.event_name: meter.id for meter in meters}
        self._found: list[_Found] = []
        self._hours: Books = {}
        self._parts: dict[tuple[Subject, int], list[Part]] = {}
        self.compared = Compared(span.start, span.end)

    def ours(self, size: int, records: Iterable[Record]) -> Books:
        """What was delivered, and what may be there besides."""
        return reconciling.books(records, self._span, size, self._who)

    def ask(self, known: Books, progress: Callable[[int], None]) -> None:
        """Ask Stripe of as many as the budget allows. What narrows the differences down is kept back."""
        owed = right = 0
        order = reconciling.plan(known, self._stripe.now())
        for subject in order:
            if self._budget - self._stripe.calls <= owed:
                break
            try:
                rows = self._rows(subject, self._span)
            except BudgetSpent:
                break
            self.compared.customers += 1
            progress(self.compared.customers)
            differing = []
            for each in self._judged(subject, known[subject], rows):
                if each.judgement.standing is Standing.EQUAL:
                    self.compared.equal += 1
                    right += each.ours.sure
                else:
                    self._found.append(each)
                if each.judgement.standing is Standing.DIFFERS and rows is not None and each.hours is None:
                    differing.append(each.start)
            owed += len(reconciling.narrowing(differing))
        self.compared.not_asked = len(order) - self.compared.customers
        self.compared.equal_value = plain(right)
        self.compared.calls = self._stripe.calls

    def _judged(self, subject: Subject, ours: Mapping[int, Book], rows: dict[int, Sum] | None) -> Iterator[_Found]:
        hours = rows if self._span.window == "hour" else None
        said = (rows or {}) if hours is None else reconciling.by_day(hours)
        for start in sorted(ours.keys() | said.keys()):
            book, sum_ = ours.get(start, Book()), said.get(start, Sum())
            judgement = reconciling.judge(book, sum_, end=start + DAY, now=self._stripe.now())
            if rows is None and judgement.standing is Standing.DIFFERS:
                judgement = Judgement(Standing.DIFFERS, _NOT_THERE)
            yield _Found(subject, start, sum_, judgement, book, hours)

    def _rows(self, subject: Subject, span: Span) -> dict[int, Sum] | None:
        """Stripe's sums; None where it knows no such meter or customer."""
        meter = self._meters.get(subject.event_name)
        if meter is None:
            return None
        try:
            rows = self._stripe.summaries(meter, subject.customer, span.start, span.end, window=span.window)
        except NotThere:
            return None
        return {each.start: Sum(each.value, each.uncertainty) for each in rows}

    def look_again(self) -> None:
        """Whether what differs still does, in which hours, and what totals these hours have."""
        if not (wrong := self._wrong()):
            return
        wanted = {(each.subject, each.start) for each in wrong}
        records = [each for each in audit.everything(self._store) if not wanted.isdisjoint(self._of(each, DAY))]
        days, self._hours = self.ours(DAY, records), self.ours(HOUR, records)
        for each in wrong:
            if days.get(each.subject, {}).get(each.start, Book()) != each.ours:
                each.judgement = Judgement(Standing.OPEN, "it changed while it was compared")
        if wrong := self._wrong():
            self._narrow(wrong)
            self._parts = self._by_hour(records)
        self.compared.calls = self._stripe.calls

    def _wrong(self) -> list[_Found]:
        return [each for each in self._found if each.judgement.standing is Standing.DIFFERS]

    def _narrow(self, wrong: Iterable[_Found]) -> None:
        """Ask for the hours of what differs, as far as the budget goes."""
        by_subject: dict[Subject, list[_Found]] = {}
        for each in wrong:
            if each.hours is None:
                by_subject.setdefault(each.subject, []).append(each)
        for subject, several in by_subject.items():
            for call in reconciling.narrowing(each.start for each in several):
                try:
                    rows = self._rows(subject, call)
                except BudgetSpent:
                    return
                for each in several:
                    if each.start in call:
                        each.hours = rows

    def _of(self, record: Record, size: int) -> set[tuple[Subject, int]]:
        """The hours or days that a total may have a part in."""
        sure, maybe = reconciling.pieces(record, self._who)
        places = {*maybe, *([sure[0]] if sure else [])}
        return {(Subject(at.event_name, at.customer), at.minute // size * size) for at in places}

    def _by_hour(self, records: Sequence[Record]) -> dict[tuple[Subject, int], list[Part]]:
        found: dict[tuple[Subject, int], list[Part]] = {}
        places = _places(self._store, {_total_of(each).identifier for each in records})
        for record in records:
            total = _total_of(record)
            place = places.get(total.identifier)
            part = Part(
                total.identifier,
                audit.line_of(record).state,
                total.value,
                *((place.partition, place.first_offset, place.last_offset) if place else ()),
            )
            for key in self._of(record, HOUR):
                found.setdefault(key, []).append(part)
        return found

    def days(self) -> Iterator[Day]:
        """What is not equal, the worst first."""
        order = [Standing.DIFFERS, Standing.DOUBT, Standing.OPEN]
        for each in sorted(
            self._found, key=lambda each: (order.index(each.judgement.standing), *each.subject, each.start)
        ):
            standing = each.judgement.standing
            self.compared.differs += standing is Standing.DIFFERS
            self.compared.doubt += standing is Standing.DOUBT
            self.compared.open += standing is Standing.OPEN
            yield Day(
                event_name=each.subject.event_name,
                customer=each.subject.customer,
                start=each.start,
                ours=plain(each.ours.sure),
                stripe=plain(each.stripe.value),
                difference=plain(each.stripe.value - each.ours.sure),
                state=standing,
                why=each.judgement.why,
                hours=tuple(self._hours_of(each)) if standing is Standing.DIFFERS else (),
            )

    def _hours_of(self, found: _Found) -> Iterator[Hour]:
        ours = self._hours.get(found.subject, {})
        for start in range(found.start, found.start + DAY, HOUR):
            book, said = ours.get(start, Book()), (found.hours or {}).get(start, Sum())
            if found.hours is not None and abs(said.value - book.sure) > said.uncertainty:
                parts = tuple(self._parts.get((found.subject, start), ()))
                yield Hour(start, plain(book.sure), plain(said.value), parts)


def _total_of(record: Record) -> Outcome | Total:
    return record.total if isinstance(record, Entry) else record


def _places(store: Archive, identifiers: set[str]) -> dict[str, Total]:
    found: dict[str, Total] = {}
    for each in store.logged(Log.TOTALS):
        record = totals.decode(each.value)
        if isinstance(record, Total) and record.identifier in identifiers:
            found[record.identifier] = record
    return found
