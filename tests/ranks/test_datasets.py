"""MNIST and CIFAR-10 from small files in their true formats, through the real loaders."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, run
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, refusal, train

MNIST = str(ROOT / "recipes" / "mnist.py")
CIFAR10 = str(ROOT / "recipes" / "cifar10.py")
COUNTS = {"train": 200, "t10k": 50}


def drawings(count: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a tenth of the image bright, which tells the label: something that can be learnt; and the labels."""
    made = np.random.default_rng(seed)
    labels = made.integers(0, 10, count).astype(np.uint8)
    images = made.integers(0, 80, (count, int(np.prod(shape)))).astype(np.uint8)
    tenth = images.shape[1] // 10
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label * tenth : (label + 1) * tenth] += 150
    return images.reshape(count, *shape), labels


def write_mnist(folder: Path) -> None:
    """IDX: a big-endian magic number with the type and the number of axes, their sizes, the bytes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (name, count) in enumerate(COUNTS.items()):
        images, labels = drawings(count, (28, 28), seed)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())


def write_cifar10(folder: Path) -> dict[str, str]:
    """Pickled dicts of rows of 3,072 bytes and a list of labels. Returns each file's MD5, which the loader checks."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files: dict[str, object] = {"batches.meta": {"label_names": [str(i) for i in range(10)]}}
    for seed, name in enumerate(names):
        images, labels = drawings(40, (3072,), seed)
        files[name] = {"data": images, "labels": labels.tolist()}
    for name, content in files.items():
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    return {name: hashlib.md5((batches / name).read_bytes(), usedforsecurity=False).hexdigest() for name in files}


@pytest.mark.parametrize("net", ["mlp", *slow("cnn")])
def test_mnist_trains_on_idx_files(net: str, world2: KeptWorld, tmp_path: Path) -> None:
    write_mnist(tmp_path / "data")
    options = ["--data-dir", str(tmp_path / "data"), "--net", net, "--epochs", "8", "--batch-size", "20"]
    summary = train(world2, MNIST, tmp_path / "run", *options)
    assert summary["samples_seen"] == 8 * 200
    assert summary["synthetic"] is False
    assert summary["eval"]["accuracy"] > 0.5  # 0.1 by chance


@pytest.mark.parametrize("net", ["cnn", *slow("resnet18")])
def test_cifar10_trains_on_its_pickles(net: str, world2: KeptWorld, tmp_path: Path) -> None:
    sums = write_cifar10(tmp_path / "data")
    # The recipe as it is, but for the sums of the true files.
    recipe = tmp_path / "small_cifar10.py"
    recipe.write_text(
        "from torchvision.datasets import CIFAR10 as Files\n"
        "from dataclasses import dataclass\n"
        "from hvdtrain.recipe.registry import load_recipe\n"
        f"Files.train_list = {[[name, md5] for name, md5 in sums.items() if name.startswith('data')]}\n"
        f"Files.test_list = [['test_batch', {sums['test_batch']!r}]]\n"
        f"Files.meta = {{'filename': 'batches.meta', 'key': 'label_names', 'md5': {sums['batches.meta']!r}}}\n"
        "@dataclass(kw_only=True)\n"
        f"class SmallCifar10(load_recipe({CIFAR10!r})):\n"
        "    'CIFAR-10, cut down.'\n"
    )
    epochs = {"cnn": 8, "resnet18": 1}[net]
    options = ["--data-dir", str(tmp_path / "data"), "--net", net, "--epochs", str(epochs), "--batch-size", "40"]
    options += ["--lr", "0.02", "--channels-last", "--threads", "1"]
    summary = train(world2, str(recipe), tmp_path / "run", *options)
    assert summary["samples_seen"] == epochs * 200
    if net == "cnn":
        assert summary["eval"]["accuracy"] > 0.2  # 0.1 by chance


def test_augmentation_does_not_depend_on_the_ranks_or_loader_processes(
    world1: KeptWorld, world3: KeptWorld, tmp_path: Path
) -> None:
    options = ["--synthetic", "--steps", "3", "--batch-size", "12", "--log-every", "1", "--eval-every", "100"]
    losses = []
    for name, world, more in (
        ("alone", world1, []),
        ("workers", world1, ["--workers", "2"]),
        ("ranks", world3, []),
    ):
        recipe = str(Path(__file__).parent / "augmented_recipe.py")
        losses.append(train(world, recipe, tmp_path / name, *options, *more)["train_loss"])
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (MNIST, "no MNIST in {data}/MNIST/raw: --download fetches it if there is a network; else put train- and "),
        (CIFAR10, "no whole CIFAR-10 in {data}/cifar-10-batches-py: --download fetches it if there is a network"),
    ],
)
def test_missing_files_are_explained(recipe: str, error: str, world1: KeptWorld, tmp_path: Path) -> None:
    text = refusal(world1, recipe, tmp_path / "run", "--data-dir", str(tmp_path))
    assert text.startswith(error.format(data=tmp_path)) and "\n" not in text
    # Other files than the recipe's, as by a broken copy.
    if recipe == CIFAR10:
        write_cifar10(tmp_path)
        assert refusal(world1, recipe, tmp_path / "run", "--data-dir", str(tmp_path)) == text


def test_mnist_files_may_not_be_left_compressed(tmp_path: Path) -> None:
    """torchvision wants them unpacked; the error says which names."""
    write_mnist(tmp_path)
    for path in (tmp_path / "MNIST" / "raw").iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    done = run("alone", 1, [*HVDTRAIN, "train", MNIST, "--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")])
    assert done.returncode == 2
    assert "images-idx3-ubyte" in done.stderr
