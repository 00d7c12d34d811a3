"""JAX and TensorFlow next to torch: who imports what first, forks, threads and GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvdtrain.bridge.process import choose_foreign_device, choose_tensorflow_device, configure_jax
from hvdtrain.comm.world import World
from hvdtrain.exchange.buckets import matrix_shape
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.step_options import DeviceOptions
from hvdtrain.system.errors import UserError
from tests.support.limits import stretch

WORLD = World(0, 2, 0, 2, "host")


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with modules tensorflow and triton that print when they are imported."""
    for name in ("tensorflow", "triton"):
        (tmp_path / f"{name}.py").write_text(f"print('import {name}')\n")
    return tmp_path


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=stretch(60))
    assert done.returncode == 0, done.stderr
    return done.stdout


GUARD = "from hvdtrain.system.other_frameworks import guard_tensorflow_import as guard\n"


def test_whoever_imports_tensorflow_gets_triton_first(stubs: Path) -> None:
    assert run_python(f"{GUARD}guard(); guard()\nimport tensorflow, tensorflow", stubs) == (
        "import triton\nimport tensorflow\n"
    )


def test_triton_is_not_imported_without_tensorflow(stubs: Path) -> None:
    assert run_python(f"{GUARD}guard()\nimport json", stubs) == ""


def test_triton_is_declared_missing_if_tensorflow_came_first(stubs: Path) -> None:
    code = f"import tensorflow\n{GUARD}guard()\ntry:\n    import triton\nexcept ImportError: print('missing')"
    assert run_python(code, stubs) == "import tensorflow\nmissing\n"


def test_a_recipes_file_gets_triton_before_tensorflow(stubs: Path) -> None:
    (stubs / "mine.py").write_text("import tensorflow\n")
    code = "from pathlib import Path\nfrom hvdtrain.recipe.source import import_source, read_source\n"
    found = run_python(f"{code}import_source(read_source(Path('mine.py')))", stubs)
    assert found == "import triton\nimport tensorflow\n"


def test_tensorboard_is_kept_from_tensorflow_only_within_the_block(stubs: Path) -> None:
    code = """
import sys
from hvdtrain.system.other_frameworks import tensorboard_without_tensorflow
with tensorboard_without_tensorflow():
    from torch.utils.tensorboard import SummaryWriter
    SummaryWriter("events").close()
assert "tensorboard.compat.notf" not in sys.modules
"""
    assert run_python(code, stubs) == ""


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((64, 32, 3, 3), (64, 288)),  # torch: (O, I, H, W)
        ((3, 3, 32, 64), (288, 64)),  # JAX and Keras: (H, W, I, O)
        ((64, 1, 3, 3), (64, 9)),
        ((10, 7), (10, 7)),
        ((12, 64, 8, 8), (768, 64)),  # stacked layers
        ((16, 4, 4), (16, 16)),
        ((4, 4, 4), (4, 16)),  # the first of equals
        ((7,), (1, 7)),
        ((), (1, 1)),
    ],
)
def test_matrices_of_powersgd_have_the_longest_shorter_side(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_shape(torch.empty(shape)) == matrix


LOADER = """
import warnings
warnings.simplefilter("error")
import numpy as np, torch
from hvdtrain.system.errors import RecipeError
from hvdtrain.torch.data import BatchDataset
from hvdtrain.torch.loader import BatchLoader
from tests.unit.test_examples import Listed, Mine
{before}
def load(example):
    loader = BatchLoader(BatchDataset(Mine(), "train", Listed(example)), 1)
    try:
        print([batch.tolist() for _, batch in loader.load_batches([np.arange(3, 5)], [0])])
    except RecipeError as error:
        print(error, error.trace)
    finally:
        loader.close()
load(lambda i: np.float32(i))
load(lambda i: np.float32({operation}))
"""
REFUSED = "Mine.dataset('train')[3] uses {} in a loader process, where it hangs: use numpy there, or load without such "


@pytest.mark.parametrize(
    ("framework", "before", "operation"),
    [
        # Of a size that hangs, compiled before the fork.
        ("JAX", "import jax\nf = jax.jit(lambda x: (x @ x).sum())\nx = np.ones((512, 512))\nf(x)", "f(x)"),
        (
            "TensorFlow",
            "warnings.simplefilter('ignore')\nimport tensorflow as tf\nx = tf.ones((512, 512))",
            "tf.reduce_sum(tf.matmul(x, x))",
        ),
    ],
    ids=["JAX", "TensorFlow"],
)
def test_an_operation_in_a_loader_process_is_refused_by_name(framework: str, before: str, operation: str) -> None:
    found = run_python(LOADER.format(before=before, operation=operation), Path(__file__).parents[2])
    refused = REFUSED.format(framework)
    assert found == f"[[3.0, 4.0]]\n{refused}processes (--workers 0) \n"


def test_a_torch_training_imports_no_other_framework(tmp_path: Path) -> None:
    code = """
import sys
from hvdtrain.cli.main import main
try:
    main(["train", "digits", "--steps", "2", "--run-dir", "run", "--quiet"])
except SystemExit as end:
    assert not end.code, end
print([name for name in ("jax", "tensorflow", "keras") if name in sys.modules])
"""
    assert run_python(code, tmp_path).splitlines()[-1] == "[]"
    assert b"aten::" in b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())


def options_for(device: str | None) -> StepOptions:
    return StepOptions(device=DeviceOptions(device=device))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("torch_has_gpu", "wanted", "sees_gpu", "expected"),
    [
        (False, None, False, "cpu"),
        (True, None, True, "cuda"),
        (True, "cuda", True, "cuda"),
        (True, "cpu", True, "cpu"),
        (True, None, False, "cpu"),
    ],
)
def test_the_device_is_the_gpu_if_both_see_it(
    torch_has_gpu: bool,
    wanted: str | None,
    sees_gpu: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_gpu)
    assert choose_foreign_device("JAX", options_for(wanted), WORLD, sees_gpu=sees_gpu) == expected
    unused = torch_has_gpu and wanted is None and not sees_gpu
    line = "JAX cannot use this host's GPU, this run uses the CPU: pip install 'jax[cuda13]'"
    assert capfd.readouterr().err == f"hvdtrain: warning: {line}\n" * unused


def test_xlas_threads_are_those_of_the_run() -> None:
    options = StepOptions(device=DeviceOptions(device="cpu", threads=3))
    assert configure_jax(options, WORLD) == "cpu" and os.environ["NPROC"] == "3"


def test_a_gpu_that_the_framework_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--device cuda, but torch sees no GPU here; expected cpu$"):
        choose_foreign_device("JAX", options_for("cuda"), WORLD, sees_gpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"^--device cuda, but TensorFlow cannot use this host's GPU; the backends "):
        choose_tensorflow_device(options_for("cuda"), WORLD)
