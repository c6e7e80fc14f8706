"""What runs inside the sandbox: lifecycle stages, bounded concurrency, the service's HTTP face."""
