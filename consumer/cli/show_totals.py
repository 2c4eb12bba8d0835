"""How parked totals look, what is recommended about them, and the story of a single total."""

from collections.abc import Iterable
from typing import Any, Final

import typer

from consumer.cli.show import table, window
from consumer.deliver.doubt import Advice, Piece, Sight
from consumer.deliver.entries import Decision, Entry, Reason
from consumer.runtime.evidence import Judged, is_doubtful
from consumer.runtime.explain import Story
from consumer.runtime.start import shown
from consumer.totals import plain

_ADVICE: Final = {
    Advice.RELEASE: "release",
    Advice.DISCARD: "discard",
    Advice.WAIT: "wait",
    Advice.CANNOT_TELL: "cannot tell",
}


# Parked totals


def released(entry: Entry) -> str:
    """Whether a parked total may be released, as far as our own records tell."""
    if is_doubtful(entry):
        return "ask"
    return "by itself" if entry.reason is Reason.UNMAPPED else "yes"


def parked_total(entry: Entry) -> dict[str, Any]:
    """A parked total, for machines."""
    return {
        "identifier": entry.total.identifier,
        "reason": entry.reason,
        "message": entry.message,
        "due": entry.total.due,
        "attempts": entry.attempts,
        "first_unproven": entry.first_unproven,
        "may_be_at_stripe": is_doubtful(entry),
        "release": released(entry),
        "stripe_customer": entry.customer,
        "at_stripe": entry.identifier,
        "generation": entry.generation,
        "parked_at": entry.parked_at or None,
        "parking": entry.parking,
        "decisions": entry.decisions,
        "total": entry.total,
    }


def judged_total(judged: Judged) -> dict[str, Any]:
    """The same, with what is known of it and what is recommended."""
    return parked_total(judged.entry) | {
        "places": [_place(each) for each in judged.sights],
        "recommendation": judged.recommendation,
    }


def _place(sight: Sight) -> dict[str, Any]:
    seen = sight.seen
    return {
        "customer": sight.place.customer,
        "event_name": sight.place.event_name,
        "minute": sight.place.minute,
        "delivered": [_piece(each) for each in sight.sure],
        "doubtful": [_piece(each) for each in sight.others],
        "this_total": [_piece(each) for each in sight.own],
        "stripe": plain(seen.value) if seen else None,
        "stripe_uncertainty": plain(seen.uncertainty) if seen else None,
        "stripe_at": seen.at if seen else None,
        "stripe_unknown": sight.unseen or None,
    }


def _piece(piece: Piece) -> dict[str, Any]:
    return {"identifier": piece.identifier, "value": plain(piece.value), "newest": piece.newest}


def parked(entries: Iterable[Entry]) -> None:
    """Parked totals, one to a line."""
    table(
        ("identifier", "meter", "customer", "window", "value", "reason", "due since", "release?", "what Stripe said"),
        (
            (
                each.total.identifier,
                each.total.meter,
                each.total.customer,
                window(each.total.window_start, each.total.window, each.total.revision),
                each.total.value,
                each.reason,
                shown(each.total.due),
                released(each),
                each.message or "",
            )
            for each in entries
        ),
        whole="identifier",
    )


def judged(of: Judged) -> None:
    """All of one parked total, what is known of where it may be, and what to do."""
    entry, total = of.entry, of.entry.total
    times = f", parked {entry.parking} times" if entry.parking > 1 else ""
    rows: list[tuple[str, object]] = [
        ("identifier", total.identifier),
        ("meter", f"{total.meter}, at Stripe {total.stripe.event_name}"),
        ("customer", f"{total.customer}, at Stripe {entry.customer or 'unknown'}"),
        ("window", window(total.window_start, total.window, total.revision)),
        ("value", f"{total.value}, of {total.events} events"),
        ("timestamp", shown(total.timestamp * 1000)),
        ("read from", f"partition {total.partition}, offsets {total.first_offset} to {total.last_offset}"),
        ("due since", shown(total.due)),
        ("parked", f"{entry.reason}, after {entry.attempts} attempts{times}"),
    ]
    if entry.parked_at:
        rows.append(("parked since", shown(entry.parked_at)))
    if entry.message:
        rows.append(("Stripe said", entry.message))
    if entry.first_unproven is not None:
        rows.append(("unproven since", shown(entry.first_unproven)))
    if entry.generation > 1:
        rows.append(("at Stripe", f"{entry.identifier}, generation {entry.generation}"))
    rows += [("decided", _decision(each)) for each in entry.decisions]
    table(("", ""), rows)
    if of.sights:
        typer.echo("")
        table(
            ("customer at Stripe", "event name", "minute", "delivered", "others, maybe", "this total", "Stripe", "at"),
            (
                (
                    each.place.customer,
                    each.place.event_name,
                    shown(each.place.minute * 1000),
                    _sum(each.sure),
                    _sum(each.others),
                    _sum(each.own),
                    plain(each.seen.value) if each.seen else "unknown",
                    shown(each.seen.at) if each.seen else "",
                )
                for each in of.sights
            ),
        )
    _recommended(of)


