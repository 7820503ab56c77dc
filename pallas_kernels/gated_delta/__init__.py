"""The gated delta rule: one door (`api`) to every implementation."""
