"""What only a GPU can show, by one command: numbers, memory and speed of an artifact there, beside transformers."""
