"""The bundled reference model: its corpus, its tokenizer and its training."""
