"""The artifact: a folder with graphs, tokenizer and manifest; its form, where it comes from, whose it is."""
