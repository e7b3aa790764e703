"""The small trained checkpoint: its tokenizer, generated corpus, pages, training and evaluation."""
