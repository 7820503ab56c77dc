"""The hybrid language model."""
