"""Stage 2, pure: what becomes of a total until it is delivered or finished otherwise."""
