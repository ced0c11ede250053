"""LightningModules around Hugging Face MoE models."""