def _recommended(of: Judged) -> None:
    advice, identifier = of.recommendation.advice, of.entry.total.identifier
    until = of.recommendation.until
    later = f" Ask again after {shown(until)}." if until is not None else ""
    typer.echo(f"\nRecommendation: {_ADVICE[advice]}. {of.recommendation.why}{later}")
    if advice is Advice.RELEASE:
        typer.echo(f"To do so: tallyman parked release {identifier}")
    elif advice is Advice.DISCARD:
        typer.echo(f'To do so: tallyman parked discard {identifier} --why "…"')
    elif of.sights:
        typer.echo("Whoever knows better releases or discards it with --despite-doubt.")


def _decision(each: Decision) -> str:
    doubt = f", in generation {each.generation}, which may be at Stripe" if each.first_unproven is not None else ""
    why = f": {each.reason}" if each.reason else ""
    return f"{each.action} by {each.by} at {shown(each.at)} ({each.parked}{doubt}){why}"


def _sum(pieces: tuple[Piece, ...]) -> str:
    text = plain(sum(each.value for each in pieces))
    return f"{text} in {len(pieces)}" if len(pieces) > 1 else text


# The story of a total


def story(of: Story) -> None:
    """All that is kept of one total."""
    offsets = "the record is not kept any more"
    if of.first_offset is not None:
        offsets = f"partition {of.partition}, offsets {of.first_offset} to {of.last_offset}"
    state = f"{of.state} ({of.reason})" if of.reason else str(of.state)
    rows: list[tuple[str, object]] = [
        ("identifier", of.identifier),
        ("state", state),
        ("meter", f"{of.meter}, at Stripe {of.event_name}"),
        ("edition", of.edition),
        ("customer", of.customer),
        ("window", window(of.window_start, of.window, of.revision)),
        ("revision", of.revision),
        ("value", f"{of.value}, of {of.events} events"),
        ("timestamp", shown(of.timestamp * 1000)),
        ("read from", offsets),
    ]
    if of.due is not None:
        rows.append(("due", shown(of.due)))
    if of.billed is not None:
        rows.append(("billed", of.billed if of.rounded in {None, "0"} else f"{of.billed}, rounded by {of.rounded}"))
    if of.key is not None:
        rows.append(("last key", of.key))
    if of.message:
        rows.append(("Stripe said", of.message))
    for name, at in (("finished", of.finished_at), ("parked since", of.parked_at), ("tried again", of.next_look)):
        if at is not None:
            rows.append((name, shown(at)))
    table(("", ""), rows)
    typer.echo("")
    table(
        ("generation", "customer at Stripe", "attempts", "unproven since", "at Stripe"),
        (
            (
                each.identifier,
                each.stripe_customer or "",
                each.attempts,
                "" if each.first_unproven is None else shown(each.first_unproven),
                each.at_stripe,
            )
            for each in of.generations
        ),
        whole="generation",
    )
    if of.decisions:
        typer.echo("")
        table(
            ("decision", "by", "at", "why", "was parked", "carried out", "Stripe had said"),
            (
                (
                    each.action,
                    each.by,
                    shown(each.at),
                    each.reason,
                    each.parked or "",
                    each.carried_out,
                    each.message or "",
                )
                for each in of.decisions
            ),
        )
