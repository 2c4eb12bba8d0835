"""The command `tallyman`: what people type, and how answers and failures look; the work is done elsewhere."""

import time
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import structlog
import typer
from confluent_kafka import KafkaException
from typer.core import TyperGroup

from consumer import __version__
from consumer.aggregate.aggregator import UnbalancedError, UnknownEntryError
from consumer.cli import account, letters, parked, show, show_totals
from consumer.cli.options import (
    CLOCK,
    DEFAULT,
    ConfigFile,
    Json,
    Limit,
    OfCustomer,
    OfMeter,
    Refused,
    Since,
    Until,
    Yes,
    check_limit,
    exact_moment,
    opened_store,
    read_config,
    source_of,
)
from consumer.config import ConfigError
from consumer.deliver.entries import EntryError
from consumer.runtime import audit, logs, preconditions, service
from consumer.runtime import check as checking
from consumer.runtime import explain as explaining
from consumer.runtime import reset as resetting
from consumer.runtime.customers import CustomerFileError
from consumer.runtime.findings import Finding
from consumer.runtime.intake import IntakeStopped
from consumer.runtime.reconcile import ReconcileRefused
from consumer.runtime.redrive import RedriveRefused
from consumer.runtime.setup import SetupRefused
from consumer.runtime.source import SourceError
from consumer.runtime.start import StartRefused, shown
from consumer.runtime.stripe import WrongMode, WrongProxy
from consumer.runtime.stripe_reads import ReadFailed
from consumer.storage import Stage, StorageError

log = structlog.get_logger()

WRONG: Final = (
    Refused,
    ConfigError,
    preconditions.ServiceError,
    StartRefused,
    CustomerFileError,
    audit.DecisionRefused,
    explaining.Unknown,
    RedriveRefused,
    resetting.ResetRefused,
    SetupRefused,
    ReconcileRefused,
    WrongProxy,
)
"""What the user has to change before it can work: exit code 2."""

FAILED: Final = (
    StorageError,
    IntakeStopped,
    WrongMode,
    ReadFailed,
    SourceError,
    EntryError,
    UnbalancedError,
    UnknownEntryError,
)
"""What went wrong although the configuration is right: exit code 1. Everything else keeps its traceback."""


class _Commands(TyperGroup):
    """Says what is known to go wrong in one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WRONG as wrong:
            self._say(ctx, wrong, code := 2)
        except FAILED as failed:
            self._say(ctx, failed, code := 1)
        raise typer.Exit(code)

    def _say(self, ctx: Any, failed: Exception, code: int) -> None:
        if ctx.invoked_subcommand == "run" and not logs.for_people():
            log.error("failed", reason=str(failed), exit_code=code)
        else:
            typer.echo(f"tallyman: {failed}", err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Usage events on Kafka become Stripe Meter Events: every event billed once, in the right period.\n\n"
    "Begin with `tallyman demo`, which needs neither Kafka nor Stripe; then `tallyman check` your own configuration.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tallyman {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    logs.configure("warning")


# The service


@app.command()
def run(
    *,
    config: ConfigFile = DEFAULT,
    stage: Annotated[
        Stage | None,
        typer.Option(help="Run only this stage, with storage.kind: kafka; so each one scales by itself."),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(envvar="TALLYMAN_LOG_LEVEL", help="What to log: on a terminal as text, else as JSON lines."),
    ] = "info",
) -> None:
    """Run the service: count usage events, and report the totals to Stripe.

    It runs until SIGTERM or Ctrl-C, then commits and ends with exit code 0. A wrong configuration ends it with 2.

    Example: `STRIPE_SECRET_KEY_FILE=/run/secrets/stripe tallyman run -c prod.yaml`
    """
    logs.configure(log_level)
    given = read_config(config)
    logs.log_uncaught()
    service.run(
        given,
        service.Surroundings(CLOCK, service.kafka_source),
        frozenset(Stage) if stage is None else frozenset({stage}),
    )


@app.command()
def demo(
    events: Annotated[int, typer.Option(min=1, help="How many events to generate.")] = 60_000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same events.")] = 1,
) -> None:
    """Show the whole service on this machine, without Kafka and without a Stripe account.

    Generated traffic with repeated, late and broken events, a crash in the middle, and at the end a table that compares
    what was produced with what Stripe would bill.

    Example: `tallyman demo`
    """
    from consumer.sandbox import demo  # noqa: PLC0415 - the service does not load its sandbox

    raise typer.Exit(demo.main(events=events, seed=seed))


@app.command()
def check(config: ConfigFile = DEFAULT, as_json: Json = False) -> None:
    """Find out what would keep the service from running, before it does: nothing is changed.

    Looks at the configuration, Kafka and the topic, where reading would begin, the Stripe key, the meters and prices
    there, the storage and the customers. It can be used while the service runs. Exit code 1: something has to be put
    right.

    Example: `tallyman check -c prod.yaml`
    """
    try:
        given = read_config(config)
    except ConfigError as wrong:
        if as_json:
            show.json_line(Finding("error", "configuration", str(wrong)))
        raise
    findings = [Finding("ok", "configuration", f"{config} is right in itself")]
    with show.status("asking Kafka"):
        findings += checking.check(given, source_of(given), CLOCK)
    if as_json:
        for finding in findings:
            show.json_line(finding)
    else:
        show.findings(findings)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def produce(
    *,
    config: ConfigFile = DEFAULT,
    rate: Annotated[float, typer.Option(min=0.1, help="Events per second.")] = 100.0,
    events: Annotated[int | None, typer.Option(min=1, help="How many events; instead of --seconds.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="For how long.")] = 10.0,
    customers: Annotated[int, typer.Option(min=1, help="Of how many customers.")] = 100,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same events: duplicates.")] = None,
) -> None:
    """Write sample usage events, dated now, to the configured topic: to try a sandbox out.

    They are of the types `ai.completion` and `api.call`, as in the example configuration, for customers cus_000000 and
    on; some are repeated, late or broken, as in real traffic. Refused where stripe.livemode is true.

    Example: `tallyman produce --rate 500 --seconds 60`
    """
    from consumer.sandbox import traffic  # noqa: PLC0415 - the service does not load its sandbox

    given = read_config(config)
    if given.stripe.livemode:
        raise Refused("stripe.livemode is true: sample events on this topic would be billed to real customers")
    topic = source_of(given).describe()
    made = traffic.Traffic(
        traffic.Mix(customers=customers),
        seed=CLOCK.now() % 2**32 if seed is None else seed,
        partitions=topic.partitions,
    )
    number = events or max(1, round(rate * seconds))

    def paced() -> Iterator[traffic.Message]:
        began = CLOCK.elapsed()
        for each in range(number):
            time.sleep(max(0.0, each / rate - (CLOCK.elapsed() - began) / 1000))
            progress(each)
            yield made.message(CLOCK.now())

    try:
        with show.progress("producing", number) as progress:
            sent = traffic.produce(
                given.kafka.bootstrap_servers,
                topic.name,
                paced(),
                options={"log_level": "0", "message.timeout.ms": "15000"} | given.kafka_client(),
            )
    except KafkaException as failed:
        raise SourceError(f"{topic.name} did not take all events: {failed.args[0].str()}") from None
    counts = made.expected.counts
    typer.echo(
        f"{sent} events written to {topic.name}: {counts.counted} to be counted, {counts.duplicates} repeated, "
        f"{counts.malformed} broken, {counts.unmatched} of a type that no meter counts"
    )


# Totals


@app.command()
def totals(
    *,
    config: ConfigFile = DEFAULT,
    meter: OfMeter = None,
    customer: OfCustomer = None,
    since: Since = None,
    until: Until = None,
    state: Annotated[
        list[audit.Standing] | None,
        typer.Option(help="Only those in this state; may be given several times."),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="IDENTIFIER", help="All that is kept of this total, instead of a list."),
    ] = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Show what was or will be reported to Stripe, and what became of it: the newest windows first.

    --since and --until are about the beginning of the window. States: pending (not sent yet), delivered, parked (waits
    for somebody, see `tallyman parked`), unbilled (the customer is mapped to null), zero, discarded, refused (by
    Stripe, after it was delivered), shadowed (not sent, because somebody else bills it).

    --explain tells the whole story of one total: where in the topic its events lie, its attempts, what was decided, and
    under which identifiers it was sent.

    Example: `tallyman totals --customer cus_123 --since 24h`
    """
    if explain is not None:
        with opened_store(read_config(config)) as store, show.status("reading"):
            story = explaining.explain(store, explain)
        if as_json:
            show.json_line(story)
        else:
            show_totals.story(story)
        return
    wanted = audit.Wanted(meter, customer, since, until, frozenset(state or ()))
    check_limit(limit, as_json=as_json)
    with opened_store(read_config(config)) as store:
        show.newest(
            audit.lines(store, wanted),
            limit,
            lambda line: (line.window_start, line.identifier),
            as_json=as_json,
            line=lambda line: line,
            rows=show.totals,
        )


