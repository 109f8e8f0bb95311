"""A library's torch.compile is kept from fetching its compiler; a user's is not."""

import subprocess
import sys

CODE = """
import os, sys
from dsft.imports import DISABLE, uncompiled
with uncompiled():
    import bitsandbytes
assert "torch._inductor.compile_fx" not in sys.modules
assert DISABLE not in os.environ
import torch
plain = lambda x: x
with uncompiled():
    assert torch.compile(plain) is plain
assert torch.compile(plain) is not plain
assert "torch._inductor.compile_fx" in sys.modules
"""


def test_a_library_fetches_no_compiler_and_a_user_has_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
