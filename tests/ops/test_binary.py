"""What the compiled operators ask of others: so one wheel serves every Python, and every torch since 2.10."""

import zipfile
from pathlib import Path

import pytest

import batchnorm
from batchnorm.ops.cpu import COMPILED

pytest.importorskip("torch_abi_audit", reason="torch-abi-audit needs Python 3.11")
import audit

pytestmark = [
    pytest.mark.processes,  # nm
    pytest.mark.skipif(not COMPILED, reason="installed without a compiler"),
]


def test_it_uses_torchs_stable_functions_alone():
    assert "none of Python" in audit.audit(Path(batchnorm.__file__).parent)


@pytest.mark.parametrize(
    ("symbol", "wrong"),
    [
        ("PyObject_Call", True),
        ("_PyObject_New", True),
        ("at::_ops::add_Tensor::call(at::Tensor const&)", True),
        ("typeinfo for c10::Error", True),
        ("aoti_torch_get_dim", False),
        ("torch_parallel_for", False),
        ("std::runtime_error::~runtime_error()", False),
    ],
)
def test_what_is_forbidden(symbol, wrong):
    assert bool(audit.FORBIDDEN.match(symbol)) == wrong


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("batchnorm-1-py3-none-any.whl", ["batchnorm/_C.so"], "named for the other kind"),
        ("batchnorm-1-py3-none-linux_x86_64.whl", ["batchnorm/__init__.py"], "named for the other kind"),
        ("batchnorm-1-cp310-abi3-linux_x86_64.whl", ["batchnorm/_C.so"], "for every Python"),
    ],
)
def test_a_wheel_is_named_for_what_it_holds(tmp_path, name, files, said):
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        for file in files:
            wheel.writestr(file, "")
    with pytest.raises(AssertionError, match=said):
        audit.main([str(tmp_path / name)])
