"""Package gpt4moe: `pip install -e .` brings what training, generation and serving need on a CPU."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "gpt4moe/__init__.py").read_text())[1]

setup(
    name="gpt4moe",
    version=VERSION,
    description="A JAX/Flax research framework for GPT-4-style sparse mixture-of-experts transformers",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gpt4moe", "gpt4moe.*", "gin_configs", "gin_configs.*"]),
    package_data={
        "gpt4moe.analysis": ["*.html"],
        "gpt4moe.infer": ["*.cc"],
        "gpt4moe.serve": ["*.html"],
        "gpt4moe.plan.article": ["*.csv"],
        "gpt4moe.plan.published": ["*.csv"],
        "gin_configs": ["*/*.gin"],
    },
    install_requires=[
        "jax>=0.10.2,<0.12",
        "numpy>=2.0",
        "scipy>=1.14",
        "flax>=0.12.6",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "grain>=0.2.15",
        "jaxtyping>=0.3",
        "gin-config==0.5.0",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "tiktoken>=0.9",
        "etils[epath]>=1.12",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "pillow>=11",
        "pyarrow>=16",
        "rich>=13",
        "submitit>=1.5",
        "zstandard>=0.22",
        "starlette>=0.40",
        "uvicorn>=0.30",
        "pydantic>=2.12",
        "jinja2>=3.1",
        "prometheus-client>=0.21",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "gcs": ["etils[epath-gcs]>=1.12"],  # gs:// work directories and sources
        "tpu-compile": ["libtpu>=0.0.52"],  # the TPU compiler: `gpt4moe compile` needs no TPU
        "json": ["llguidance>=1.0"],  # continuations that follow a JSON schema
        "bench": ["torch>=2.9", "transformers>=5.0"],  # the peer of benchmarks with --peers, nothing else
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "beartype>=0.19",
            "libtpu>=0.0.52",
            "llguidance>=1.0",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "openai>=2",
            "httpx2>=2.12",
            "schemathesis>=4.30",
        ],
    },
    entry_points={"console_scripts": ["gpt4moe=gpt4moe.launch:main"]},
)
