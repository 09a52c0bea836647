"""Gives the wheel its tag: any Python 3, and programs for Linux with glibc 2.28 or newer on x86-64."""

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class Programs(Distribution):
    """A distribution with compiled files in it."""

    def has_ext_modules(self) -> bool:
        """Return that it belongs with the files of one platform."""
        return True


class Wheel(bdist_wheel):
    """A wheel whose programs depend on the platform, and on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag; tools/wheel.py checks that it is true."""
        return "py3", "none", "manylinux_2_28_x86_64"


setup(distclass=Programs, cmdclass={"bdist_wheel": Wheel}, scripts=["scripts/flightsvc"])
