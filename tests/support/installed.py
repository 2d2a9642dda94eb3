"""What an installed package does with nothing but what it requires, in an environment that has torch.

python tests/support/installed.py WHEEL...         installs each in this Python, and tries it
python tests/support/installed.py compiled|pure    tries what is installed
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path


def check(kind: str) -> None:
    """Try the installed package, which should be of that kind."""
    import batchnorm as bn

    assert "torch" not in sys.modules, "import batchnorm should not import torch"
    assert "site-packages" in bn.__file__, f"this is not the installed package: {bn.__file__}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = bn.BatchNorm2d(5, activation="relu")
    pure = [str(warning.message) for warning in caught if "without its compiled operators" in str(warning.message)]
    assert len(pure) == (kind == "pure"), f"the {kind} package says {pure}"

    import torch

    (cpu, *_) = bn.backends().rows
    assert cpu.on == (kind == "compiled"), cpu
    x = torch.randn(4, 5, 6, 7) + 1000
    exact = torch.nn.Sequential(torch.nn.BatchNorm2d(5), torch.nn.ReLU()).double()
    inputs = x.requires_grad_(), x.detach().double().requires_grad_()
    outputs = layer(inputs[0]), exact(inputs[1])
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    # Without our operators torch's own are used, which lose digits to the mean.
    tolerance = 1e-5 if kind == "compiled" else 1e-2
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, rtol=0, atol=tolerance)

    with tempfile.TemporaryDirectory() as folder:
        with bn.watch(layer, folder):
            layer(torch.randn(4, 5, 6, 7))
        command = Path(sysconfig.get_path("scripts")) / "batchnorm"
        said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
        subprocess.run([command, "show", folder], capture_output=True, check=True)
    print(f"{said.strip()}, {kind}, torch {torch.__version__}, Python {sys.version.split()[0]}: works")


def install(wheel: str) -> None:
    """Put the wheel in the place of what is there."""
    pip = sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"
    subprocess.run([*pip, "uninstall", "--yes", "batchnorm"], check=True)
    subprocess.run([*pip, "install", wheel], check=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument in ("compiled", "pure"):
            check(argument)
        else:
            install(argument)
            kind = "pure" if argument.endswith("-none-any.whl") else "compiled"
            subprocess.run([sys.executable, __file__, kind], check=True)
