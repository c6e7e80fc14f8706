"""What brings the platform's processes and nodes about: `local` runs all of it on one machine."""
