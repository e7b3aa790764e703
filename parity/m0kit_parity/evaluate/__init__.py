"""What fewer bits cost in ranking quality."""
