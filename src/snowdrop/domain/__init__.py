"""Frozen values, typed ids and errors: the words every other folder speaks. No I/O, no clock."""
