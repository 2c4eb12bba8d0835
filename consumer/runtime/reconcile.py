"""Totals against Stripe: what was delivered beside what Stripe counts, by customer and day, within a budget of calls.

In shadow it is what would have been delivered, and what Stripe counts is somebody else's.

Our side is read from the logs, before Stripe and, where they differ, once more after it: what changed in between is
open, not wrong. Differences are then narrowed down to hours, to the totals in them, and to where those came from.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec

from consumer import totals
from consumer.config import Config, CustomerFile
from consumer.deliver import reconciling
from consumer.deliver.customers import Customers, UnmappedError
from consumer.deliver.entries import Entry, Outcome
from consumer.deliver.reconciling import DAY, HOUR, Book, Books, Judgement, Record, Span, Standing, Subject, Sum, Who
from consumer.deliver.reports import unanswered
from consumer.runtime import audit, customers
from consumer.runtime.stripe_reads import BudgetSpent, NotThere, StripeReads
from consumer.storage import Append, Archive, Log, Stage
from consumer.totals import Comparison, Report, Total, plain

BUDGET: Final = 300
"""Calls by default: Stripe grants at least 10,000 reads a month, and this may be run every day."""

MOST_DAYS: Final = reconciling.ROWS

CLOCKS_MS: Final = 86_400_000
"""Usage is dated by others' clocks, and the logs by the store's: more than these ever differ."""

_KEY: Final = b"comparison"
"""Of the records of comparisons: one partition has them all."""

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


class Reported(msgspec.Struct, frozen=True):
    """Stripe has reported errors of a meter, and nobody has compared it since."""

    event_name: str | None
    """None where Stripe found no meter."""
    since: int
    until: int
    """The days of the usage that it may be about, in seconds since the epoch."""
    errors: dict[str, int]
    """How many events were rejected, by code."""


class Compared(msgspec.Struct, tag_field="kind", tag="compared"):
    """What was compared altogether."""

    since: int
    until: int
    mode: Literal["send", "shadow"]
    """With what Stripe's sums were compared: what was delivered; in shadow what was shadowed, too."""
    at: int
    """When it was begun, in milliseconds since the epoch."""
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
    shadowed: str = "0"
    """What was shadowed in these days and is not compared, because it is somebody else's to bill."""
    reported: tuple[Reported, ...] = ()
    meters: dict[str, totals.Compared] = {}
    """By Stripe event name."""


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
    names = frozenset(meter.stripe.event_name for meter in config.meters) if event_names is None else event_names
    shadow = config.stripe.mode == "shadow"
    comparison = _Comparison(store, stripe, span, _who(config), budget, shadow=shadow)
    known = comparison.ours(DAY, comparison.records())
    if shadow:
        for subject in _mapped(config, names):
            # Also of whom nothing was counted: today's billing may bill them.
            known.setdefault(subject, {})
    known = {
        subject: days
        for subject, days in known.items()
        if (event_names is None or subject.event_name in event_names) and customer in {None, subject.customer}
    }
    reports = [each for each in _reports(store) if each.event_name is None or each.event_name in names]
    comparison.ask(known, reports, progress)
    comparison.look_again()
    yield from comparison.days()
    comparison.sum_up(known, names)
    yield comparison.compared


def note(store: Archive, compared: Compared) -> None:
    """Let the service know what was found: it shows it in its metrics."""
    record = Comparison(compared.at, compared.meters)
    store.append([Append(Log.TOTALS, _KEY, totals.encode(record))])


def _reports(store: Archive) -> list[Report]:
    entries = (store.restore(Stage.DELIVER, partition) for partition in store.ends(Log.TOTALS))
    return unanswered(entry for restored in entries if restored for entry in restored.entries)


