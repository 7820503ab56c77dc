"""The sleep of a whole window, N passes over all blocks, in one kernel."""
