"""The data plane: content of one node in a process of its own, so that nobody else's code holds up its bytes."""
