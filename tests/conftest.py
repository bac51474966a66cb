"""One thread, one seed, reproducible examples: a failure here fails everywhere."""

import gc
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "stable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("stable")

torch.set_num_threads(1)

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of several processes and of frameworks are marked by where they are."""
    for item in items:
        folder = item.path.relative_to(FOLDER).parts[0]
        if folder in ("distributed", "frameworks"):
            item.add_marker(folder)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Tests collect garbage often, and need not look through all that files before imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Every test starts from the same seed and leaves no default dtype behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else None)
def device(request):
    """Where a test makes its nets and data: on the CPU, and once more on a GPU if there is one."""
    if getattr(request, "param", "cpu") == "cpu":
        yield torch.device("cpu")
    else:
        with torch.device("cuda") as found:
            yield found
