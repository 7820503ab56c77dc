"""Packaging: lower bounds here, the tested versions in constraints/."""

from setuptools import find_packages, setup

setup(
  name="sleep_jax",
  version="0.1.0",
  description=(
    "Sleep for language models in JAX: offline passes that consolidate an "
    "evicted context into fast weights."
  ),
  license="Apache-2.0",
  packages=find_packages(
    include=[
      f"{top}{rest}"
      for top in ("sleep_jax", "pallas_kernels", "experiments")
      for rest in ("", ".*")
    ]
  ),
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.3",
    "etils>=1.13",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3.9",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "scipy>=1.13",
    "tqdm>=4.67",
  ],
  extras_require={
    # Figures.
    "plots": ["matplotlib>=3.10"],
    # Weights and tokenizers in Hugging Face's file formats.
    "hf": ["safetensors>=0.6", "tokenizers>=0.22"],
    "tensorboard": ["tensorboardX>=2.6"],
    "notebooks": ["ipykernel>=6.30", "nbclient>=0.10", "nbformat>=5.10"],
    # To run on an accelerator.
    "tpu": ["jax[tpu]"],
    "cuda13": ["jax[cuda13]"],
    # To compile for an accelerator that is not there: the TPU compiler, the
    # CUDA plug-in without CUDA's libraries, and ptxas.
    "compile": ["jax-cuda13-plugin", "libtpu", "nvidia-cuda-nvcc>=13"],
    "dev": [
      "beartype>=0.22",
      "pyrefly>=1.0",
      "pytest>=9.0",
      "pytest-xdist>=3.8",
      "ruff>=0.17",
    ],
  },
)
