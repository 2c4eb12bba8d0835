"""An operator who settles doubts with the commands that there are, and who is watched: no advice may be wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from consumer.cli import app

MINUTE = 60_000


class WrongAdviceError(AssertionError):
    """Somebody who followed it would bill twice, or nobody."""


class Operator:
    """Asks `tallyman parked` what to do, and does it; what it cannot tell, the operator knows from elsewhere."""

    def __init__(
        self,
        config: Path,
        key: str,
        *,
        at_stripe: Callable[[str], bool],
        now: Callable[[], int],
        sleep: Callable[[int], None],
    ) -> None:
        """``at_stripe``: whether an event of this total is there in truth, in whatever generation. ``now`` and
        ``sleep`` are in milliseconds."""
        self._config = config
        self._env = {"STRIPE_SECRET_KEY": key}
        self._at_stripe = at_stripe
        self._now = now
        self._sleep = sleep
        self.given: Counter[str] = Counter()
        """How often which advice was given."""
        self.followed: dict[str, str] = {}
        """What was done about each total, and whether it was told or known from elsewhere."""

    def tallyman(self, *words: str, code: int = 0) -> str:
        """What the command with these words says; it has to end with this exit code."""
        result = CliRunner().invoke(app, [*words, "-c", str(self._config)], env=self._env)
        assert result.exit_code == code, f"{' '.join(words)}: {result.exit_code}\n{result.output}"
        return result.stdout

    def lines(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        """The lines of JSON that it gives."""
        return [json.loads(line) for line in self.tallyman(*words, "--json", code=code).splitlines()]

    def parked(self) -> dict[str, dict[str, Any]]:
        """What waits for somebody, by identifier."""
        return {each["total"]["identifier"]: each for each in self.lines("parked", "list", "--limit", "0")}

    def ask(self) -> dict[str, dict[str, Any]]:
        """What is advised about each of them now. Raises ``WrongAdviceError``."""
        told = {}
        for identifier in self.parked():
            (shown,) = self.lines("parked", "show", identifier)
            advised = shown["recommendation"]
            of = shown["total"]
            told[identifier] = advised | {"places": [of["customer"], of["meter"], of["window_start"]]}
            advice, there = advised["advice"], self._at_stripe(identifier)
            self.given[advice] += 1
            if (advice == "release" and there) or (advice == "discard" and not there):
                raise WrongAdviceError(
                    f"{advice} {identifier}, which is {'' if there else 'not '}at Stripe: {advised['why']}"
                )
        return told

    def settle(self) -> None:
        """Follow all advice until there is none left to follow; then decide one that it cannot tell, and ask again."""
        while told := self.ask():
            advice = {name: each["advice"] for name, each in told.items()}
            release = [name for name, each in advice.items() if each == "release"]
            discard = [name for name, each in advice.items() if each == "discard"]
            if release or discard:
                self._decide("release", release, "told", "it is not in Stripe's sum")
                self._decide("discard", discard, "told", "it is in Stripe's sum")
            elif "wait" in advice.values():
                until = max(each.get("until") or self._now() + MINUTE for each in told.values())
                self._sleep(max(0, until - self._now()) + 1_000)
            else:
                # One of each minute: then more may be known of the others.
                for name in {json.dumps(each["places"]): name for name, each in told.items()}.values():
                    decision = ("discard", "--at-stripe") if self._at_stripe(name) else ("release",)
                    self._decide(decision[0], [name], "known", "from logs", "--despite-doubt", *decision[1:])

    def _decide(self, action: str, identifiers: list[str], how: str, why: str, *options: str) -> None:
        if identifiers:
            said = self.tallyman("parked", action, *identifiers, "--why", why, *options)
            assert "not applied yet" not in said, said
            for each in identifiers:
                assert (each, action) not in self.followed.items(), f"{each} comes back"
                self.followed[each] = f"{action} as {how}"
