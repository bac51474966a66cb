"""Everything but torch is optional, and a missing package says how to get it."""

import functools
import importlib.metadata
import re
import subprocess
import sys

import pytest

BLOCK = """
import sys
from importlib.machinery import PathFinder

class Without:
    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in BLOCKED
        return None if blocked else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without() if finder is PathFinder else finder for finder in sys.meta_path]
"""

TRAIN = """
import warnings; warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own
import importlib, io, torch, mkor
from torch import nn

assert all(getattr(mkor, name) for name in mkor.__all__)
for wrap in (mkor.MKOR, mkor.DenseMKOR, mkor.KFAC, mkor.Eva):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    base = mkor.Combined(torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01))
    optimizer = wrap(model, base, hybrid=mkor.LossRateSwitch())
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 1, 4, 4)).square().mean()
        loss.backward()
        optimizer.report_loss(loss)
        optimizer.step()
    str(optimizer.coverage()), optimizer.diagnostics()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    print(wrap.__name__)
"""

INTEGRATIONS = """
for module in ("lightning", "huggingface"):
    try:
        importlib.import_module(f"mkor.integrations.{module}")
    except ImportError as error:
        print(f"{module}: {error}")
"""


def requirements(package, seen):
    """A package and all that it cannot do without, by distribution name."""
    seen.add(package)
    for line in importlib.metadata.requires(package) or []:
        name = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        if "extra ==" in line or name in seen:
            continue
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        requirements(name, seen)
    return seen


@functools.cache
def others():
    """Names that everything but torch, its requirements and this library installs."""
    kept = requirements("torch", set()) | {"mkor"}
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not any(owner.lower().replace("_", "-") in kept for owner in owners)
    }


@pytest.fixture(scope="module", name="done")
def _done():
    """A process in which only torch and what it needs can be imported."""
    code = f"BLOCKED = {others()!r}\n{BLOCK}{TRAIN}{INTEGRATIONS}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_torch_is_the_only_requirement():
    """Of the installed package, and as the metadata has it."""
    needed = [line for line in importlib.metadata.requires("mkor") if "extra ==" not in line]
    assert len(needed) == 1
    assert needed[0].startswith("torch")


def test_every_optimizer_needs_torch_alone(done):
    """Imported, stepped, saved and loaded with no other package in reach."""
    assert {"numpy", "transformers", "lightning"} <= others()
    assert not {"torch", "typing_extensions", "mkor"} & others()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == ["MKOR", "DenseMKOR", "KFAC", "Eva"]


@pytest.mark.parametrize(
    ("module", "package"), [("lightning", "lightning"), ("huggingface", "transformers")]
)
def test_an_integration_needs_its_framework(module, package, done):
    """It is the framework that is missing, and the error names it."""
    assert f"{module}: No module named '{package}" in done.stdout
