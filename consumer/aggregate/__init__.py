"""Stage 1, pure: usage events become totals, as a function of the log."""
