"""All that needs a GPU, in one go: correctness of NCCL, codecs and ranks, and the times of steps and codecs.

    python -m tests.gpu [--json FILE] [--require] [--parts nccl,codecs,ranks,steps,speeds]
    python -m tests.gpu --device cpu       tries out this script itself: small sizes, over Gloo; its times mean nothing

Where torch sees no GPU it says so and does nothing: exit code 0, or 1 with --require. Exit code 1 too if a check fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hvdtrain.native import installed
from hvdtrain.native.cuda import find_nccl
from hvdtrain.native.torchinfo import require_torch
from tests.benchmarks.tables import Table, publish
from tests.gpu import codecs
from tests.ranks.harness import HVDTRAIN, ROOT, rows, run

SWITCH = "NCCL_MULTI_RANK_GPU_ENABLE"
REFUSALS = r"Duplicate GPU|[Mm]ultiple [Rr]anks|invalid usage|ncclInvalidUsage"
WAYS = ["alone", "ddp", "horovod", "bucketed", "bucketed:fp16", "bucketed:powersgd:4"]
MODELS = {"resnet50": "ResNet-50, 64 images of 224x224", "gpt": "GPT of 124 M, 8 texts of 1024 words"}
LIMIT = 300.0  # seconds of one launch


class Refused(Exception):
    """NCCL takes no two ranks on one GPU here: a result, not a failure."""


class Failed(Exception):
    """What a launch failed of, in a line."""


# (name, "ok" or "failed" or "refused", in words)
Verdict = tuple[str, str, str]


def environment(device: str) -> dict[str, str]:
    """For ranks: one GPU for all, and what NCCL has to say."""
    env = {"GPU_TEST_PORT": str(free_port())}
    if device == "cuda":
        one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        env |= {"CUDA_VISIBLE_DEVICES": one, SWITCH: "1", "NCCL_DEBUG": "WARN"}
    return env


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(kind: str, ranks: int, command: list[str], env: Mapping[str, str]) -> str:
    """The output of a command.

    Raises Refused where NCCL does not let ranks share a GPU, Failed where something else went wrong.
    """
    try:
        done = run(kind, ranks, command, dict(env), timeout=LIMIT)
        output, bad = done.stdout + done.stderr, done.returncode != 0
    except AssertionError as error:  # no end in time, or something left
        output, bad = str(error), True
    if not bad:
        return done.stdout
    if refusal := re.search(rf".*(?:{REFUSALS}).*", output):
        raise Refused(refusal[0].strip()[:300])
    telling = re.findall(r"^.*(?:Error\b|error:|NCCL WARN).*$", output, re.MULTILINE) or output.splitlines()[-1:]
    raise Failed(f"{' '.join(command[1:])} on {ranks}: {' / '.join(line.strip() for line in telling[:3])[:600]}")


def on_ranks(device: str, ranks: int, what: str, *more: str) -> Any:
    """The result of tests.gpu.rank."""
    command = [sys.executable, "-m", "tests.gpu.rank", what, device, *more]
    text = launched("horovodrun", ranks, command, environment(device))
    return json.loads(text.split("RESULT", 1)[1].splitlines()[0])


def nccl_knows_sharing() -> bool:
    """Whether the NCCL that torch brings knows the switch that lets ranks share a GPU."""
    found = find_nccl(require_torch().cuda or "")
    if found is None:
        return False
    with found.library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(SWITCH.encode()) >= 0


# The checks: each returns, in words, what was found, or raises.


def check_build(device: str) -> str:
    """Horovod is there for this torch, with NCCL."""
    record = installed.require_horovod().record
    if device == "cuda" and not (record and record.nccl):
        raise Failed("the installed Horovod has no NCCL: see `hvdtrain horovod build`")
    return f"Horovod for torch {record.torch}, NCCL {record.nccl}" if record else "not built by hvdtrain"


def check_sums(device: str, ranks: int) -> str:
    """Collectives over NCCL give what they should."""
    found = on_ranks(device, ranks, "sums")
    if device == "cuda" and not found["nccl"]:
        raise Failed("Horovod says that it has no NCCL")
    return f"all-reduce, all-gather and all-to-all are right; 100 MB in {found['ms_of_100_MB']:.1f} ms"


def check_codec(device: str, text: str) -> str:
    """A codec on the device decodes as on the CPU."""
    return codecs.compare(text, torch.device(device))


def check_channels(device: str, ranks: int) -> str:
    """No codec's step takes tensors by way of the CPU."""
    found: dict[str, list[int]] = on_ranks(device, ranks, "channels")
    if strays := {text: counted for text, counted in found.items() if counted[0]}:
        raise Failed(f"copies to the CPU [number, bytes]: {strays}")
    copies = ", no copy to the CPU but of single numbers" if device == "cuda" else ""
    return f"{len(found)} codecs: the same bits on all ranks{copies}"


def losses(device: str, ranks: int, folder: Path, steps: int = 24) -> list[float]:
    """Of digits trained on so many ranks."""
    run_dir = folder / f"{device}-{ranks}"
    options = ["--device", device, "--steps", str(steps), "--log-every", "1", "--threads", "1"]
    recipe = str(ROOT / "recipes" / "digits.py")
    command = [*HVDTRAIN, "launch", "-np", str(ranks), recipe, "--run-dir", str(run_dir), *options]
    # TF32 would round otherwise where a rank's batch is of another size.
    launched("alone", ranks, command, {**environment(device), "NVIDIA_TF32_OVERRIDE": "0"})
    return [row["loss"] for row in rows(run_dir)]


