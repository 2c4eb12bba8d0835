"""What Prometheus sees. What counts events and totals is read from committed books, so that no crash falsifies it."""

import platform
from collections import Counter as Sums
from collections.abc import Iterator
from typing import Final

import confluent_kafka
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from consumer import __version__
from consumer.deadletters import REASONS
from consumer.deliver.answers import Heard, Verdict, judge
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.ledger import Book, Column
from consumer.deliver.pacing import Shut
from consumer.runtime.clocks import Clock
from consumer.runtime.intake import Intake
from consumer.runtime.reporter import TAKES_S, Pending, Reporter
from consumer.runtime.reports import Reported
from consumer.runtime.source import Silence
from consumer.runtime.webhooks import Result
from consumer.storage import FAILURES, Stage
from consumer.tokens import Tokens
from consumer.totals import SCALE

_SECONDS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
"""Stripe usually answers within a third of a second."""

_BILLED: Final = frozenset({Verdict.DELIVERED, Verdict.DUPLICATE})

_MODES: Final = ("send", "hold", "shadow")


disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each counter that nobody asks for


class Requests:
    """Counts what is asked of Stripe."""

    def __init__(self, registry: CollectorRegistry, *, grace: int, clock: Clock) -> None:
        """``grace``: for how many milliseconds after its period an invoice still takes usage."""
        self._grace = grace
        self._clock = clock
        self._answers = Counter(
            "tallyman_stripe_requests", "Requests to Stripe, by what came of them.", ["result"], registry=registry
        )
        self._took = Histogram(
            "tallyman_stripe_request_duration_seconds",
            "Time from writing a request to its answer, or to giving up waiting for one.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._late = Counter(
            "tallyman_totals_after_grace",
            "Totals delivered when an invoice they may have belonged on was final: it does not have them.",
            ["meter"],
            registry=registry,
        )
        self._late_value = Counter(
            "tallyman_totals_after_grace_value", "The value of those totals.", ["meter"], registry=registry
        )
        for verdict in Verdict:
            self._answers.labels(verdict.value)

    def observe(self, attempt: Attempt, heard: Heard, seconds: float) -> None:
        """One request is over."""
        verdict = judge(heard)
        self._answers.labels(verdict.value).inc()
        self._took.observe(seconds)
        if verdict in _BILLED and self._clock.now() > attempt.timestamp * 1000 + self._grace:
            self._late.labels(attempt.meter).inc()
            self._late_value.labels(attempt.meter).inc(max(0.0, float(attempt.value)))


