"""Usage events on Kafka become Stripe Meter Events, exactly once."""

__version__ = "0.1.0"
