"""`tallyman dead-letters`: events that could not be counted, and to produce them again."""

from typing import Annotated

import typer

from consumer.cli import show
from consumer.cli.options import (
    CLOCK,
    DEFAULT,
    ConfigFile,
    Json,
    Limit,
    Refused,
    Since,
    Yes,
    check_limit,
    opened_store,
    read_config,
    source_of,
)
from consumer.runtime import redrive as redriving

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Events that could not be counted, kept with the reason."
)


LetterReason = Annotated[str | None, typer.Option("--reason", metavar="REASON", help="Only those with this reason.")]
LetterPartition = Annotated[int | None, typer.Option("--partition", min=0, help="Only those of this partition.")]


@app.command("list")
def letters_list(
    *,
    config: ConfigFile = DEFAULT,
    reason: LetterReason = None,
    partition: LetterPartition = None,
    since: Since = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Show the events that could not be counted, and why.

    Example: `tallyman dead-letters list --since 24h`
    """
    check_limit(limit, as_json=as_json)
    with opened_store(read_config(config)) as store:
        show.newest(
            redriving.letters(store, redriving.Wanted(reason, partition, since)),
            limit,
            lambda each: (each.record.appended_at, each.number),
            as_json=as_json,
            line=show.letter,
            rows=show.letters,
        )


@app.command("show")
def letters_show(
    number: Annotated[int, typer.Argument(help="As `tallyman dead-letters list` numbers it.")],
    config: ConfigFile = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show one dead letter whole: the reason, the record's key and headers, and the event.

    Example: `tallyman dead-letters show 17`
    """
    with opened_store(read_config(config)) as store:
        record = store.letter(number)
        if record is None:
            raise Refused(f"there is no dead letter {number}: `tallyman dead-letters list` shows their numbers")
        whole = redriving.opened(store, record)
    if as_json:
        show.json_line(show.letter(whole) | show.event(whole))
    else:
        show.letter_whole(whole)


@app.command()
def redrive(
    *,
    numbers: Annotated[
        list[int] | None, typer.Argument(help="Only these, as `tallyman dead-letters list` numbers them.")
    ] = None,
    config: ConfigFile = DEFAULT,
    reason: LetterReason = None,
    partition: LetterPartition = None,
    since: Since = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be produced, and produce nothing.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Also those that were redriven before.")] = False,
    even_old: Annotated[
        bool,
        typer.Option(
            "--even-old",
            help="Also those older than deduplicate_for, or than the last reset: counted twice if ever counted before.",
        ),
    ] = False,
    yes: Yes = False,
) -> None:
    """Produce dead letters to their topic again, once what was wrong has been put right.

    They go to the same partition with the same key and headers, and keep their event time. An interrupted redrive goes
    on where it stopped; what was produced twice counts once.

    Example: `tallyman dead-letters redrive --reason value_missing --dry-run`
    """
    given = read_config(config)
    source = source_of(given)
    wanted = redriving.Wanted(reason, partition, since, frozenset(numbers or ()))
    allowed = redriving.Permissions(again=again, even_old=even_old)
    with opened_store(given) as store:
        with show.status("looking through the dead letters"):
            would = redriving.redrive(given, store, source, wanted, allowed, now=CLOCK.now(), dry_run=True)
        if dying := sum(would.reasons.get(each, 0) for each in redriving.DIES_AGAIN):
            typer.echo(
                f"{dying} were too late or in the future: unless accept_late was raised, they will be dead again",
                err=True,
            )
        if dry_run or not would.produced:
            show.redriven(would, "would be produced", given.kafka.topic)
            return
        if not yes:
            show.redriven(would, "are to be produced", given.kafka.topic)
            typer.confirm("Go on?", abort=True)
        with show.progress("redriving", would.produced) as progress:
            done = redriving.redrive(
                given, store, source, wanted, allowed, now=CLOCK.now(), told=lambda each: progress(each.produced)
            )
    show.redriven(done, "were produced", given.kafka.topic)
    if done.refused:
        raise typer.Exit(1)
