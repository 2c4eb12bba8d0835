"""What the demo and the tests need: an embedded broker, a Stripe stand-in, traffic and its oracle."""
