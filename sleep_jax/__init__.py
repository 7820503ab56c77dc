"""Language models that sleep: offline recurrence over an evicted context."""
