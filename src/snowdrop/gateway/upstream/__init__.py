"""The way to a replica: HTTP/1.1 over its unix socket, streams and tunnels both ways with back-pressure."""
