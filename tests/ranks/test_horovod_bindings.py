"""Bindings that this build of Horovod does not have say so in one line (patch 88)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from tests.support.limits import stretch

MISSING = {
    "tensorflow": "this build of Horovod has no TensorFlow binding; for torch: horovod.torch",
    "tensorflow.keras": "this build of Horovod has no TensorFlow binding; for torch: horovod.torch",
    "keras": "this build of Horovod has no TensorFlow binding; for torch: horovod.torch",
    "mxnet": "this build of Horovod has no MXNet binding; for torch: horovod.torch",
    "spark": "horovod.spark needs pyspark, which is not installed: pip install pyspark",
    "ray": "horovod.ray needs ray, which is not installed: pip install ray",
}
IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"horovod.{name}")
    except ImportError as error:
        print(error)
    else:
        print("imported")
assert not {"keras", "tensorflow", "torch"} & set(sys.modules), "imported first what takes seconds"
"""


def test_missing_bindings_are_named_in_one_line() -> None:
    names = [name for name in MISSING if name not in ("spark", "ray") or not is_installed(name)]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *names], capture_output=True, text=True, timeout=stretch(60), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [MISSING[name] for name in names]


def is_installed(name: str) -> bool:
    """Whether the package that a binding needs is there."""
    return importlib.util.find_spec({"spark": "pyspark"}.get(name, name)) is not None
