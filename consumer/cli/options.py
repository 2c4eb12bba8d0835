"""What the commands have in common: their options, the configuration, and how they say no."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Final

import typer

from consumer.config import Config, load
from consumer.config_values import Duration
from consumer.runtime import archive, service
from consumer.runtime.clocks import SystemClock
from consumer.runtime.source import Source
from consumer.storage import Archive
from consumer.times import parse_time

CLOCK: Final = SystemClock()
DEFAULT: Final = Path("config/tallyman.yaml")


class Refused(Exception):
    """A command line that makes no sense, or would do harm; the message says what to do instead."""


def moment(text: str) -> int:
    """A time as people give it, in milliseconds: absolute, a day, or how long ago."""
    try:
        return CLOCK.now() - Duration.of(text)
    except ValueError:
        pass
    try:
        return parse_time(text if "T" in text.upper() else f"{text}T00:00:00Z")
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time: write 2026-11-01T00:00:00Z, 2026-11-01, or how long ago, like 90m, 24h or 7d"
        ) from None


def exact_moment(text: str) -> int:
    """A time that leaves no doubt, in whole seconds as milliseconds."""
    try:
        time = parse_time(text)
    except ValueError:
        time = 1
    if time % 1000:
        raise typer.BadParameter(f"{text!r} is no time in whole seconds: write it like 2026-11-01T00:00:00Z")
    return time


ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", envvar="TALLYMAN_CONFIG", metavar="FILE", help="The configuration.")
]
Json = Annotated[bool, typer.Option("--json", help="For machines: one JSON object per line.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
Limit = Annotated[int, typer.Option(min=0, help="At most so many, the newest first; 0 is all of them, with --json.")]
OfMeter = Annotated[str | None, typer.Option("--meter", metavar="NAME", help="Only of this meter.")]
OfCustomer = Annotated[
    str | None, typer.Option("--customer", metavar="NAME", help="Only of this customer, as events or Stripe name it.")
]
Since = Annotated[
    int | None,
    typer.Option(parser=moment, metavar="TIME", help="From then on: 2026-11-01T00:00:00Z, 2026-11-01, or 24h ago."),
]
Until = Annotated[int | None, typer.Option(parser=moment, metavar="TIME", help="Before that time.")]


def read_config(file: Path) -> Config:
    """The configuration, with the secrets of the environment."""
    return load(file, os.environ)


def source_of(config: Config) -> Source:
    """The source topic."""
    return Source(archive.client_of(config), config.kafka.topic, service.group_of(config))


def opened_store(config: Config) -> AbstractContextManager[Archive]:
    """The store as commands use it: beside a service that may be running, and never created."""
    return archive.opened(config, now=CLOCK.now)


def check_limit(limit: int, *, as_json: bool) -> None:
    """Refuse a table of everything, which nobody could read and no memory need hold."""
    if not limit and not as_json:
        raise Refused("--limit 0 shows all of them, however many there are: add --json")
