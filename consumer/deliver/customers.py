"""Who a customer is at Stripe, as the delivery of totals sees it."""

from typing import Protocol


class UnmappedError(LookupError):
    """Nobody has said who this customer is at Stripe; the total waits until somebody does."""


class LookupFailedError(Exception):
    """It could not be found out now; that says nothing about the customer."""


class Customers(Protocol):
    """The mapping from the customers of the events to Stripe's."""

    def stripe_customer(self, name: str) -> str | None:
        """The Stripe customer, or None for a customer who is not billed.

        Raises ``UnmappedError`` where the mapping does not know the name, ``LookupFailedError`` where it cannot
        tell now.
        """
