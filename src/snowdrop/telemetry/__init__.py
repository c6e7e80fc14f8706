"""What the platform tells those who run it: request records, traces, structured logs, metrics."""
