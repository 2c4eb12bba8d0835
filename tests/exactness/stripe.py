"""The Stripe stand-in of these runs, as a process: it refuses, fails and loses answers while it keeps the truth.

    python -m tests.exactness.stripe --seed 1 --burst 500

prints its URL and serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from consumer.sandbox.stripe_server import Fault, Faults, StripeStandIn
from consumer.sandbox.traffic import AI_TOKENS, API_CALLS

RATES = {
    Fault.LOCK_TIMEOUT: 0.05,
    Fault.ERROR: 0.025,
    Fault.ACCEPT_ERROR: 0.025,
    Fault.ACCEPT_LOSE: 0.05,
}
"""Of all requests. With the rate limit's share of 5 %, a tenth is answered with 429 and a twentieth with 500, half of
those after the event was taken; of another twentieth the event is taken and the answer lost.
"""
LIMITED_ONE_IN = 20
BURST_AT_MOST_S = 2.0
"""A few totals, tried at ever longer intervals, would never come to the end of a limit that counts requests alone."""
BEHIND_S = 3_600.0
"""So far its clock is behind the host's: too far for the service to believe either of the two. The traffic is dated in
the past, and a service that is restarted at the end of the log would rightly take what comes after it to be late.
"""
LATENCY_S = (0.002, 0.02)


class RateLimit:
    """Refuses many requests in a row, and then none for a while, as limits by the second do."""

    def __init__(self, burst: int) -> None:
        self._burst = burst
        self._until = 0.0

    def __call__(self, number: int, _: str) -> Fault | None:
        inside = number % (self._burst * LIMITED_ONE_IN) - self._burst * (LIMITED_ONE_IN - 1)
        if inside == 0:
            self._until = time.monotonic() + BURST_AT_MOST_S
        return Fault.RATE_LIMITED if inside >= 0 and time.monotonic() < self._until else None


def main() -> None:
    """Serve until standard input ends, which it does at the latest when whoever started this is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--burst", type=int, required=True, help="requests in a row that a rate limit refuses")
    given = parser.parse_args()
    chance = random.Random(given.seed)  # noqa: S311 - reproducible
    faults = Faults(rates=RATES, plan=RateLimit(given.burst), latency=LATENCY_S, random=chance)
    stripe = StripeStandIn(faults=faults, accept_any_customer=True)
    stripe.clock.advance(-BEHIND_S)
    for event_name in (AI_TOKENS, API_CALLS):
        stripe.model.add_meter(event_name)
    with stripe:
        print(stripe.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
