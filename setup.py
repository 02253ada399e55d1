"""The one thing pyproject.toml cannot say: the extension carries a digest of what it was built from.

It is optional. Without a compiler or Python's headers the rest is installed, and the protobuf fold runs.
FOLD_CFLAGS adds flags for the compiler and the linker, such as a sanitizer's.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup

DECODE = Path("proxy_usage/decode")
digest = runpy.run_path(str(DECODE / "source_digest.py"))["source_digest"]
flags = os.environ.get("FOLD_CFLAGS", "").split()

setup(
    ext_modules=[
        Extension(
            "proxy_usage.decode._fold",
            sources=sorted(str(path) for path in (DECODE / "native").glob("*.c")),
            depends=sorted(str(path) for path in (DECODE / "native").glob("*.h")),
            define_macros=[("FOLD_DIGEST", f'"{digest(DECODE / "native")}"')],
            extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", *flags],
            extra_link_args=flags,
            optional=True,
        )
    ]
)
