"""The dashboards: ``python -m tests.alerts.dashboards`` writes ``helm/dashboards``."""

from __future__ import annotations

from typing import Final

from tests.alerts.grafana import Dashboard, Levels, Names, Panel, Row, text
from tests.alerts.rules import ROOT

FOLDER: Final = ROOT / "helm" / "dashboards"

_GREEN, _ORANGE, _RED = "green", "orange", "red"

_YES: Final = ((None, _RED), (1.0, _GREEN))
_NONE: Final = ((None, _GREEN), (1.0, _RED))
"""Not one may be there."""
_EXACTLY_NONE: Final = ((None, _GREEN), (1e-12, _RED))
"""Of a value: nor the smallest part of one."""
_SOON: Final = ((None, _GREEN), (600, _ORANGE), (3600, _RED))
"""Seconds."""

_YES_NO: Final = ((1.0, 1.0, "yes"), (0.0, 0.0, "NO"))
_ALL_WELL: Final = ((0.0, 0.0, "none"),)
_NEVER: Final = ((0.0, 0.0, "now"), (30 * 86_400.0, None, "not at this pace"))


def _stat(
    title: str,
    about: str,
    queries: dict[str, str],
    *,
    levels: Levels,
    names: Names = (),
    unit: str = "short",
    width: int = 6,
) -> Panel:
    """What there is now, in large letters on a ground that says how bad it is."""
    return Panel(title, about, queries, kind="stat", width=width, unit=unit, levels=levels, names=names)


def _by(label: str, what: str) -> dict[str, str]:
    """What is exposed, added up for each value of a label."""
    return {f"{{{{{label}}}}}": f"sum by ({label}) ({what})"}


def _in_an_hour(label: str, counter: str) -> dict[str, str]:
    """How much a counter has grown. Where it was not there an hour ago, it began with 0, which nobody has seen."""
    grown = f"({counter}{{FILTER}} unless {counter}{{FILTER}} offset 1h) or increase({counter}{{FILTER}}[1h])"
    return {f"{{{{{label}}}}}": f"sum by ({label}) ({grown}) or on () vector(0)"}


