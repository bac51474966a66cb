"""What pyproject.toml cannot say: the kernels, without which the package works all the same."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path("src/mkor/native")
KERNELS = Extension(
    "mkor.native._kernels",
    sorted(map(str, HERE.glob("*.c"))),
    depends=sorted(map(str, HERE.glob("*.h"))),
    extra_compile_args=["-O3"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[KERNELS], options={"bdist_wheel": {"py_limited_api": "cp310"}})
