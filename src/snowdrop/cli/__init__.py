"""The `snowdrop` command: a client of control's API and of the gateway, and the start and stop of the platform."""
