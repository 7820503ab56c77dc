"""Pretrained models: Hugging Face folders in, and out again."""
