"""What setup.cfg cannot say: the folder configs/ lies in the wheel as bpnjax/configs/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bpnjax*"]), "bpnjax.configs", "bpnjax.configs.published"],
    package_dir={"bpnjax.configs": "configs"},
)
