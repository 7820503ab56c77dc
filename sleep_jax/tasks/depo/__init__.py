"""Depo: the node that is k hops on, along a cycle of named nodes.

The task of *Physics of Language Models*, part 4.1 (Allen-Zhu).
"""

from sleep_jax.tasks.depo.task import Depo, DepoConfig, Problem

__all__ = ["Depo", "DepoConfig", "Problem"]
