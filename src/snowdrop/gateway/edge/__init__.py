"""What surrounds the relay at the edge: listeners, TLS, HTTP/2, websockets, observation, metrics."""
