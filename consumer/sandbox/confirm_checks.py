"""What `confirm` asks of Stripe: a check for each thing that is not confirmed, with what is expected of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple

import aiohttp

from consumer.sandbox.confirm_account import AT_ONCE, EVENTS, METERS, Account, Failed, Meter, Reply

DAY_S: Final = 86_400
HOUR_S: Final = 3_600

Verdict = Literal["as expected", "differs", "learned", "not tried", "failed"]


class Seen(NamedTuple):
    """What Stripe did, and whether that was expected; None where nothing was."""

    observed: str
    expected: bool | None = None


@dataclass(frozen=True)
class Check:
    """One question."""

    name: str
    question: str
    expected: str
    """What the service relies on, or ``nothing`` where it takes the safe side."""
    ask: Callable[[Bench], Awaitable[Seen]] | None = None
    """None for what takes a day or more: then ``expected`` says how to try it."""
    waits: bool = False
    """Whether it waits for sums: those that do wait together, at the end."""


@dataclass
class Bench:
    """What all checks share."""

    account: Account
    meter: Meter
    other: Meter
    """Another one, to see what is particular to a meter."""
    customer: str


NO_KEY: Final = "sk_test_tallymanconfirmnokey"
NOTHING: Final = "nothing: we take the safe side"

CHECKS: Final[list[Check]] = []


def _check(
    question: str, expected: str = NOTHING, *, waits: bool = False
) -> Callable[[Callable[[Bench], Awaitable[Seen]]], Callable[[Bench], Awaitable[Seen]]]:
    def noted(ask: Callable[[Bench], Awaitable[Seen]]) -> Callable[[Bench], Awaitable[Seen]]:
        CHECKS.append(Check(ask.__name__.replace("_", "-"), question, expected, ask, waits))
        return ask

    return noted


def _refused(reply: Reply, message: str = "", *, error: str = "invalid_request_error") -> bool:
    said = str(reply.error.get("message", ""))
    return reply.status == 400 and reply.error.get("type") == error and said.startswith(message)


# Identifiers and keys


@_check("A Meter Event as we send it", "200, a billing.meter_event with our identifier, in test mode")
async def taken(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer, "1.5")
    reply = await on.account.send(event)
    told = {name: reply.body.get(name) for name in ("object", "identifier", "livemode")}
    wanted = {"object": "billing.meter_event", "identifier": event["identifier"], "livemode": False}
    return Seen(f"{reply}, {told}", reply.status == 200 and told == wanted)


@_check("The same identifier under a new key", "400, no code, “An event already exists with identifier …”")
async def duplicate(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer)
    await on.account.send(event)
    reply = await on.account.send(event, key=f"{event['identifier']}:1")
    told = _refused(reply, f"An event already exists with identifier {event['identifier']}")
    return Seen(str(reply), told and not reply.error.get("code"))


@_check("The same identifier with another value, at another time", "refused as a duplicate")
async def duplicate_with_another_value(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer)
    await on.account.send(event)
    changed = on.account.event(
        on.meter, on.customer, "2", identifier=event["identifier"], timestamp=on.account.minute()
    )
    reply = await on.account.send(changed, key=f"{event['identifier']}:1")
    return Seen(str(reply), _refused(reply, "An event already exists"))


@_check("Is an identifier unique in the account, or for an event name? Ours differ by meter")
async def scope_of_identifiers(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer)
    await on.account.send(event)
    other = on.account.event(on.other, on.customer, identifier=event["identifier"])
    reply = await on.account.send(other, key=f"{event['identifier']}:1")
    return Seen(f"{'for an event name' if reply.status == 200 else 'in the account'}: {reply}")


@_check("The same identifier for another customer", "refused as a duplicate")
async def identifier_of_another_customer(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer)
    await on.account.send(event)
    other = on.account.event(on.meter, await on.account.customer(), identifier=event["identifier"])
    reply = await on.account.send(other, key=f"{event['identifier']}:1")
    return Seen(str(reply), _refused(reply, "An event already exists"))


@_check("The same request under the same key", "200, Idempotent-Replayed: true")
async def replay(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer)
    await on.account.send(event)
    reply = await on.account.send(event)
    return Seen(str(reply), reply.status == 200 and reply.headers.get("Idempotent-Replayed") == "true")


@_check("Another request under the same key", "400 idempotency_error")
async def key_used_again(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer)
    await on.account.send(event)
    reply = await on.account.send(on.account.event(on.meter, on.customer, "2"), key=event["identifier"])
    return Seen(str(reply), _refused(reply, error="idempotency_error"))


@_check("Is a refusal replayed to its key? We use another key after each")
async def replay_of_a_refusal(on: Bench) -> Seen:
    event = on.account.event(on.meter, "cus_tallymanconfirmnobody")
    await on.account.send(event)
    reply = await on.account.send(event)
    return Seen(str(reply))


@_check("A key that is none, with a request that lacks everything", "401: the key is looked at first")
async def key_before_parameters(on: Bench) -> Seen:
    reply = await on.account.ask("POST", EVENTS, secret=NO_KEY)
    return Seen(str(reply), reply.status == 401)


@_check("A request that lacks everything", "400: this is how `tallyman check` learns whether a key may send")
async def nothing_given(on: Bench) -> Seen:
    reply = await on.account.ask("POST", EVENTS)
    return Seen(str(reply), _refused(reply))


# Refusals


@_check("Unknown event name", "400 “No active meter found …”")
async def unknown_event_name(on: Bench) -> Seen:
    event = on.account.event(on.meter, on.customer, event_name=f"tallyman_confirm_{on.account.run}_none")
    reply = await on.account.send(event)
    return Seen(str(reply), _refused(reply, "No active meter found"))


@_check("Deactivated meter", "400 “No active meter found …”")
async def deactivated_meter(on: Bench) -> Seen:
    meter = await on.account.meter("off")
    await on.account.deactivate(meter)
    reply = await on.account.send(on.account.event(meter, on.customer))
    return Seen(str(reply), _refused(reply, "No active meter found"))


@_check("Unknown customer", "400 “No such customer: …”")
async def unknown_customer(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, "cus_tallymanconfirmnobody"))
    return Seen(str(reply), _refused(reply, "No such customer"))


@_check("No customer in the payload", "400")
async def customer_key_missing(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, on.customer, payload={"value": "1"}))
    return Seen(str(reply), _refused(reply))


@_check("No value in the payload", "400")
async def value_key_missing(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, on.customer, None))
    return Seen(str(reply), _refused(reply))


@_check("36 days ago", "400 “The event timestamp cannot be more than 35 days in past …”")
async def too_old(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, on.customer, timestamp=int(on.account.now()) - 36 * DAY_S))
    return Seen(str(reply), _refused(reply, "The event timestamp cannot be more than 35 days"))


@_check("34 days ago", "200")
async def not_too_old(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, on.customer, timestamp=int(on.account.now()) - 34 * DAY_S))
    return Seen(str(reply), reply.status == 200)


@_check("Ten minutes ahead", "400; the words are not known")
async def too_far_ahead(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, on.customer, timestamp=int(on.account.now()) + 600))
    return Seen(str(reply), _refused(reply))


@_check("Four minutes ahead", "200")
async def not_too_far_ahead(on: Bench) -> Seen:
    reply = await on.account.send(on.account.event(on.meter, on.customer, timestamp=int(on.account.now()) + 240))
    return Seen(str(reply), reply.status == 200)


# Values


async def _values(on: Bench, values: dict[str, str]) -> dict[str, Reply]:
    return {name: await on.account.send(on.account.event(on.meter, on.customer, each)) for name, each in values.items()}


def _told(replies: dict[str, Reply]) -> str:
    taken = [name for name, reply in replies.items() if reply.status == 200]
    refused = {name: reply for name, reply in replies.items() if reply.status != 200}
    told = [f"taken: {', '.join(taken) or 'none'}"]
    if refused:
        name, reply = next(iter(refused.items()))
        told.append(f"refused: {', '.join(refused)}; {name}: {reply}")
    return "; ".join(told)


def _all(replies: dict[str, Reply], status: int) -> bool:
    return {reply.status for reply in replies.values()} == {status}


@_check("15 significant digits", "taken")
async def digits(on: Bench) -> Seen:
    values = ("123456789012345", "1.23456789012345", "-999999999999999", "0.000123456789012345")
    replies = await _values(on, {each: each for each in values})
    return Seen(_told(replies), _all(replies, 200))


@_check("16 significant digits", "refused")
async def too_many_digits(on: Bench) -> Seen:
    replies = await _values(on, {each: each for each in ("1234567890123456", "1.234567890123456")})
    return Seen(_told(replies), _all(replies, 400))


@_check("How many decimal places? At most 12 are sent", "taken up to 12")
async def decimal_places(on: Bench) -> Seen:
    replies = await _values(on, {str(places): "0." + "0" * (places - 1) + "1" for places in (1, 6, 9, 12, 15, 20, 40)})
    return Seen(_told(replies), all(replies[each].status == 200 for each in ("1", "6", "9", "12")))


@_check("How long may a text in the payload be? Customers' ids and values of ours are shorter than 100 characters")
async def length_of_texts(on: Bench) -> Seen:
    payload = {"stripe_customer_id": on.customer, "value": "1"}
    replies = {
        str(length): await on.account.send(
            on.account.event(on.meter, on.customer, payload={**payload, "note": "x" * length})
        )
        for length in (50, 100, 101, 500)
    }
    return Seen(_told(replies), replies["50"].status == 200)


@_check("Exponents; they are never sent")
async def exponents(on: Bench) -> Seen:
    return Seen(_told(await _values(on, {each: each for each in ("1e3", "1E3", "1e-05", "1.5e+2")})))


@_check("Other ways to write a number; they are never sent")
async def other_numbers(on: Bench) -> Seen:
    values = ("+1", ".5", "1.", "007", "-0", "1,5", "1_000", "0x10", "NaN", "Infinity", "one")
    return Seen(_told(await _values(on, {each: each for each in values})))


@_check("Zero, and negative values", "taken")
async def negative_values(on: Bench) -> Seen:
    replies = await _values(on, {each: each for each in ("0", "-1", "-0.000000000001")})
    return Seen(_told(replies), _all(replies, 200))


@_check("Identifiers of 100 and of 101 characters", "taken, and refused")
async def length_of_identifiers(on: Bench) -> Seen:
    names = [on.account.identifier().ljust(length, "x") for length in (100, 101)]
    taken, refused = [await on.account.send(on.account.event(on.meter, on.customer, identifier=each)) for each in names]
    return Seen(f"100: {taken}; 101: {refused}", taken.status == 200 and _refused(refused))


# Limits


@_check(f"{AT_ONCE} requests at once for one customer and meter", "some are refused with 429 or 409, none with 400")
async def one_at_a_time(on: Bench) -> Seen:
    replies = await on.account.at_once([on.account.event(on.meter, on.customer) for _ in range(AT_ONCE)])
    counts: dict[str, int] = {}
    for reply in replies:
        counts[str(reply)] = counts.get(str(reply), 0) + 1
    told = "; ".join(f"{number} times {what}" for what, number in counts.items())
    busy = {reply.status for reply in replies} - {200}
    # That all were taken says nothing: they may have been served one after the other.
    return Seen(told, None if not busy else busy <= {409, 429})


# Sums


@_check("How long until a sum shows an event? A day is waited before a doubt is settled", waits=True)
async def lag_of_sums(on: Bench) -> Seen:
    minute = on.account.minute()
    await on.account.send(on.account.event(on.meter, on.customer, "3.25", timestamp=minute))
    found = await on.account.sum(on.meter, on.customer, minute, minute + 60, wanted=Decimal("3.25"))
    told = "" if found.value is None else f", first seen after {found.after_s:.0f} s"
    return Seen(f"{found}{told}, asked {found.asked} times")


@_check("Is a sum of decimals exact? 0.1, 0.2 and 0.000000000001", "0.300000000001", waits=True)
async def decimals_in_sums(on: Bench) -> Seen:
    minute, wanted = on.account.minute(), Decimal("0.300000000001")
    for value in ("0.1", "0.2", "0.000000000001"):
        await on.account.send(on.account.event(on.meter, on.customer, value, timestamp=minute))
    found = await on.account.sum(on.meter, on.customer, minute, minute + 60, wanted=wanted)
    return Seen(str(found), None if found.value is None else found.value == wanted)


@_check("Which minute has its first second, its last, and the next one's first?", "the first two", waits=True)
async def bounds_of_a_minute(on: Bench) -> Seen:
    minute = on.account.minute()
    on.account.minute()
    for second, value in ((0, "1"), (59, "2"), (60, "4")):
        await on.account.send(on.account.event(on.meter, on.customer, value, timestamp=minute + second))
    found = await on.account.sum(on.meter, on.customer, minute, minute + 60)
    return Seen(f"{found} of 1 (first), 2 (last), 4 (next)", None if found.value is None else found.value == 3)


@_check("A sum whose bounds are no whole minutes", "400")
async def bounds_that_are_no_minutes(on: Bench) -> Seen:
    minute = on.account.minute()
    params = {"customer": on.customer, "start_time": minute + 1, "end_time": minute + 61}
    reply = await on.account.ask("GET", f"{METERS}/{on.meter.id}/event_summaries", params)
    return Seen(str(reply), _refused(reply))


@_check("A cancelled event: is it taken out of the sum, and its identifier free? We cancel nothing", waits=True)
async def cancelled_events(on: Bench) -> Seen:
    minute = on.account.minute()
    event = on.account.event(on.meter, on.customer, "8", timestamp=minute)
    await on.account.send(event)
    await on.account.send(on.account.event(on.meter, on.customer, "1", timestamp=minute))
    cancel = {"event_name": on.meter.event_name, "type": "cancel", "cancel": {"identifier": event["identifier"]}}
    cancelled = await on.account.ask("POST", "/v1/billing/meter_event_adjustments", cancel)
    again = await on.account.send(event, key=f"{event['identifier']}:1")
    found = await on.account.sum(on.meter, on.customer, minute, minute + 60)
    status = cancelled.body.get("status", cancelled)
    return Seen(f"cancelled: {status}; sent again: {again}; the sum of 8 (cancelled) and 1 is {found}")


@_check("A customer that was deleted: refused at once, or taken and rejected?", waits=True)
async def deleted_customer(on: Bench) -> Seen:
    customer = await on.account.customer()
    await on.account.ask("DELETE", f"/v1/customers/{customer}")
    event = on.account.event(on.meter, customer)
    reply = await on.account.send(event)
    if reply.status != 200:
        return Seen(f"at once: {reply}")
    await on.account.sleep(60.0)
    again = await on.account.send(event, key=f"{event['identifier']}:1")
    return Seen(f"taken: {reply}; its identifier a minute later: {again}")


# Meters that the service refuses: they bill something else than what is counted


async def _in_one_hour(on: Bench, what: str, values: list[tuple[int, str]], **more: Any) -> Seen:
    meter = await on.account.meter(what, event_time_window="hour", **more)
    hour = int(on.account.now()) // HOUR_S * HOUR_S - 2 * HOUR_S
    for second, value in values:
        await on.account.send(on.account.event(meter, on.customer, value, timestamp=hour + second))
    found = await on.account.sum(meter, on.customer, hour, hour + HOUR_S)
    return Seen(f"{found} of {' then '.join(f'{value} (at {second} s)' for second, value in values)}")


@_check("A meter that keeps one event an hour: which one? Such a meter is refused by us", waits=True)
async def newest_of_an_hour(on: Bench) -> Seen:
    return await _in_one_hour(on, "hour", [(60, "5"), (120, "3")])


@_check("And where the later one is received first?", waits=True)
async def newest_of_an_hour_out_of_order(on: Bench) -> Seen:
    return await _in_one_hour(on, "hour_order", [(120, "5"), (60, "3")])


@_check("And at the hour's last second and the next one's first?", waits=True)
async def newest_at_the_bound_of_an_hour(on: Bench) -> Seen:
    return await _in_one_hour(on, "hour_bound", [(0, "5"), (3_599, "3"), (3_600, "7")])


@_check("And where it counts?", waits=True)
async def newest_of_an_hour_that_counts(on: Bench) -> Seen:
    return await _in_one_hour(on, "hour_count", [(60, "5"), (120, "3")], default_aggregation={"formula": "count"})


# What takes a day or more

_LATER: Final = (
    (
        "identifier-after-a-day",
        "Does an identifier count again after 24 hours?",
        "reactivate a meter of a run, send one of its events again after 25 hours under a new key, and look at the sum",
    ),
    (
        "key-after-a-day",
        "Is an answer still replayed after 24 hours?",
        "the same, under the same key",
    ),
    (
        "replay-of-a-500",
        "Is a 500 replayed to its key?",
        "cannot be brought about; Stripe documents that it is",
    ),
    (
        "restricted-key",
        "Is a key that may not send refused with 403 before its parameters are looked at?",
        "make a restricted key without Meter Events, and run `tallyman check` with it",
    ),
    (
        "bound-of-a-period",
        "In which period is an event of the very second at which a period ends?",
        "subscribe a customer by the day, send an event for that second and one for the one before: see its invoices",
    ),
    (
        "late-for-the-invoice",
        "Where does usage go that comes after its invoice was made final?",
        "the same, with an event that is sent two hours after the period's end",
    ),
    (
        "trial",
        "What becomes of usage in a trial?",
        "subscribe with trial_period_days: 1, send an event, and look at the first two invoices",
    ),
    (
        "test-clock",
        "Is the timestamp of an event judged by a customer's test clock?",
        "put a customer on a test clock, move it by 40 days, and send events dated by either",
    ),
    (
        "stream",
        "Are duplicates within a meter event stream dropped or reported?",
        "the stream is not used by the service, and is not asked for here",
    ),
)

CHECKS.extend(Check(name, question, how) for name, question, how in _LATER)


async def _ask(check: Check, on: Bench) -> tuple[Verdict, str]:
    if check.ask is None:
        return "not tried", ""
    try:
        seen = await check.ask(on)
    except (Failed, aiohttp.ClientError, TimeoutError) as failed:
        return "failed", str(failed) or type(failed).__name__
    if seen.expected is None:
        return "learned", seen.observed
    return "as expected" if seen.expected else "differs", seen.observed


async def ask_all(
    account: Account, wanted: Callable[[Check], bool], tell: Callable[[Check, Verdict, str], None]
) -> None:
    """Ask all that are wanted, and tell of each as soon as it is known."""
    on = Bench(account, await account.meter("first"), await account.meter("other"), await account.customer())
    asked = [each for each in CHECKS if wanted(each)]
    for each in asked:
        if not each.waits:
            tell(each, *await _ask(each, on))
    waiting = [each for each in asked if each.waits]

    async def ask(each: Check) -> None:
        tell(each, *await _ask(each, on))

    await asyncio.gather(*map(ask, waiting))