# Starting over


@app.command()
def reset(
    *,
    bill_from: Annotated[
        int,
        typer.Option(parser=exact_moment, metavar="TIME", help="From when on to bill, like 2026-11-01T00:00:00Z."),
    ],
    config: ConfigFile = DEFAULT,
    newest_total_unknown: Annotated[
        bool,
        typer.Option(
            resetting.UNKNOWN,
            help="The state is gone, and you have made sure that nothing after --bill-from has been billed.",
        ),
    ] = False,
    yes: Yes = False,
) -> None:
    """Start over: archive the state, and bill the events from a time on.

    For a state that is lost, or that does not fit the topic any more; and to bill from then on what was only shadowed
    until now (stripe.mode: shadow). Totals that have not been delivered are given up,
    and shown before. Refused while the service runs, and where it would bill anything twice.

    Example: `tallyman reset --bill-from 2026-11-01T00:00:00Z`
    """
    given = read_config(config)
    with show.status("reading the state"):
        old = resetting.look(given, CLOCK)
    source = source_of(given)
    topic = source.describe()
    preconditions.check_arrival(given, topic)
    read_before = bool(source.committed(range(topic.partitions)))
    resetting.judge(old, bill_from, CLOCK.now(), read_before=read_before, newest_unknown=newest_total_unknown)
    show.given_up(old)
    if not yes:
        typer.confirm(f"Start {given.pipeline} over, and bill events from {shown(bill_from)} on?", abort=True)
        # The service may have run while the question stood.
        old = resetting.look(given, CLOCK)
        resetting.judge(old, bill_from, CLOCK.now(), read_before=read_before, newest_unknown=newest_total_unknown)
    kept = resetting.reset(given, old, source, topic, bill_from=bill_from, clock=CLOCK)
    if kept is not None:
        typer.echo(kept)
    send = " and stripe.mode: send" if given.stripe.mode == "shadow" else ""
    typer.echo(
        f"{given.pipeline} begins anew. Set bill_from: {shown(bill_from)}{send} in {config}, then start with "
        "`tallyman run`."
    )


# The Stripe account

app.command()(account.setup)
app.command()(account.reconcile)
app.add_typer(parked.app, name="parked")
app.add_typer(letters.app, name="dead-letters")


def main() -> None:
    """The command; ends the process."""
    app(prog_name="tallyman")
