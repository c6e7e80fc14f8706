"""Versioned messages between gateway, control, agent, replica and data plane, and the channels they travel on."""
