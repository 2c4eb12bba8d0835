"""A deterministic simulation: the real cores under a seeded scheduler, with virtual clocks, a store, groups and Stripe.

Everything that can happen between two effects does, somewhere in a few hundred seeds; a seed repeats itself exactly.
"""
