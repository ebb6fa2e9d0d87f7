"""What setup.cfg cannot say: the addresses, and that configs/ lies in the wheel."""

import pathlib
import re

from setuptools import find_packages, setup

URL = "https://github.com/OWNER/bpnjax"  # the only place: put the address of the repository here

README = (pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8")
# Links and images of README lead to files of the repository, which a package index does not have.
README = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{URL}/raw/main/", README)
README = re.sub(r"((?<!!)\[[^\]!]*\]\()(?![a-z]+:|#)", rf"\1{URL}/blob/main/", README)

setup(
    packages=[*find_packages(include=["bpnjax*"]), "bpnjax.configs", "bpnjax.configs.published"],
    package_dir={"bpnjax.configs": "configs"},
    url=URL,
    project_urls={
        "Source": URL,
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
    },
    long_description=README,
    long_description_content_type="text/markdown",
)
