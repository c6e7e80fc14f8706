"""The daemon of one node: sandboxes, replicas, content. Control tells it what to start and drain."""
