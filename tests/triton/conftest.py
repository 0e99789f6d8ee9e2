"""Where no GPU is, the kernels run in Triton's interpreter, in a process of its own: TRITON_INTERPRET=1 pytest ..."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        compiles = item.path.name == "test_triton_gpu.py"
        if not str(item.path).startswith(here) or compiles != INTERPRETED:
            continue
        needed = "needs TRITON_INTERPRET unset" if INTERPRETED else "needs TRITON_INTERPRET=1, in a process of its own"
        item.add_marker(pytest.mark.skip(reason=needed))
