"""The local rules by which fast weights learn, in one registry.

To try one of your own, write its token recurrence, register it in the file that
`--config` names, and train with `--config.model.update_rule=mine`:

  UPDATE_RULES["mine"] = UpdateRule(update, decay="head")

Without a chunkwise form it runs one token after the other.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.gated_delta import api, chunked_xla, reference

DECAYS = ("head", "channel", "fixed", "none")


@dataclasses.dataclass(frozen=True)
class UpdateRule:
  """A rule, its decay, and if there is one its chunkwise form.

  Attributes:
    update: (S, k, v, g, beta) -> S for one token, as in
      `reference.scan_tokens`.
    decay: what g is made from: "head", a number for each head and token;
      "channel", one for each key channel too; "fixed", a number for each head
      that no token changes; "none", g = 0.
    chunkwise: (q, k, v, g, beta, S) -> (o, S), or None.
    kernels: `chunkwise` takes `implementation`, as `api.gated_delta_rule`.
  """

  update: Callable
  decay: str = "head"
  chunkwise: Callable | None = None
  kernels: bool = False

  def __post_init__(self):
    if self.decay not in DECAYS:
      raise ValueError(f"decay = {self.decay!r}: one of {DECAYS}")

  @property
  def implementations(self) -> list[str]:
    """The names that `__call__` takes: the first needs nothing else."""
    if self.kernels:
      return list(api.IMPLEMENTATIONS)
    return ["reference", *(["chunked_xla"] if self.chunkwise else [])]

  def __call__(
    self, q, k, v, g, beta, initial_state, implementation: str | None = None
  ):
    """Returns (o, final_state) as `api.gated_delta_rule`, g as `decay` says.

    Raises:
      ValueError: as `api.gated_delta_rule`, or a form that the rule lacks.
    """
    if implementation not in (None, *self.implementations):
      raise ValueError(
        f"implementation = {implementation!r}: this rule has "
        f"{self.implementations}"
      )
    q, k = api.check_and_group(q, k, v, g, beta, initial_state)
    arrays = q, k, v, g, beta, initial_state
    if implementation == "reference" or self.chunkwise is None:
      return reference.scan_tokens(self.update, *arrays)
    if self.kernels:
      return self.chunkwise(*arrays, implementation=implementation)
    return self.chunkwise(*arrays)


def _delta(state, k, v, g, beta):
  """S <- S + beta k (v - S^T k)^T: nothing is forgotten but by correction."""
  return reference.gated_delta(state, k, v, jnp.zeros_like(g), beta)


def _delta_chunkwise(q, k, v, g, beta, initial_state, implementation):
  return api.gated_delta_rule(
    *(q, k, v, jnp.zeros_like(g), beta, initial_state),
    implementation=implementation,
  )


_hebbian_chunkwise = functools.partial(chunked_xla.chunked_rule, delta=False)

UPDATE_RULES = {
  # Paper, equation (3); the recurrence of Mamba2.
  "hebbian": UpdateRule(reference.hebbian, chunkwise=_hebbian_chunkwise),
  # The same with a decay that no token changes.
  "fixed_decay": UpdateRule(
    reference.hebbian, decay="fixed", chunkwise=_hebbian_chunkwise
  ),
  # DeltaNet.
  "delta": UpdateRule(
    _delta, decay="none", chunkwise=_delta_chunkwise, kernels=True
  ),
  # Gated DeltaNet: the paper's experiments.
  "gated_delta": UpdateRule(
    reference.gated_delta, chunkwise=api.gated_delta_rule, kernels=True
  ),
  # Kimi Delta Attention: a decay for each key channel.
  "kda": UpdateRule(
    reference.gated_delta,
    decay="channel",
    chunkwise=functools.partial(chunked_xla.chunked_rule, delta=True),
  ),
}
