"""Calls between services: the door that replicas come in by, each on connections of its own."""