def check_training(device: str, ranks: int) -> str:
    """Digits on several ranks has one rank's losses."""
    with tempfile.TemporaryDirectory() as folder:
        one, several = losses(device, 1, Path(folder)), losses(device, ranks, Path(folder))
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, several, strict=True))
    if worst > 1e-3:
        raise Failed(f"losses differ from one rank's by up to {worst:.1e}")
    return f"the losses of {len(one)} steps are one rank's, to {worst:.0e}"


def correctness(device: str, parts: list[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks of the parts, by name."""
    if "nccl" in parts:
        yield "the build", functools.partial(check_build, device)
        yield "collectives on 1 rank", functools.partial(check_sums, device, 1)
    if "codecs" in parts:
        for text in codecs.SPECS:
            yield f"`{text}` as on the CPU", functools.partial(check_codec, device, text)
        yield "channels on 1 rank", functools.partial(check_channels, device, 1)
    for ranks in (2, 4) if "ranks" in parts else ():
        yield f"collectives on {ranks} ranks", functools.partial(check_sums, device, ranks)
        yield f"channels on {ranks} ranks", functools.partial(check_channels, device, ranks)
        yield f"digits on {ranks} ranks", functools.partial(check_training, device, ranks)


def judged(name: str, check: Callable[[], str]) -> Verdict:
    """A check's verdict."""
    try:
        verdict = (name, "ok", check())
    except Refused as error:
        knows = "NCCL knows" if nccl_knows_sharing() else "NCCL does not know"
        verdict = (name, "refused", f"{knows} {SWITCH}: {error}")
    except (Failed, AssertionError, RuntimeError) as error:
        verdict = (name, "failed", " ".join(str(error).split())[:600] or type(error).__name__)
    print(f"{verdict[1]:8} {name}: {verdict[2]}", flush=True)
    return verdict


def step_table(device: str, ranks: int, verdicts: list[Verdict], steps: int) -> Table:
    """The median step of each way, and how many times faster it is than others."""
    tiny = ["--tiny"] if device == "cpu" else []
    rows = []
    for model, title in MODELS.items():
        medians: dict[str, float] = {}
        for way in WAYS:

            def measure(model: str = model, way: str = way, medians: dict[str, float] = medians) -> str:
                found = on_ranks(device, ranks, "step", model, way, "--steps", str(steps), *tiny)
                medians[way] = statistics.median(found["seconds"]) * 1e3
                return f"{medians[way]:.1f} ms ({found['parameters'] / 1e6:.1f} M parameters)"

            verdicts.append(judged(f"steps of {model}, {way}, {ranks} rank(s)", measure))
        for way, ms in medians.items():
            ratios = [f"{medians[other] / ms:.2f}" if other in medians else "" for other in ("ddp", "horovod")]
            rows.append([model if tiny else title, way, f"{ms:.1f}", *ratios])
    where = f"{ranks} ranks on the GPU" if ranks > 1 else "one rank"
    caption = f"Medians of steps that are waited for, in bfloat16 by autocast, channels last, on {where}:"
    return Table(["model", "way", "ms", "x DDP", "x Horovod"], rows, caption)


def speed_table(device: str) -> Table:
    """GB/s of encoding and decoding."""
    megabytes = 100.0 if device == "cuda" else 1.0
    found = codecs.speeds(torch.device(device), megabytes)
    copy = found.pop("copy")[0]
    rows = []
    for text, (encoding, decoding) in found.items():
        cells = [cell for speed in (encoding, decoding) for cell in (f"{speed:.1f}", f"{speed / copy:.0%}")]
        rows.append([f"`{text}`", *cells])
    caption = f"{megabytes:.0f} MB of float32; dense bytes / seconds. A copy on the device: {copy:.0f} GB/s."
    return Table(["codec", "encode, GB/s", "of a copy", "decode, GB/s", "of a copy"], rows, caption)


def machine(device: str) -> str:
    """What the figures are of."""
    if device == "cpu":
        return "no GPU: a trial of the script with small sizes, whose times mean nothing"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return f"one {torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}, NCCL {nccl}"


def driver() -> str:
    """The version of NVIDIA's driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.splitlines()[0].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    parser.add_argument("--require", action="store_true", help="exit with 1 where there is no GPU")
    parser.add_argument("--parts", default="nccl,codecs,ranks,steps,speeds", help="some of these, separated by commas")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each way")
    options = parser.parse_args()
    device, parts = options.device, options.parts.split(",")
    if device == "cuda" and not torch.cuda.is_available():
        print("tests.gpu: torch sees no GPU here, and nothing was run")
        return int(options.require)
    verdicts = [judged(name, check) for name, check in correctness(device, parts)]
    tables = []
    if "steps" in parts:
        # On one rank neither `alone` nor Horovod nor hvdtrain exchanges anything. Horovod itself takes no channels-last
        # gradients: its convolutions' weights are in torch's usual order.
        shared = "ranks" not in parts or any(n == "collectives on 2 ranks" and r == "ok" for n, r, _ in verdicts)
        tables += [step_table(device, ranks, verdicts, options.steps) for ranks in ((1, 2) if shared else (1,))]
    if "speeds" in parts:
        print("         encoding and decoding ...", flush=True)
        tables.append(speed_table(device))
    if verdicts:
        rows = [[name, result, words.replace("|", "/")] for name, result, words in verdicts]
        tables.append(Table(["check", "result", "details"], rows, "Checks:"))
    publish(options.json, tables, machine(device))
    results = [result for _, result, _ in verdicts]
    print(", ".join(f"{results.count(result)} {result}" for result in ("ok", "refused", "failed")))
    return int("failed" in results)


if __name__ == "__main__":
    sys.exit(main())
