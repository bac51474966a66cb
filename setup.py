"""What pyproject.toml cannot say: the kernels, without which the package works all the same."""

from setuptools import Extension, setup

KERNELS = Extension(
    "mkor.native._kernels",
    ["src/mkor/native/kernels.c"],
    extra_compile_args=["-O3"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[KERNELS], options={"bdist_wheel": {"py_limited_api": "cp310"}})
