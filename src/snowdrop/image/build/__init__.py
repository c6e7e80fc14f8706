"""Images made from a description, without a container engine: a base, packages from a lock, copied files."""
