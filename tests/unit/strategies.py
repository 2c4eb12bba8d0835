"""Hypothesis strategies, and how thoroughly the tests that use them search. Every run tries the same examples."""

from hypothesis import HealthCheck, settings

_ALIKE = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

THOROUGH = settings(_ALIKE, max_examples=300)
"""For a function or a single event."""
LOGS = settings(_ALIKE, max_examples=80)
"""For whole logs of events."""
