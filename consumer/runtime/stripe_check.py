"""Whether the Stripe account bills what is counted here: asked before a start, and never changed.

`check` says all of it. `run` asks for the meters alone, and does not start on one that would bill wrongly; where
Stripe does not answer it starts all the same, for an outage of Stripe is no reason not to count, and asks again.
"""

from collections.abc import Iterator
from typing import Any, Final

from consumer.aggregate.meters import WINDOW_MS
from consumer.config import Config, CustomerFile
from consumer.runtime import customers
from consumer.runtime.clocks import Clock
from consumer.runtime.findings import Finding
from consumer.runtime.stripe import WrongMode
from consumer.runtime.stripe_meters import destinations, misbills, unfit
from consumer.runtime.stripe_reads import KeyRefused, Meter, ReadFailed, StripeReads

SKEW_MS: Final = 60_000
"""Clocks that are further apart are worth a look."""

TOO_SKEWED_MS: Final = 300_000
"""Stripe refuses events so far ahead of its clock."""

LIVE_RATE: Final = 1_000.0
SANDBOX_RATE: Final = 25.0
"""Meter Events a second that Stripe takes of a live account and of a sandbox."""


def rate_limit(config: Config) -> float:
    """Meter Events a second, at most."""
    return config.stripe.max_rate or (LIVE_RATE if config.stripe.livemode else SANDBOX_RATE)


# What `run` asks


def misbilling(config: Config, key: str, clock: Clock) -> str | None:
    """Why the account would bill wrongly what is sent to it; None where it would not.

    Raises ``ReadFailed`` where it is not said, and ``WrongMode`` where Stripe answers in another mode than the
    configuration states.
    """
    reads = _Probe(key, api_base=config.stripe.api_base, livemode=config.stripe.livemode, clock=clock, attempts=1)
    try:
        there = reads.meters()
    finally:
        reads.close()
    wrong = [
        f"{event_name}: {reason}."
        for event_name in destinations(config)
        if event_name in there
        for reason in misbills(there[event_name])
    ]
    return "\n".join(["Stripe would bill wrongly:", *wrong]) if wrong else None


# What `check` asks


class _Probe(StripeReads):
    """Asks what a key may do, without doing it."""

    def try_sending(self) -> None:
        """A Meter Event without its required fields: refused whatever the key may do, but not for the same reason."""
        try:
            self._ask("sending Meter Events", lambda: self._client.v1.billing.meter_events.create(_NOTHING))
        except KeyRefused:
            raise
        except ReadFailed:
            return


_NOTHING: Final[Any] = {}


def findings(config: Config, key: str, clock: Clock) -> Iterator[Finding]:
    """What Stripe says of the key, the meters and their prices, and the clock."""
    reads = _Probe(key, api_base=config.stripe.api_base, livemode=config.stripe.livemode, clock=clock, attempts=2)
    try:
        yield from _found(config, reads, clock)
    except WrongMode as wrong:
        yield Finding("error", "account", str(wrong))
    except KeyRefused as refused:
        if config.stripe.mode == "shadow":
            yield Finding("error", "account", f"{refused}; without it nothing can be compared")
        else:
            yield Finding("warning", "account", f"{refused}; without it nobody can tell here whether the meters fit")
    except ReadFailed as failed:
        yield Finding("warning", "account", f"not looked at: {failed}")
    finally:
        reads.close()


def _wrong(config: Config, what: str, says: str) -> Finding:
    """What is wrong as soon as something is sent."""
    if config.stripe.mode == "shadow":
        says = f"{says.rstrip('.')}. In shadow nothing is sent: put it right before stripe.mode is send"
        return Finding("warning", what, says)
    return Finding("error", what, says)


def _found(config: Config, reads: _Probe, clock: Clock) -> Iterator[Finding]:
    try:
        reads.try_sending()
    except KeyRefused as refused:
        yield _wrong(config, "account", str(refused))
    if reads.date is not None:
        yield _clock(reads.now() - clock.now())
    there = reads.meters()
    yield Finding("ok", "account", f"Stripe answers, and shows {len(there)} meters")
    for event_name, (destination, names) in destinations(config).items():
        meter = there.get(event_name)
        if meter is None:
            yield _wrong(
                config,
                "meter",
                f"Stripe has no meter with the event name {event_name} ({', '.join(names)}): totals would be parked. "
                "`tallyman setup` creates it; or correct stripe.event_name",
            )
            continue
        wrong = [*unfit(meter, destination)]
        yield from (_wrong(config, "meter", f"{event_name}: {reason}") for reason in wrong)
        if not wrong:
            yield Finding("ok", "meter", f"{event_name}: {meter.id} is active and sums raw events")
        yield _price(reads, meter)


def _price(reads: StripeReads, meter: Meter) -> Finding:
    try:
        prices = reads.prices(meter.id)
    except KeyRefused as refused:
        return Finding("warning", "price", f"{meter.event_name}: {refused}, to have prices looked at")
    if not prices:
        return Finding(
            "warning",
            "price",
            f"{meter.event_name}: no active price uses this meter, so its usage is counted and billed to nobody: "
            "`tallyman setup` creates one",
        )
    return Finding("ok", "price", f"{meter.event_name}: {', '.join(each.id for each in prices)}")


def _clock(skew: int) -> Finding:
    """``skew``: how far Stripe's clock is ahead of ours, in milliseconds, to about a second."""
    if abs(skew) < SKEW_MS:
        return Finding("ok", "clock", "this host's clock and Stripe's agree to the minute")
    says = (
        f"this host's clock is {abs(skew) // 1000} s {'behind' if skew > 0 else 'ahead of'} Stripe's: windows close "
        "when they should not, and Stripe refuses events that are 5 minutes ahead. Set the clock, for example with NTP"
    )
    return Finding("error" if abs(skew) >= TOO_SKEWED_MS else "warning", "clock", says)


def rate(config: Config) -> Finding:
    """Whether Stripe takes as many calls as there can be totals, as far as the configuration tells."""
    limit = rate_limit(config)
    a_second = sum(1000 / WINDOW_MS[meter.window] for meter in config.meters)
    enough = int(limit / a_second)
    known = _customers(config)
    if known is None:
        return Finding(
            "ok", "rate", f"{limit:g} calls a second are enough for {enough} customers with usage in every window"
        )
    calls = known * a_second
    if calls <= limit:
        of = "1 customer" if known == 1 else f"{known} customers"
        return Finding("ok", "rate", f"at most {calls:.3g} calls a second for {of}, of {limit:g} that may be made")
    return Finding(
        "warning",
        "rate",
        f"{known} customers with usage in every window would be {calls:.3g} calls a second, and {limit:g} may be made: "
        f"totals wait when more than {enough} have. Use window: 1h where that is enough, or fewer meters",
    )


def _customers(config: Config) -> int | None:
    if not isinstance(config.customers, CustomerFile):
        return None
    try:
        return customers.CustomerFile(config.customers.path).customers.billed
    except customers.CustomerFileError:
        return None  # which is a finding of its own
