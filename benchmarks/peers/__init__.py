"""What Snowdrop is compared with."""
