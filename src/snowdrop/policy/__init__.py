"""The pure decisions, one file each: (state, now, rng) -> decision. No clock, no logging, no I/O."""
