"""Some hundreds of seeds: whatever happens to the processes, the store, Stripe and the clocks, usage is billed once."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.__main__ import tell, traced
from tests.simulation.chaos import run
from tests.simulation.world import World

SEEDS = 250
AT_ONCE = 50


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_everything_is_billed_once_whatever_happens(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        try:
            run(seed)
        except Exception as failure:  # noqa: BLE001 - whatever breaks, the seed has to be told
            pytest.fail(tell(seed, failure), pytrace=False)


def test_a_step_of_a_year_where_requests_are_sent() -> None:
    for seed in range(30):
        run(seed, world=World(seed, wild=True))


def test_doubts_are_settled_rightly_whatever_happens() -> None:
    """By somebody who follows all advice, and looks at any moment."""
    met: Counter[str] = Counter()
    for seed in range(60):
        try:
            met += run(seed, world=World(seed, doubtful=True)).met
        except Exception as failure:  # noqa: BLE001 - whatever breaks, the seed has to be told
            pytest.fail(f"in a doubtful world, seed {seed}: {failure!r}", pytrace=False)
    assert min(met[f"advice: {each}"] for each in ("release", "discard", "wait", "cannot_tell")) > 20


def test_a_seed_repeats_itself_in_another_process() -> None:
    """A failure that does not come again cannot be understood."""
    command = [sys.executable, "-m", "tests.simulation", "--trace", "--seed"]
    for seed in (3, 8):
        traces = [
            subprocess.run(
                [*command, str(seed)], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": salt}
            ).stdout.splitlines()[:-2]
            for salt in ("1", "2")
        ]
        assert traces[0] == traces[1]
        assert len(traces[0]) > 100
        assert [line.decode() for line in traces[0]] == traced(seed)


def test_the_seeds_meet_everything() -> None:
    """A search that never meets a crash, a late commit or a doubt proves nothing about them."""
    met = sum((run(seed).met for seed in range(60)), start=run(60).met)
    wanted = [
        *(f"a commit {fate}" for fate in ("fails", "is lost", "is late", "is unknown")),
        *("crash", "pause", "stall", "cut off", "rebalance", "jump", "quiet clock", "transaction", "a slow answer"),
        *("assigned", "revoked", "lost", "lost while it is restored", "a restore is in vain"),
        *("a commit is refused", "others go on after a failed commit", "dropped with requests on their way"),
        "sent by who is no member",
        *("advice: release", "advice: discard", "advice: wait", "advice: cannot_tell", "a second writer"),
        *("Stripe away", "an answer is lost", "in doubt", "foreign", "a probe for several"),
    ]
    assert {what: met[what] for what in wanted if met[what] < 10} == {}
    assert met["not waited for any longer"], "the answers of a partition that goes are seldom so late"
