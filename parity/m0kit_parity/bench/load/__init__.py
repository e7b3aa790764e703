"""A server under load: requests that come when they come, and what becomes of each."""
