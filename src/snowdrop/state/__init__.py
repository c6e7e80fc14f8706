"""Durable state behind one port: a memory fake and SQLite, held to one contract suite."""
