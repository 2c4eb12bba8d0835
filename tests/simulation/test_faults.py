"""A search that finds nothing proves nothing: every deliberate fault has to be noticed, and soon."""

import pytest

from tests.simulation.chaos import run
from tests.simulation.faults import FAULTS, Fault
from tests.simulation.world import World


@pytest.mark.parametrize("fault", FAULTS, ids=[each.name.replace(" ", "-") for each in FAULTS])
def test_a_fault_is_noticed(fault: Fault) -> None:
    with fault.put():
        for seed in range(fault.within):
            try:
                run(seed, world=World(seed, doubtful=fault.doubtful, features=fault.features))
            except (AttributeError, NameError, TypeError):
                raise  # the fault itself is wrong
            except Exception:  # noqa: BLE001 - a violation, or a core that notices by itself
                return
    pytest.fail(f"{fault.within} seeds have not noticed: {fault.story}")


def test_faults_leave_nothing_behind() -> None:
    """A patch that stays would make every later test one of the fault's."""
    for fault in FAULTS:
        with fault.put():
            pass
    for seed in range(3):
        run(seed)
