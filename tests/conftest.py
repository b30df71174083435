"""Tests run on eight emulated CPU devices, always."""

import os

# Before the first JAX import: eight devices on one CPU, no GPU or TPU probing.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
