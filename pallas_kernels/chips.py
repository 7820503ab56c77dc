"""What is known of the accelerators that we compile for."""

import importlib.util
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """A JAX device: its kind, and a topology to compile for; what it can do.

  HBM and links by the makers' pages on each generation (Cloud TPU); v4's links
  by Jouppi et al., 2023: six of 50 GB/s. Of two directions, one counts.
  """

  # `jax.Device.device_kind`.
  kind: str
  topology: str
  gigahertz: float
  cores: int
  # Matrix units of a core, and their side A; clock x units x A^2 x 2 fits the
  # makers' peaks in bfloat16.
  units: int
  side: int
  gigabytes_per_second: float
  gibibytes: int
  links_gigabytes_per_second: float

  @property
  def teraflops(self) -> float:
    """Of all matrix units, in bfloat16."""
    return 2e-3 * self.gigahertz * self.cores * self.units * self.side**2


CHIPS = {
  "v4": Chip("TPU v4", "v4:2x2x1", 1.05, 2, 4, 128, 1228, 32, 300),
  "v5e": Chip("TPU v5 lite", "v5e:2x2", 1.5, 1, 4, 128, 819, 16, 200),
  "v5p": Chip("TPU v5", "v5p:2x2x1", 1.75, 2, 4, 128, 2765, 95, 600),
  "v6e": Chip("TPU v6 lite", "v6e:2x2", 1.75, 1, 4, 256, 1640, 32, 400),
  # A device is one of the chip's two cores.
  "tpu7x": Chip("TPU7x", "tpu7x:2x2x1", 2.2, 1, 4, 256, 3690, 96, 300),
}
# SXM, by NVIDIA's data sheet: FLOPs a second in bfloat16.
H100_FLOPS = 989e12
# What XLA asks about one.
H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472
threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
registers_per_block_limit: 65536 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3" """


def check_compiler(target: str) -> None:
  """ValueError where the compiler of "h100", or of TPUs, is not installed."""
  module = "jax_plugins.xla_cuda13" if target == "h100" else "libtpu"
  # Of a package that is not there a module cannot be asked for.
  names = module.partition(".")[0], module
  if not all(importlib.util.find_spec(name) for name in names):
    raise ValueError(f"{module} is missing: pip install -e '.[compile]'")


def compile_only_devices(target: str, **options: Any) -> list:
  """Devices that need not be there, to compile for.

  Args:
    target: "h100", one of CHIPS, or a TPU topology such as "v5e:4x4".
    options: of a TPU topology.

  Raises:
    ValueError: their compiler is not installed.
  """
  check_compiler(target)
  # Not above: who compiles sets the environment before JAX is imported.
  import jax
  from jax.experimental import topologies

  if target == "h100":
    jax.local_devices()  # finds the plug-in
    topology = topologies.get_topology_desc(
      platform="cuda", target_config=H100, topology="1x1x1"
    )
  else:
    name = CHIPS[target].topology if target in CHIPS else target
    topology = topologies.get_topology_desc(name, platform="tpu", **options)
  return topology.devices


def peak_flops(kind: str) -> float | None:
  """FLOPs a second in bfloat16 of a kind of device; None of one unknown."""
  if "H100" in kind:
    return H100_FLOPS
  for chip in CHIPS.values():
    if chip.kind == kind:
      return 1e12 * chip.teraflops
  return None
