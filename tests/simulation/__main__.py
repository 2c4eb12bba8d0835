"""``python -m tests.simulation --seeds 10000``, or ``--seed N --trace`` to see how one of them went."""

import argparse
import sys
import time
import traceback
from collections import Counter
from contextlib import nullcontext, suppress

from tests.simulation.chaos import run
from tests.simulation.faults import FAULTS
from tests.simulation.world import World


def main() -> int:
    """Run seeds; 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--trace", action="store_true", help="show everything that happened")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first failure")
    parser.add_argument("--fault", choices=[each.name for each in FAULTS], help="with this fault put in")
    parser.add_argument("--wild", action="store_true", help="years' steps also of the clocks by which is sent")
    parser.add_argument("--doubtful", action="store_true", help="worlds in which much is in doubt")
    given = parser.parse_args()
    with next((each.put() for each in FAULTS if each.name == given.fault), nullcontext()):
        return search(given)


def search(given: argparse.Namespace) -> int:
    """Run the seeds that are asked for."""
    seeds = range(given.first, given.first + given.seeds) if given.seed is None else [given.seed]
    began, done, failed = time.monotonic(), 0, 0
    met: Counter[str] = Counter()
    for seed in seeds:
        done += 1
        try:
            met += run(seed, world=World(seed, wild=given.wild, doubtful=given.doubtful)).met
        except Exception as failure:  # noqa: BLE001 - whatever breaks is what is looked for
            failed += 1
            print(tell(seed, failure, given))
            if not given.keep_going:
                break
        else:
            if given.trace:
                print(*traced(seed, wild=given.wild, doubtful=given.doubtful), sep="\n")
    took = time.monotonic() - began
    print(f"{done} seeds in {took:.1f} s, {done / took:.0f} a second; {failed} failed")
    print(", ".join(f"{what}: {times}" for what, times in sorted(met.items())))
    return 1 if failed else 0


def traced(seed: int, *, wild: bool = False, doubtful: bool = False) -> list[str]:
    """What happened in a run, which is the same each time."""
    world = World(seed, trace=True, wild=wild, doubtful=doubtful)
    with suppress(Exception):
        run(seed, world=world)
    return world.trace or []


def tell(seed: int, failure: Exception, given: argparse.Namespace | None = None) -> str:
    """How a seed failed: the end of its trace, the failure, and how to see it again."""
    whole, wild, doubtful, fault = (
        (given.trace, given.wild, given.doubtful, given.fault) if given else (False, False, False, None)
    )
    options = " --wild" * wild + " --doubtful" * doubtful + (f' --fault "{fault}"' if fault else "")
    lines = traced(seed, wild=wild, doubtful=doubtful)
    return "\n".join(
        [
            *(lines if whole else lines[-25:]),
            *traceback.format_exception(failure)[-3:],
            f"seed {seed} failed: {type(failure).__name__}: {failure}",
            f"see all of it: python -m tests.simulation --seed {seed} --trace{options}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
