"""What a model is worth: perplexity, speed, size."""
