"""How it is built; what it is made of stands in setup.cfg. Needs setuptools 70.1 or later.

With SOURCE_DATE_EPOCH set, two builds of a commit by the same setuptools are equal byte for byte, wherever and by whom
they are made. A release, from a fresh clone, in the environment and with its setuptools (no lock has `build`):

    SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) python -m build --no-isolation
"""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

EPOCH = os.environ.get("SOURCE_DATE_EPOCH")


class Source(sdist):
    """setuptools lets SOURCE_DATE_EPOCH govern the wheel alone: here also the archive of the source has its times from
    there, and neither an owner nor the permissions of whoever built it."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if EPOCH is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime = int(EPOCH)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() else 0o644
            return member

        self.mkpath(self.dist_dir)
        name = f"{base_name}.tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(EPOCH)) as packed,
            tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=anonymous)
        return name


class Wheel(bdist_wheel):
    """Without the permissions that the umask of whoever built it left."""

    def write_wheelfile(self, *arguments, **options):
        super().write_wheelfile(*arguments, **options)  # the last file: all that is packed lies in bdist_dir now
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


setup(cmdclass={"sdist": Source, "bdist_wheel": Wheel})
