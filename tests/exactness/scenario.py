"""What every run is given: its traffic, how hard Stripe is pressed, and the command line that says so."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from consumer.sandbox.traffic import Mix

L = TypeVar("L", bound="Load")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What comes in during a run."""

    events: int
    customers: int
    minutes: int
    """Over how much event time the traffic stretches."""
    rate: float
    """Records produced a second: the service has to be reading while something is done to it."""
    burst: int
    """Requests in a row that a rate limit at Stripe refuses, whenever it does."""
    seed: int

    @property
    def mix(self) -> Mix:
        """What the traffic consists of: 2 % are repetitions, the rest of the shares are the usual ones."""
        # Repetitions come up to 3 minutes later, and those that would come after the end never do.
        return Mix(customers=self.customers, duplicates=0.0206 * self.minutes / (self.minutes - 1.5))


def options(prog: str, about: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all runs have."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--customers", type=int, default=5_000)
    parser.add_argument("--minutes", type=int, default=7, help="of event time that the traffic stretches over")
    parser.add_argument("--rate", type=float, default=8_000, help="events produced per second")
    parser.add_argument("--burst", type=int, default=500, help="requests in a row that a rate limit refuses")
    return parser


def scenario(kind: type[L], given: argparse.Namespace) -> L:
    """The run that a command line asks for; its options have the names of the fields."""
    return kind(**{field.name: getattr(given, field.name) for field in fields(kind)})


def stamped() -> Callable[[str], None]:
    """Prints what it is told, with the seconds since now."""
    began = time.monotonic()
    return lambda what: print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)