def _mapped(config: Config, names: Iterable[str]) -> Iterator[Subject]:
    """Everybody who is known to be billed."""
    if isinstance(config.customers, CustomerFile):
        known = customers.CustomerFile(config.customers.path).customers.at_stripe
        yield from (Subject(name, customer) for name in names for customer in known)


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

    def __init__(self, store: Archive, stripe: StripeReads, span: Span, who: Who, budget: int, *, shadow: bool) -> None:
        self._store = store
        self._shadow = shadow
        self._stripe = stripe
        self._span = span
        self._who = who
        self._budget = budget
        self._asked: set[Subject] = set()
        self._equal: Counter[str] = Counter()
        self._meters = {event_name: meter.id for event_name, meter in stripe.meters().items()}
        self._found: list[_Found] = []
        self._hours: Books = {}
        self._parts: dict[tuple[Subject, int], list[Part]] = {}
        self.compared = Compared(span.start, span.end, "shadow" if shadow else "send", stripe.now())

    def records(self) -> Iterator[Record]:
        """All totals that may have usage of these days: each was finished after it was used, or is not yet."""
        begin = self._store.since(Log.OUTCOMES, self._span.start * 1000 - CLOCKS_MS)
        return audit.everything(self._store, since=begin)

    def ours(self, size: int, records: Iterable[Record]) -> Books:
        """What was delivered, and what may be there besides."""
        return reconciling.books(records, self._span, size, self._who, shadow=self._shadow)

    def ask(self, known: Books, reports: Sequence[Report], progress: Callable[[int], None]) -> None:
        """Ask Stripe of as many as the budget allows. What narrows the differences down is kept back."""
        owed = right = 0
        self.compared.reported = tuple(_by_meter(reports))
        order = reconciling.plan(known, self._stripe.now(), reports)
        for subject in order:
            if self._budget - self._stripe.calls <= owed:
                break
            try:
                rows = self._rows(subject, self._span)
            except BudgetSpent:
                break
            self._asked.add(subject)
            self.compared.customers += 1
            progress(self.compared.customers)
            differing = []
            for each in self._judged(subject, known[subject], rows):
                if each.judgement.standing is Standing.EQUAL:
                    self.compared.equal += 1
                    self._equal[subject.event_name] += 1
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
            judgement = reconciling.judge(book, sum_, end=start + DAY, now=self._stripe.now(), shadow=self._shadow)
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
        records = [each for each in self.records() if not wanted.isdisjoint(self._of(each, DAY))]
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
        places = reconciling.pieces(record, self._who).places
        return {(Subject(at.event_name, at.customer), at.minute // size * size) for at in places}

    def _by_hour(self, records: Sequence[Record]) -> dict[tuple[Subject, int], list[Part]]:
        found: dict[tuple[Subject, int], list[Part]] = {}
        begin = self._store.since(Log.TOTALS, self._span.start * 1000 - CLOCKS_MS)
        places = _places(self._store, begin, {_total_of(each).identifier for each in records})
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

    def sum_up(self, known: Books, names: Iterable[str]) -> None:
        """What was found of each meter."""
        left = Counter(subject.event_name for subject in known if subject not in self._asked)
        by_meter: dict[str, list[_Found]] = {}
        for each in self._found:
            by_meter.setdefault(each.subject.event_name, []).append(each)
        for name in sorted({*names, *(subject.event_name for subject in known)}):
            found = by_meter.get(name, [])
            standings = Counter(each.judgement.standing for each in found)
            wrong = [each for each in found if each.judgement.standing is Standing.DIFFERS]
            by = [each.stripe.value - each.ours.sure for each in wrong]
            self.compared.meters[name] = totals.Compared(
                self.compared.at,
                *self._span,
                equal=self._equal[name],
                open=standings[Standing.OPEN],
                doubt=standings[Standing.DOUBT],
                differs=standings[Standing.DIFFERS],
                not_asked=left[name],
                missing=plain(-sum(each for each in by if each < 0)),
                surplus=plain(sum(each for each in by if each > 0)),
            )
        self.compared.shadowed = plain(sum(book.shadowed for days in known.values() for book in days.values()))


def _by_meter(reports: Iterable[Report]) -> Iterator[Reported]:
    grouped: dict[str | None, list[Report]] = {}
    for each in reports:
        grouped.setdefault(each.event_name, []).append(each)
    for event_name, several in grouped.items():
        days = [reconciling.about(each) for each in several]
        errors: Counter[str] = Counter()
        for each in several:
            errors.update(each.errors)
        yield Reported(event_name, min(day.start for day in days), max(day.end for day in days), dict(errors))


def _total_of(record: Record) -> Outcome | Total:
    return record.total if isinstance(record, Entry) else record


def _places(store: Archive, begin: Mapping[int, int], identifiers: set[str]) -> dict[str, Total]:
    found: dict[str, Total] = {}
    for each in store.logged(Log.TOTALS, begin):
        record = totals.decode(each.value)
        if isinstance(record, Total) and record.identifier in identifiers:
            found[record.identifier] = record
    return found
