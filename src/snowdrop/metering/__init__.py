"""Usage: facts from the first day, numbered in a durable journal, counted once."""
