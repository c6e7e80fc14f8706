"""The HTTP edge: queue, admission and relay. One owner of the queues, any number of relaying workers."""