class Reports:
    """Counts what Stripe reports of events that it rejected after it took them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._notified = Counter(
            "tallyman_stripe_reports",
            "Notifications of Stripe's, by what became of them: taken, repeated, ignored, refused_signature, postponed "
            "(Stripe repeats it) or failed (nobody can handle it).",
            ["result"],
            registry=registry,
        )
        self._events = Counter(
            "tallyman_stripe_rejected_events",
            "Meter Events that Stripe took and rejected later, as its reports count them, by its code.",
            ["code"],
            registry=registry,
        )
        self._totals = Counter(
            "tallyman_stripe_rejected_totals",
            "Totals of ours that these reports name; they name samples.",
            registry=registry,
        )
        for result in Result:
            self._notified.labels(result.value)

    def notified(self, result: Result) -> None:
        """A notification has been answered."""
        self._notified.labels(result.value).inc()

    def rejected(self, reported: Reported, named: int) -> None:
        """A report was taken, which names so many totals of ours."""
        for code, count in reported.errors.items():
            self._events.labels(code).inc(count)
        self._totals.inc(named)


class State(Collector):
    """The stages that this process runs, as they are when Prometheus asks."""

    def __init__(
        self,
        intake: Intake | None,
        reporter: Reporter | None,
        clock: Clock,
        silence: Silence,
        *,
        grace: int,
        mode: str,
        tokens: Tokens | None = None,
    ) -> None:
        """``grace``: as in ``Requests``. ``mode``: what is done with totals, as configured. ``tokens``: for Kafka."""
        self._grace = grace
        self._mode = mode
        self._intake = intake
        self._reporter = reporter
        self._clock = clock
        self._silence = silence
        self._tokens = tokens

    def collect(self) -> Iterator[Metric]:
        """All families. Read from other threads than those that write: nothing here waits or locks."""
        yield from self._build()
        yield GaugeMetricFamily(
            "tallyman_kafka_up", "1 while Kafka answers, 0 during an outage.", self._silence.since is None
        )
        if self._tokens is not None:
            yield GaugeMetricFamily(
                "tallyman_kafka_token_up",
                "1 while tokens for Kafka can be made, 0 while they cannot; with kafka.token only.",
                self._tokens.failure is None,
            )
        if self._intake is not None:
            yield from self._events(self._intake)
            yield from self._partitions(self._intake)
            yield from self._meters(self._intake)
        yield from self._totals()
        if self._reporter is not None:
            yield from self._sending(self._reporter)
            yield from self._compared()
        yield from self._commits()
        yield from self._restores()

    def _build(self) -> Iterator[Metric]:
        versions = {
            "version": __version__,
            "python": platform.python_version(),
            "librdkafka": confluent_kafka.libversion()[0],
        }
        yield InfoMetricFamily("tallyman_build", "What is running.", versions)

    def _events(self, intake: Intake) -> Iterator[Metric]:
        events = CounterMetricFamily(
            "tallyman_events",
            "Records consumed, by what became of them; a reason is given for dead letters and for what is ignored.",
            labels=["partition", "outcome", "reason"],
        )
        consumed = CounterMetricFamily("tallyman_consumed", "Records consumed.", labels=["partition"])
        unkeyed = CounterMetricFamily(
            "tallyman_unkeyed",
            "Records without a key: a customer's events on many partitions cost as many calls to Stripe.",
            labels=["partition"],
        )
        for number, committed in list(intake.committed.items()):
            partition, book = str(number), committed.book
            consumed.add_metric([partition], book.consumed)
            unkeyed.add_metric([partition], book.unkeyed)
            events.add_metric([partition, "counted", ""], book.counted)
            events.add_metric([partition, "duplicate", ""], book.duplicate)
            # All reasons, so that the first event of one is an increase.
            for reason, count in (dict.fromkeys(REASONS, 0) | book.dead).items():
                events.add_metric([partition, "dead_letter", reason], count)
            for reason, count in book.ignored.items():
                events.add_metric([partition, "ignored", reason], count)
        yield from (events, consumed, unkeyed)

    def _partitions(self, intake: Intake) -> Iterator[Metric]:
        now = self._clock.now()
        labels = ["partition"]
        lag = GaugeMetricFamily("tallyman_lag_records", "Records not read yet.", labels=labels)
        behind = GaugeMetricFamily(
            "tallyman_lag_seconds", "Age of the last record read, where more are to be read; else 0.", labels=labels
        )
        clock = GaugeMetricFamily(
            "tallyman_log_clock_timestamp_seconds", "How far the log has been read, as a time.", labels=labels
        )
        waits = GaugeMetricFamily(
            "tallyman_partition_waits_for_clock",
            "1 where records are dated ahead of this host's clock, and are not read until the clocks agree.",
            labels=labels,
        )
        buckets = GaugeMetricFamily("tallyman_open_buckets", "Windows that are still counted.", labels=labels)
        keys = GaugeMetricFamily("tallyman_open_keys", "Customers in those windows.", labels=labels)
        ids = GaugeMetricFamily("tallyman_remembered_ids", "Event ids that tell duplicates.", labels=labels)
        for number, partition in list(intake.partitions.items()):
            name = [str(number)]
            aggregator = partition.aggregator
            missing = max(0, (partition.end or 0) - partition.read_to) + len(partition.held)
            lag.add_metric(name, missing)
            read = aggregator.book.arrival if missing else 0
            behind.add_metric(name, max(0, now - read) / 1000 if read else 0)
            clock.add_metric(name, aggregator.book.clock / 1000)
            waits.add_metric(name, bool(partition.held))
            buckets.add_metric(name, aggregator.open_buckets)
            keys.add_metric(name, aggregator.open_keys)
            ids.add_metric(name, aggregator.remembered)
        yield from (lag, behind, clock, waits, buckets, keys, ids)

    def _meters(self, intake: Intake) -> Iterator[Metric]:
        labels = ["partition", "meter"]
        counted = CounterMetricFamily("tallyman_counted_events", "Events counted.", labels=labels)
        value = GaugeMetricFamily("tallyman_counted_value", "Their value.", labels=labels)
        closed = CounterMetricFamily("tallyman_closed_events", "Events in totals.", labels=labels)
        closed_value = GaugeMetricFamily("tallyman_closed_value", "Their value.", labels=labels)
        totals = CounterMetricFamily("tallyman_closed_totals", "Totals made.", labels=labels)
        rounded = CounterMetricFamily(
            "tallyman_rounded_events", "Events whose value had more decimals than the meter keeps.", labels=labels
        )
        late = CounterMetricFamily(
            "tallyman_late_events", "Events that arrived after their window, by revision.", labels=[*labels, "revision"]
        )
        for number, committed in list(intake.committed.items()):
            for meter, book in committed.meters.items():
                name = [str(number), meter]
                counted.add_metric(name, book.events)
                value.add_metric(name, book.value / SCALE)
                closed.add_metric(name, book.total_events)
                closed_value.add_metric(name, book.total_value / SCALE)
                totals.add_metric(name, book.totals)
                rounded.add_metric(name, book.rounded)
                for revision, count in book.late.items():
                    late.add_metric([*name, str(revision)], count)
        yield from (counted, value, closed, closed_value, totals, rounded, late)

    def _totals(self) -> Iterator[Metric]:
        labels = ["meter", "state", "reason"]
        count = GaugeMetricFamily(
            "tallyman_totals",
            "Totals, by where they stand. What is unread is the sum over all processes: one may have read what another "
            "has made.",
            labels=labels,
        )
        value = GaugeMetricFamily("tallyman_totals_value", "Their value.", labels=labels)
        missing = GaugeMetricFamily(
            "tallyman_totals_missing_value",
            "Value that was read from the totals log and is nowhere. Anything but 0 is a fault.",
            labels=["meter"],
        )
        undelivered = GaugeMetricFamily(
            "tallyman_undelivered_value",
            "Value counted and not delivered: in open windows, unread, pending or parked. The sum over all processes "
            "tells: one may have read what another has made.",
            labels=["meter"],
        )
        unread: Sums[str] = Sums()
        unread_value: Sums[str] = Sums()
        waiting: Sums[str] = Sums()
        sums: Sums[tuple[str, str, str]] = Sums()
        values: Sums[tuple[str, str, str]] = Sums()
        lost: Sums[str] = Sums()
        for committed in list(self._intake.committed.values()) if self._intake else ():
            for meter, each in committed.meters.items():
                unread[meter] += each.totals
                unread_value[meter] += each.total_value
                waiting[meter] += each.value
        for meter, book in ((m, b) for each in self._deliveries for m, b in list(each.ledger.books.items())):
            unread[meter] -= book.read.totals
            unread_value[meter] -= book.read.value
            waiting[meter] += book.pending.value + sum(each.value for each in book.parked.values()) - book.read.value
            lost[meter] += book.missing
            for (state, reason), column in _columns(book).items():
                sums[meter, state, reason] += column.totals
                values[meter, state, reason] += column.value
        for meter in unread:
            sums[meter, "unread", ""], values[meter, "unread", ""] = unread[meter], unread_value[meter]
            undelivered.add_metric([meter], waiting[meter] / SCALE)
        for of, totals in sums.items():
            count.add_metric(of, totals)
            value.add_metric(of, values[of] / SCALE)
        for meter, amount in lost.items():
            missing.add_metric([meter], amount / SCALE)
        yield from (count, value, missing, undelivered)

    def _sending(self, reporter: Reporter) -> Iterator[Metric]:
        now, deliveries, outlet = self._clock.now(), reporter.deliveries, reporter.outlet
        modes = GaugeMetricFamily(
            "tallyman_stripe_mode",
            "1 for what is done with totals: send, hold (nothing, for now) or shadow (everything but the requests).",
            labels=["mode"],
        )
        for mode in _MODES:
            modes.add_metric([mode], mode == self._mode)
        yield modes
        yield GaugeMetricFamily(
            "tallyman_stripe_up", "1 while Stripe answers, 0 during an outage.", outlet.gate.shut is not Shut.DOWN
        )
        oldest = GaugeMetricFamily(
            "tallyman_oldest_pending_total_age_seconds",
            "For how long the oldest total that is neither finished nor parked has been due; 0 where there is none.",
        )
        pending = reporter.pending()
        oldest.add_metric([], 0 if pending.due is None else max(0, now - pending.due) / 1000)
        yield oldest
        yield from self._cut_off(reporter, pending, now)
        yield GaugeMetricFamily("tallyman_stripe_rate", "Requests a second that are allowed now.", outlet.pacing.rate)
        yield GaugeMetricFamily(
            "tallyman_in_flight_totals",
            "Totals being sent or tried again.",
            sum(each.in_flight for each in deliveries),
        )
        yield GaugeMetricFamily(
            "tallyman_aside_totals",
            "Totals set aside behind their customer's others.",
            sum(each.aside for each in deliveries),
        )
        paused = GaugeMetricFamily(
            "tallyman_delivery_paused",
            "1 for the reason why sending has stopped until somebody acts.",
            labels=["reason"],
        )
        if why := reporter.paused:
            paused.add_metric([why], 1)
        yield paused
        alarms = GaugeMetricFamily("tallyman_parked_totals", "Totals parked, as committed.", labels=["reason"])
        for reason in {reason for each in deliveries for reason in each.alarms}:
            alarms.add_metric([reason.value], sum(each.alarms.get(reason, 0) for each in deliveries))
        yield alarms

    def _cut_off(self, reporter: Reporter, pending: Pending, now: int) -> Iterator[Metric]:
        left = GaugeMetricFamily(
            "tallyman_cutoff_seconds",
            "Seconds until the first invoice is final that the oldest undelivered usage may belong on, negative after "
            "it: the period may end right behind it, and stripe.finalization_grace follows.",
            labels=["meter", "state"],
        )
        expiry = GaugeMetricFamily(
            "tallyman_parked_expiry_seconds",
            "Seconds until Stripe does not take the oldest parked usage any more: it takes 35 days.",
            labels=["meter", "reason"],
        )
        parked: dict[str, int] = {}
        for (meter, reason), at in reporter.oldest_parked().items():
            parked[meter] = min(at, parked.get(meter, at))
            expiry.add_metric([meter, reason], at + TAKES_S - now / 1000)
        for state, oldest in (("pending", pending.oldest), ("parked", parked)):
            for meter, at in oldest.items():
                left.add_metric([meter, state], at + (self._grace - now) / 1000)
        yield from (left, expiry)
        stopped = GaugeMetricFamily(
            "tallyman_stopped_meters",
            "1 for an event name whose meter Stripe refuses; one total a minute asks whether that is cured.",
            labels=["event_name"],
        )
        for event_name in reporter.stopped:
            stopped.add_metric([event_name], 1)
        yield stopped
        if (refused := reporter.customers_refused) is not None:
            yield GaugeMetricFamily(
                "tallyman_customers_file_refused",
                "1 while the customers' file is of no use as it is now, and the one before it is used.",
                refused,
            )

    def _compared(self) -> Iterator[Metric]:
        names = ["event_name"]
        at = GaugeMetricFamily(
            "tallyman_reconcile_timestamp_seconds",
            "When `tallyman reconcile` last compared this meter; absent until it has.",
            labels=names,
        )
        days = GaugeMetricFamily(
            "tallyman_reconcile_days",
            "Customers' days that it compared with Stripe's sums: equal, open (too early to say), doubt or differs.",
            labels=[*names, "state"],
        )
        missing = GaugeMetricFamily(
            "tallyman_reconcile_missing_value",
            "By how much less Stripe has, summed over the days on which it has too little.",
            labels=names,
        )
        surplus = GaugeMetricFamily(
            "tallyman_reconcile_surplus_value",
            "By how much more Stripe has, summed over the days on which it has too much.",
            labels=names,
        )
        for comparison in (each.reports.comparison for each in self._deliveries):
            for name, each in comparison.meters.items() if comparison else ():
                at.add_metric([name], each.at / 1000)
                missing.add_metric([name], float(each.missing))
                surplus.add_metric([name], float(each.surplus))
                for state in ("equal", "open", "doubt", "differs"):
                    days.add_metric([name, state], getattr(each, state))
        yield from (at, days, missing, surplus)

    def _commits(self) -> Iterator[Metric]:
        took = GaugeMetricFamily("tallyman_commit_duration_seconds", "How long the last commit took.", labels=["stage"])
        at = GaugeMetricFamily("tallyman_commit_timestamp_seconds", "When the last commit was made.", labels=["stage"])
        failed = CounterMetricFamily(
            "tallyman_commits_failed",
            "Commits that came to nothing, or of which nobody knew what came; their partitions were restored.",
            labels=["stage", "reason"],
        )
        for stage, each in self._running():
            if each.commits.last is not None:
                at.add_metric([stage], each.commits.last[0] / 1000)
                took.add_metric([stage], each.commits.last[1])
            for how in FAILURES:
                failed.add_metric([stage, how], each.commits.failures[how])
        yield from (took, at, failed)

    def _restores(self) -> Iterator[Metric]:
        owned = GaugeMetricFamily("tallyman_owned_partitions", "Partitions at work in this process.", labels=["stage"])
        left = GaugeMetricFamily(
            "tallyman_restore_remaining_records",
            "Records of the state that are still to be read before the partition is taken over.",
            labels=["stage", "partition"],
        )
        for stage, each in self._running():
            owned.add_metric([stage], len(each.partitions))
            for number, (read, end) in each.restoring.progress.items():
                left.add_metric([stage, str(number)], end - read)
        yield from (owned, left)

    @property
    def _deliveries(self) -> list[Delivery]:
        return self._reporter.deliveries if self._reporter else []

    def _running(self) -> list[tuple[Stage, Intake | Reporter]]:
        stages = ((Stage.AGGREGATE, self._intake), (Stage.DELIVER, self._reporter))
        return [(stage, each) for stage, each in stages if each is not None]


def _columns(book: Book) -> dict[tuple[str, str], Column]:
    """By state and reason."""
    states = ("delivered", "unbilled", "zero", "refused", "discarded", "shadowed", "rounded", "pending")
    columns: dict[tuple[str, str], Column] = {(state, ""): getattr(book, state) for state in states}
    return columns | {("parked", reason.value): column for reason, column in book.parked.items()}
