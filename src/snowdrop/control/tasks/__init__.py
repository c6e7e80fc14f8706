"""Durable tasks: the queue, its API, its files and webhooks."""
