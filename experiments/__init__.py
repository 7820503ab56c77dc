"""Experiments: configs, and what runs and draws them."""
