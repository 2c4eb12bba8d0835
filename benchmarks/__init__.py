"""Speed, as ratios to a baseline in the same run: these machines are noisy, absolute numbers mean little."""
