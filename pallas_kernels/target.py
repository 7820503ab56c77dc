"""The device that a function is traced for: here, or one to be compiled for."""

from typing import NamedTuple

import jax


class Target(NamedTuple):
  """What a choice between kernels depends on.

  Attributes:
    platform: as `jax.default_backend()` says it: "cpu", "gpu" or "tpu".
    kind: as `jax.Device.device_kind` says it.
    here: whether it is a device of this process, on which a kernel can have
      its trial.
  """

  platform: str
  kind: str
  here: bool


def target() -> Target:
  """The device of the mesh in context (`jax.set_mesh`), else this process's.

  A mesh of compile-only devices makes one that is not here.
  """
  kind = jax.local_devices()[0].device_kind
  meant = jax.sharding.get_abstract_mesh().abstract_device
  if meant is None or meant.device_kind == kind:
    return Target(jax.default_backend(), kind, here=True)
  platform = {"cuda": "gpu"}.get(meant.platform, meant.platform)
  return Target(platform, meant.device_kind, here=False)
