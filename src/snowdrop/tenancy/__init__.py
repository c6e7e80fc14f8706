"""Tenants and who speaks for them: API keys now; quota and network rules later."""
