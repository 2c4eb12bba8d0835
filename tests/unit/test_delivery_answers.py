"""What each answer proves."""

import pytest

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected, Verdict, judge, throttled
from tests.unit.delivery_world import BROKEN, BUSY, NO_METER, OK, REFUSED, UNAUTHORISED, duplicate

INVALID = "invalid_request_error"


@pytest.mark.parametrize(
    ("heard", "verdict", "left_nothing"),
    [
        (OK, Verdict.DELIVERED, False),
        (Answer(201, replayed=True), Verdict.DELIVERED, False),
        (duplicate("tm1-x"), Verdict.DUPLICATE, False),
        (Answer(409, INVALID, message="An event already exists with identifier tm1-x."), Verdict.DUPLICATE, False),
        (BUSY, Verdict.BUSY, True),
        (Answer(429, INVALID, "rate_limit", limited="global-rate"), Verdict.BUSY, True),
        (Answer(409, "idempotency_error", "idempotency_key_in_use"), Verdict.BUSY, True),
        (Answer(400, "idempotency_error"), Verdict.MISMATCH, True),
        (REFUSED, Verdict.REFUSED, True),
        (
            Answer(400, INVALID, message="The event timestamp cannot be more than 35 days"),
            Verdict.REFUSED,
            True,
        ),
        (Answer(400, INVALID, message="No such customer: 'No such meter'"), Verdict.REFUSED, True),
        (NO_METER, Verdict.METER_REFUSED, True),
        (Answer(400, INVALID, "archived_meter", "This meter is archived"), Verdict.METER_REFUSED, True),
        (UNAUTHORISED, Verdict.UNAUTHORISED, True),
        (Answer(403, INVALID), Verdict.UNAUTHORISED, True),
        (NeverConnected("name not known"), Verdict.ABSENT, True),
        (Lost("timeout"), Verdict.UNPROVEN, False),
        (BROKEN, Verdict.UNPROVEN, False),
        (Answer(503), Verdict.UNPROVEN, False),
        (Answer(302), Verdict.UNPROVEN, False),
    ],
)
def test_the_table_of_answers(heard: Heard, verdict: Verdict, *, left_nothing: bool) -> None:
    """Only what Stripe says definitely is believed."""
    assert judge(heard) is verdict
    assert verdict.left_nothing is left_nothing


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 429, 499])
def test_a_refusal_that_is_not_stripes_proves_nothing(status: int) -> None:
    """A proxy may have given up on a request that arrived, or not have let the answer through."""
    assert judge(Answer(status)) is Verdict.UNPROVEN


def test_an_error_of_a_kind_that_stripe_has_not_is_a_gateways() -> None:
    """Others have error objects, too."""
    assert judge(Answer(404, "not_found", message="no route")) is Verdict.UNPROVEN


def test_a_limiter_that_names_itself_is_stripes() -> None:
    """Also where it says nothing else."""
    assert judge(Answer(429, limited="global-rate")) is Verdict.BUSY


def test_a_replayed_refusal_is_about_an_earlier_attempt() -> None:
    """The customer may have been repaired since; a fresh key finds out."""
    assert judge(Answer(400, INVALID, message="No such customer: 'cus_x'", replayed=True)) is Verdict.UNPROVEN


def test_a_refusal_that_stripe_asks_to_retry_is_not_final() -> None:
    """The header knows more than the status."""
    assert judge(Answer(400, INVALID, message="Try again", should_retry=True)) is Verdict.UNPROVEN


@pytest.mark.parametrize(
    ("heard", "too_fast"),
    [
        (Answer(429, INVALID, "rate_limit", limited="global-rate"), True),
        (Answer(429, INVALID), True),
        (Answer(429, INVALID, "lock_timeout"), False),
        (Answer(429, INVALID, limited="resource-specific"), False),
        (Answer(409, INVALID), False),
        (OK, False),
        (Lost(), False),
    ],
)
def test_contention_for_one_customer_does_not_slow_down_everybody(heard: Heard, *, too_fast: bool) -> None:
    """A lock that times out is no rate limit."""
    assert throttled(heard) is too_fast
