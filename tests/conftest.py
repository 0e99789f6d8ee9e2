"""Every test starts from one seed and fills unwritten memory with NaN, so that a value never written shows."""

import pytest
import torch

from ilnas_kernels import instruction_set, instruction_sets


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(20)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """No test reads or writes the crossovers of the user's machine."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setenv("XDG_CACHE_HOME", folder)
        patch.setenv("LOCALAPPDATA", folder)
        patch.setenv("HOME", folder)
        yield


@pytest.fixture(params=sorted(name for name, runs in instruction_sets().items() if runs))
def isa(request):
    """Each instruction set that is compiled in and runs here."""
    with instruction_set(request.param):
        yield request.param
