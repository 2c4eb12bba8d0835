"""Ask a Stripe sandbox what is not confirmed about Stripe.

    STRIPE_SECRET_KEY=sk_test_… python -m consumer.sandbox.confirm

It makes meters and customers of its own, named by the run, sends them events, and puts them away at its end. It costs
nothing but calls in test mode, of which it makes fewer than a sandbox takes. Keys of live mode are refused. What it
learns is printed as a table, or with --json as one object on each line. Exit codes: 0 where all is as expected or was
not known before, 1 where something differs or failed, 2 where it cannot be asked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from consumer.credentials import STRIPE_SECRET_KEY, from_environment, hidden, key_matches
from consumer.sandbox.confirm_account import Account, Failed, LiveMode
from consumer.sandbox.confirm_checks import CHECKS, Check, Verdict, ask_all

STRIPE: Final = "https://api.stripe.com"
PATIENCE_S: Final = 300.0
WIDE: Final = 180
"""Columns where nobody looks at a terminal."""

_COLOURS: Final[Mapping[Verdict, str]] = {
    "as expected": "green",
    "learned": "cyan",
    "differs": "bold red",
    "failed": "bold red",
    "not tried": "dim",
}


class Answer(NamedTuple):
    """One line of what was learned."""

    check: str
    question: str
    expected: str
    observed: str
    verdict: Verdict


class Refused(Exception):
    """It cannot be asked; the message says why and what to do."""


async def confirm(
    key: str,
    *,
    base: str,
    run: str,
    wanted: Callable[[Check], bool] = lambda _: True,
    patience: float = PATIENCE_S,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Answer], list[str], int]:
    """What was learned, in the order of the checks; what could not be put away; and how many calls it took."""
    found: dict[str, Answer] = {}

    def tell(check: Check, verdict: Verdict, observed: str) -> None:
        found[check.name] = Answer(check.name, check.question, check.expected, hidden(observed), verdict)
        progress(f"{check.name}: {verdict}")

    async with Account(key, base=base, run=run, patience=patience, now=now, sleep=sleep) as account:
        await ask_all(account, wanted, tell)
    return [found[each.name] for each in CHECKS if each.name in found], account.left, account.calls


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Ask, print, and return the exit code."""
    given = _parsed(arguments)
    try:
        key = _key(environ)
        run = f"{datetime.now(UTC):%Y%m%d%H%M%S}_{secrets.token_hex(2)}"
        names = _names(given.only)
        answers, left, calls = asyncio.run(
            confirm(
                key,
                base=given.api_base,
                run=run,
                wanted=lambda each: not names or each.name in names,
                patience=given.patience,
                progress=lambda text: print(text, file=sys.stderr),
            )
        )
    except (Refused, LiveMode) as refused:
        print(f"confirm: {refused}", file=sys.stderr)
        return 2
    except (Failed, aiohttp.ClientError, TimeoutError) as failed:
        print(f"confirm: {str(failed) or type(failed).__name__}", file=sys.stderr)
        return 1
    _show(answers, as_json=given.json)
    print(f"run {run}, {calls} calls", file=sys.stderr)
    for each in left:
        print(f"confirm: could not be put away: {each}", file=sys.stderr)
    return int(any(each.verdict in {"differs", "failed"} for each in answers))


def _names(wanted: Sequence[str]) -> frozenset[str]:
    if unknown := set(wanted) - {each.name for each in CHECKS}:
        raise Refused(f"there is no check {', '.join(sorted(unknown))}: --list has them all")
    return frozenset(wanted)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m consumer.sandbox.confirm",
        description="Ask a Stripe sandbox what is not confirmed about Stripe.",
        epilog=f"The key is read from {STRIPE_SECRET_KEY}, or from the file that {STRIPE_SECRET_KEY}_FILE names.",
    )
    parser.add_argument(
        "--api-base", default=STRIPE, metavar="URL", help="another place than Stripe's, to try this out"
    )
    parser.add_argument("--patience", type=float, default=PATIENCE_S, metavar="SECONDS", help="for each sum; 300")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="this check; may be repeated")
    parser.add_argument("--list", action=_List, nargs=0, help="the checks, and ask nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on each line")
    return parser.parse_args(arguments)


class _List(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        for each in CHECKS:
            print(f"{each.name}: {each.question}")
        parser.exit()


def _key(environ: Mapping[str, str]) -> str:
    found, wrong = from_environment({name: environ[name] for name in environ if name.startswith(STRIPE_SECRET_KEY)})
    if wrong:
        raise Refused("; ".join(f"{name}: {message}" for name, message in wrong))
    if found.stripe_secret_key is None:
        raise Refused(f"there is no Stripe key: set {STRIPE_SECRET_KEY} to one that begins with sk_test_ or rk_test_")
    if not key_matches(False, found.stripe_secret_key):
        raise Refused(
            f"{STRIPE_SECRET_KEY} is no key of test mode: give one that begins with sk_test_ or rk_test_. Nothing is "
            "asked of an account that bills"
        )
    return found.stripe_secret_key.get_secret_value()


def _show(answers: Sequence[Answer], *, as_json: bool) -> None:
    if as_json:
        for each in answers:
            sys.stdout.write(msgspec.json.encode(each._asdict()).decode() + "\n")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, share in (("check", 2), ("expected", 2), ("observed", 4), ("", 1)):
        table.add_column(name, overflow="fold", ratio=share)
    for each in answers:
        asked = Text.assemble((each.check, "bold"), "\n", each.question)
        told = each.observed if each.verdict != "not tried" else ""
        table.add_row(asked, each.expected, Text(told), Text(each.verdict, _COLOURS[each.verdict]))
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
