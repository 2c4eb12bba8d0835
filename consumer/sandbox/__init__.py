"""What the demo and the tests need: brokers, a Stripe stand-in, traffic and what it has to bill."""
