"""The shell: Kafka, HTTP, Stripe and clocks around the two pure stages."""
