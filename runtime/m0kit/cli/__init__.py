"""The `m0kit` command."""
