"""What isolates and limits a replica: the launcher port, its implementations, limits and system call filters."""