OPERATOR: Final = Dashboard(
    uid="tallyman-operator",
    title="Tallyman / Operator",
    about="Is it healthy, is money moving, and when will it have caught up?",
    since="now-6h",
    parts=(
        Row("Is it healthy?"),
        _stat(
            "Do Kafka and Stripe answer?",
            "Of all processes: NO as soon as one of them hears nothing. An outage costs time, and nothing else.",
            {"Kafka": "min(tallyman_kafka_up{FILTER})", "Stripe": "min(tallyman_stripe_up{FILTER})"},
            levels=_YES,
            names=_YES_NO,
        ),
        _stat(
            "Which alerts fire?",
            "By name; docs/runbook.md says what to do.",
            {
                "{{alertname}}": 'count by (alertname) (ALERTS{alertname=~"Tallyman.+", alertstate="firing", FILTER})'
                " or on () vector(0)"
            },
            levels=_NONE,
            names=_ALL_WELL,
        ),
        _stat(
            "Is anything stopped until somebody acts?",
            "Delivery as a whole, single event names that Stripe has no meter for, clocks that do not agree.",
            {
                "paused": "sum(tallyman_delivery_paused{FILTER}) or vector(0)",
                "meters": "count(count by (event_name) (tallyman_stopped_meters{FILTER})) or vector(0)",
                "clocks": "sum(tallyman_partition_waits_for_clock{FILTER})",
            },
            levels=_NONE,
            names=_ALL_WELL,
        ),
        _stat(
            "Do the books balance?",
            "Records that were read and are not accounted for; value that was read from the totals log and is nowhere. "
            "Anything but none is a fault of Tallyman.",
            {
                "records": "sum(abs(sum by (job, instance, partition) (tallyman_consumed_total{FILTER})"
                " - sum by (job, instance, partition) (tallyman_events_total{FILTER})))",
                "value": "sum(abs(tallyman_totals_missing_value{FILTER}))",
            },
            levels=_EXACTLY_NONE,
            names=_ALL_WELL,
        ),
        Panel(
            "Is every partition at work?",
            "Partitions of both logs by stage, and those that are on their way to a process.",
            {
                "{{stage}}": "sum by (stage) (tallyman_owned_partitions{FILTER})",
                "on their way": "count(tallyman_restore_remaining_records{FILTER}) or vector(0)",
            },
        ),
        Panel(
            "How long do commits take, and do they fail?",
            "The last commit of each stage, the slowest process; failed commits in five minutes.",
            {
                "{{stage}}": "max by (stage) (tallyman_commit_duration_seconds{FILTER})",
                "failed, {{stage}}": "sum by (stage) (increase(tallyman_commits_failed_total{FILTER}[5m]))",
            },
            unit="s",
        ),
        Panel(
            "Does a process end again and again?",
            "When each process started: a step is a start.",
            {"{{instance}}": "time() - process_start_time_seconds{FILTER}"},
            unit="s",
        ),
        Row("Is money moving?"),
        Panel(
            "What becomes of the records that are read?",
            "Counted, repeated, ignored, or kept as dead letters. Two scrapes have to lie within the interval.",
            _by("outcome", "rate(tallyman_events_total{FILTER}[$__rate_interval])"),
            unit="ops",
            stacked=True,
        ),
        Panel(
            "What does Stripe answer?",
            "Requests by what came of them; docs/delivery.md says what each proves.",
            _by("result", "rate(tallyman_stripe_requests_total{FILTER}[$__rate_interval])"),
            unit="reqps",
            stacked=True,
        ),
        Panel(
            "How fast does Stripe answer?",
            "From writing a request to its answer, or to giving up.",
            {
                f"{share}": f"histogram_quantile({share}, sum by (le)"
                " (rate(tallyman_stripe_request_duration_seconds_bucket{FILTER}[$__rate_interval])))"
                for share in (0.5, 0.95, 0.99)
            },
            unit="s",
        ),
        Panel(
            "For how long has the oldest undelivered total been due?",
            "The objective: 99 % of the time no more than ten minutes.",
            {"oldest": "max(tallyman_oldest_pending_total_age_seconds{FILTER})"},
            unit="s",
            levels=((None, _GREEN), (600, _ORANGE), (1800, _RED)),
        ),
        Panel(
            "What waits to be sent?",
            "In the totals log, being sent or tried again, behind others of the same customer, and parked. What is in "
            "the log is not known while a process of stage 1 is away.",
            {
                "in the log": 'sum(tallyman_totals{state="unread", FILTER}) >= 0',
                "in flight": "sum(tallyman_in_flight_totals{FILTER})",
                "aside": "sum(tallyman_aside_totals{FILTER})",
                "parked": 'sum(tallyman_totals{state="parked", FILTER})',
            },
        ),
        Panel(
            "How fast may we send, and how fast do we?",
            "What is allowed is halved when Stripe says that it is too much.",
            {
                "allowed": "sum(tallyman_stripe_rate{FILTER})",
                "sent": "sum(rate(tallyman_stripe_requests_total{FILTER}[$__rate_interval]))",
                "too fast": 'sum(rate(tallyman_stripe_requests_total{result="busy", FILTER}[$__rate_interval]))',
            },
            unit="reqps",
        ),
        Row("When will it have caught up?"),
        _stat(
            "When will all have been read?",
            "The backlog by the pace at which it shrank in the last five minutes.",
            {
                "reading": "sum(tallyman_lag_records{FILTER})"
                " / clamp_min(-sum(deriv(tallyman_lag_records{FILTER}[5m])), 0.001)"
            },
            unit="s",
            levels=_SOON,
            names=_NEVER,
        ),
        _stat(
            "When will all have been sent?",
            "Totals that wait, by the pace at which Stripe took them in the last five minutes.",
            {
                "sending": '(sum(tallyman_totals{state=~"unread|pending", FILTER}) >= 0) / clamp_min(sum('
                'rate(tallyman_stripe_requests_total{result=~"delivered|duplicate", FILTER}[5m])), 0.001)'
            },
            unit="s",
            levels=_SOON,
            names=_NEVER,
        ),
        _stat(
            "How long until an invoice is final without its usage?",
            "If a period ended right behind the oldest undelivered usage. Negative: it may be.",
            {"{{meter}}, {{state}}": "min by (meter, state) (tallyman_cutoff_seconds{FILTER})"},
            unit="s",
            levels=((None, _RED), (0, _ORANGE), (1200, _GREEN)),
            width=12,
        ),
        Panel(
            "How many records are still to be read?",
            "By partition: one alone that grows is one busy customer.",
            {"{{partition}}": "max by (partition) (tallyman_lag_records{FILTER})"},
            stacked=True,
        ),
        Panel(
            "How old is what is read?",
            "The last record read, where more are to be read; and how far the slowest log clock is behind the time.",
            {
                "lag": "max(tallyman_lag_seconds{FILTER})",
                "log clock": "max(time() - tallyman_log_clock_timestamp_seconds{FILTER})",
            },
            unit="s",
        ),
        Panel(
            "What does stage 1 keep in memory?",
            "Customers in open windows, bounded by limits.open_keys, and event ids that tell duplicates.",
            {
                "customers in windows": "sum(tallyman_open_keys{FILTER})",
                "windows": "sum(tallyman_open_buckets{FILTER})",
                "event ids": "sum(tallyman_remembered_ids{FILTER})",
            },
        ),
        Panel(
            "How much CPU does each process use?",
            "Cores. Stage 1 uses one at most: more of them need more processes.",
            {"{{instance}}": "rate(process_cpu_seconds_total{FILTER}[$__rate_interval])"},
            width=12,
        ),
        Panel(
            "How much memory does each process use?",
            "Resident.",
            {"{{instance}}": "process_resident_memory_bytes{FILTER}"},
            width=12,
            unit="bytes",
        ),
    ),
)

