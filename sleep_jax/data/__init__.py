"""From tasks to batches: tokenizers and the input pipeline."""
