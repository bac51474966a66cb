"""One thread, one seed, reproducible examples: a failure here fails everywhere."""

import gc

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


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """No kernels, no values read to take shorter ways, none kept: what runs is what a GPU runs."""
    monkeypatch.setattr("mkor.native.loading._kernels", None)
    monkeypatch.setattr("mkor.capture.gate.HELD", 0)
    monkeypatch.setattr("mkor.linalg.basics.readable", lambda _: False)


@pytest.fixture
def without_kernels(monkeypatch):
    """Torch's operators do everything, as where the kernels were not compiled."""
    monkeypatch.setattr("mkor.native.loading._kernels", None)


@pytest.fixture(params=["kernels", "torch"])
def both_ways(request):
    """Once as the package is installed, once as where the kernels were not compiled."""
    if request.param == "torch":
        request.getfixturevalue("without_kernels")
