"""What was computed of documents and is kept: in memory, on disk."""
