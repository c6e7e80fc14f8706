"""Tasks at the gateway: the way to control, and the dispatcher that carries leased ones."""
