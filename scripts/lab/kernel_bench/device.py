"""The device that is measured. Import this before anything that imports Triton.

It also finds the package where it is not installed: most rows need torch and triton alone.
"""

import importlib.util
import os
import sys

import torch

from lab.places import ROOT

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("vllm_kvcompress") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("vllm_kvcompress.kernels") is None:
    import vllm_kvcompress

    vllm_kvcompress.__path__.append(str(ROOT))  # an installation maps kernels/ into the package