BILLING: Final = Dashboard(
    uid="tallyman-billing",
    title="Tallyman / Billing",
    about="Usage counted, reported, parked and corrected, by meter.",
    since="now-24h",
    parts=(
        Row("Where does the usage stand?"),
        Panel(
            "Where does each meter's usage stand, in value?",
            "Every total that was made is in exactly one column.",
            {"": "sum by (meter, state) (tallyman_totals_value{FILTER})"},
            kind="table",
            width=24,
        ),
        Panel(
            "How much usage is counted?",
            "Its value since the beginning, by meter.",
            _by("meter", "tallyman_counted_value{FILTER}"),
        ),
        Panel(
            "How much of it has Stripe been told?",
            "Value delivered since the beginning, by meter.",
            _by("meter", 'tallyman_totals_value{state="delivered", FILTER}'),
        ),
        Panel(
            "How much has it not been told yet?",
            "Value in open windows, in the totals log, pending or parked, by meter. It is not known while a process of "
            "stage 1 is away.",
            {
                "{{meter}}": "sum by (meter) (tallyman_undelivered_value{FILTER})"
                ' and sum by (meter) (tallyman_totals{state="unread", FILTER}) >= 0'
            },
        ),
        Panel(
            "How many events are counted?",
            "A second, by meter.",
            _by("meter", "rate(tallyman_counted_events_total{FILTER}[$__rate_interval])"),
            unit="ops",
        ),
        Panel(
            "How many totals are made of them?",
            "A second, by meter: each is a call to Stripe.",
            _by("meter", "rate(tallyman_closed_totals_total{FILTER}[$__rate_interval])"),
            unit="ops",
        ),
        Panel(
            "Does anything get lost?",
            "Value that was read from the totals log and is nowhere, by meter. It is 0, or Tallyman has a fault.",
            _by("meter", "tallyman_totals_missing_value{FILTER}"),
            levels=_EXACTLY_NONE,
        ),
        Row("What needs a person?"),
        Panel(
            "How much is parked, and why?",
            "Value by meter and reason; `tallyman parked list` names the totals.",
            {
                "{{meter}}, {{reason}}": 'sum by (meter, reason) (tallyman_totals_value{state="parked", FILTER}) != 0'
                " or on () vector(0)"
            },
            stacked=True,
        ),
        Panel(
            "How many totals are parked, and why?",
            "As committed, by reason.",
            {"{{reason}}": "sum by (reason) (tallyman_parked_totals{FILTER}) or on () vector(0)"},
            stacked=True,
        ),
        Panel(
            "For how long does Stripe still take what is parked?",
            "It takes usage for 35 days; the oldest by meter and reason.",
            {"{{meter}}, {{reason}}": "min by (meter, reason) (tallyman_parked_expiry_seconds{FILTER})"},
            unit="s",
            levels=((None, _RED), (2 * 86_400, _ORANGE), (7 * 86_400, _GREEN)),
        ),
        Panel(
            "Which events could not be counted?",
            "Dead letters in an hour, by reason.",
            {
                "{{reason}}": "sum by (reason) (increase(tallyman_events_total{"
                'outcome="dead_letter", FILTER}[1h])) > 0 or on () vector(0)'
            },
            stacked=True,
        ),
        Panel(
            "How many events repeat one that was counted?",
            "As a share of what is read. They are not billed.",
            {
                "duplicates": 'sum(rate(tallyman_events_total{outcome="duplicate", FILTER}[$__rate_interval]))'
                " / sum(rate(tallyman_consumed_total{FILTER}[$__rate_interval]))"
            },
            unit="percentunit",
        ),
        Panel(
            "How many records have no key?",
            "As a share of what is read: each spreads a customer over partitions.",
            {
                "unkeyed": "sum(rate(tallyman_unkeyed_total{FILTER}[$__rate_interval]))"
                " / sum(rate(tallyman_consumed_total{FILTER}[$__rate_interval]))"
            },
            unit="percentunit",
        ),
        Row("What was corrected, rounded or not billed?"),
        Panel(
            "How many events came late, and were billed as corrections?",
            "Since the beginning, by meter.",
            {"{{meter}}": "sum by (meter) (tallyman_late_events_total{FILTER}) or on () vector(0)"},
        ),
        Panel(
            "What is not billed, and why?",
            "Value since the beginning: customers mapped to null, refused after it was taken, given up, in shadow.",
            _by("state", 'tallyman_totals_value{state=~"unbilled|refused|discarded|shadowed", FILTER}'),
        ),
        Panel(
            "How much is lost to rounding?",
            "Value cut off to fit Stripe's 15 digits, by meter.",
            _by("meter", 'tallyman_totals_value{state="rounded", FILTER}'),
        ),
        Row("Does Stripe have it?"),
        Panel(
            "How much came too late for its invoice?",
            "Value delivered later than the grace after its usage; in an hour, by meter.",
            _in_an_hour("meter", "tallyman_totals_after_grace_value_total"),
        ),
        Panel(
            "How many events did Stripe reject after it had taken them?",
            "In an hour, by its code; see asynchronous errors in docs/delivery.md.",
            _in_an_hour("code", "tallyman_stripe_rejected_events_total"),
        ),
        Panel(
            "When was it last compared with Stripe's sums?",
            "Time since `tallyman reconcile` looked at the event name.",
            {"{{event_name}}": "time() - max by (event_name) (tallyman_reconcile_timestamp_seconds{FILTER})"},
            unit="s",
            levels=((None, _GREEN), (2 * 86_400, _ORANGE)),
        ),
        Panel(
            "Were Stripe's sums what was delivered?",
            "Customers' days of the last comparison: equal, too early to say, in doubt, or different.",
            _by("state", "max by (event_name, state) (tallyman_reconcile_days{FILTER})"),
            width=12,
            stacked=True,
        ),
        Panel(
            "By how much do they differ?",
            "Value that Stripe has too little or too much, by event name.",
            {
                "missing, {{event_name}}": "max by (event_name) (tallyman_reconcile_missing_value{FILTER})",
                "surplus, {{event_name}}": "max by (event_name) (tallyman_reconcile_surplus_value{FILTER})",
            },
            width=12,
            levels=_EXACTLY_NONE,
        ),
    ),
)

ALL: Final = (OPERATOR, BILLING)


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for each in ALL:
        (FOLDER / f"{each.uid}.json").write_text(text(each), encoding="utf-8")


if __name__ == "__main__":
    main()
