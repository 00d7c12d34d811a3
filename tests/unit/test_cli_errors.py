"""Wrong input: one line on standard error that says what is wrong, exit 2, before any rank starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvdtrain.cli.main import main

DIGITS = str(Path(__file__).parents[2] / "recipes" / "digits.py")

FILES = {
    "widht.toml": "widht = 3",
    "broken.toml": "width =",
    "two.py": """
        from dataclasses import dataclass
        from hvdtrain.torch import Recipe
        @dataclass(kw_only=True)
        class First(Recipe): "one"
        @dataclass(kw_only=True)
        class Second(Recipe): "two"
        """,
    "none.py": "x = 1",
    "broken.py": "def",
    "missing_import.py": "import no_such_module_here\nclass Mine(no_such_module_here.Base): ...",
    "bare.py": """
        from hvdtrain.torch import Recipe
        class Bare(Recipe):
            width: int = 3
        """,
    "untyped.py": """
        from hvdtrain.torch import Recipe
        class Untyped(Recipe):
            lr = 0.5
        """,
    "odd_type.py": """
        from dataclasses import dataclass
        from hvdtrain.torch import Recipe, option
        @dataclass(kw_only=True)
        class Odd(Recipe):
            layers: list = option(None, "sizes")
        """,
    "clash.py": """
        from dataclasses import dataclass
        from hvdtrain.torch import Recipe, option
        @dataclass(kw_only=True)
        class Clash(Recipe):
            seed: int = option(1, "of my own")
        """,
}

CASES = [
    (["trian"], "no command 'trian'; did you mean 'train'?"),
    (["none.py"], "no command 'none.py'; to start a recipe or program: hvdtrain launch -np N none.py"),
    (["train"], "RECIPE is missing; `hvdtrain list` shows those found"),
    (["train", "digit"], "no recipe 'digit'; did you mean 'digits'?"),
    (["train", "no/such.py"], "no recipe file 'no/such.py'"),
    (["train", f"{DIGITS}:Digit"], f"{DIGITS} has no recipe class 'Digit'; did you mean 'Digits'?"),
    (["train", "two.py"], "two.py defines several recipes: name one, two.py:First or two.py:Second"),
    (
        ["train", "none.py"],
        "none.py defines no recipe, and was not run: subclass hvdtrain.torch.Recipe, hvdtrain.jax.Recipe or "
        "hvdtrain.keras.Recipe, or start it as a program: hvdtrain launch none.py",
    ),
    (
        ["train", "missing_import.py"],
        re.compile(r"missing_import\.py:1 cannot be imported: ModuleNotFoundError: No module .*"),
    ),
    (["train", "broken.py"], re.compile(r"broken\.py cannot be imported: SyntaxError: .*")),
    (["train", "bare.py"], "recipe class Bare has fields but is not a dataclass: add @dataclass(kw_only=True)"),
    (
        ["train", "untyped.py"],
        "Untyped.lr is set without a type, and would be ignored: write `lr: float = 0.5` under "
        "@dataclass(kw_only=True)",
    ),
    (
        ["train", "odd_type.py"],
        "Odd.layers has type <class 'list'>; options are int, float, str, bool, Path, Literal or Optional, lists and "
        "tuples of these, and dataclasses of them",
    ),
    (
        ["train", DIGITS, "--config", "widht.toml"],
        "widht.toml has the option 'widht', which Digits does not have; did you mean 'width'?",
    ),
    (
        ["launch", "-np", "2", DIGITS, "--config", "widht.toml"],
        "widht.toml has the option 'widht', which Digits does not have; did you mean 'width'?",
    ),
    (["train", DIGITS, "--config", "no.toml"], "--config no.toml cannot be read: No such file or directory"),
    (["train", DIGITS, "--config", "none.py"], "--config none.py: expected a file whose name ends in .toml or .json"),
    (["train", DIGITS, "--config", "broken.toml"], re.compile(r"--config broken\.toml cannot be read: .*")),
    (["train", "clash.py"], "Clash.seed is a run option; rename the recipe's option"),
    (["train", DIGITS, "--widht", "3"], "no option --widht; did you mean '--width'?"),
    (["train", DIGITS, "--width", "wide"], "--width: 'wide' is not a valid integer"),
    (["train", DIGITS, "--width"], "Option '--width' requires an argument."),
    (["train", DIGITS, "extra"], "Got unexpected extra argument (extra)"),
    (["train", DIGITS, "--lr", "fast"], "--lr: 'fast' is not a valid float"),
    (["train", DIGITS, "--amp", "fp8"], "--amp: 'fp8' is not one of 'off', 'bf16', 'fp16'"),
    (["train", DIGITS, "--steps", "0"], "--steps is 0; it must be at least 1"),
    (["train", DIGITS, "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
    (["train", DIGITS, "--epochs", "-3"], "--epochs is -3; it must be at least 1"),
    (["train", DIGITS, "--epochs", "2", "--steps", "9"], "--epochs and --steps exclude each other: give one"),
    (
        ["train", DIGITS, "--batch-size", "64", "--batch-per-rank", "8"],
        "--batch-size and --batch-per-rank exclude each other: give one",
    ),
    (["train", DIGITS, "--clip-norm", "0"], "--clip-norm is 0.0; it must be above 0"),
    (["train", DIGITS, "--bucket-mib", "0"], "--bucket-mib is 0.0; it must be above 0"),
    (["train", DIGITS, "--ema", "1.5"], "--ema is 1.5; a decay lies between 0 and 1, for example 0.999"),
    (["train", DIGITS, "--seed", "-1"], "--seed is -1; it must not be negative"),
    (
        ["train", DIGITS, "--scale-lr", "linear"],
        "--scale-lr linear needs --batch-per-rank; with a fixed --batch-size there is nothing to scale",
    ),
    (["train", DIGITS, "--schedule", "cosin"], "schedule 'cosin': no shape 'cosin'; did you mean 'cosine'?"),
    (
        ["train", DIGITS, "--schedule", "warmup:5xx cosine"],
        "schedule 'warmup:5xx cosine': '5xx' is not a position; give epochs ('5ep') or steps ('500')",
    ),
    (
        ["train", DIGITS, "--schedule", "step:3ep"],
        "schedule 'step:3ep': step takes positions and a factor, 'step:30ep,60ep x0.1'",
    ),
    (["train", DIGITS, "--device", "tpu"], "--device: 'tpu' is not one of 'cpu', 'cuda'"),
    (
        ["train", DIGITS, "--deterministic", "--compression", "int8"],
        "--deterministic with --compression int8: what it loses depends on the ranks; leave one out",
    ),
    (
        ["train", DIGITS, "--deterministic", "--compression", "auto"],
        "--deterministic with --compression auto: what it loses depends on the ranks; leave one out",
    ),
    (
        ["train", DIGITS, "--deterministic", "--exchange", "horovod"],
        "--deterministic with --exchange horovod: its sums depend on the ranks",
    ),
    (
        ["train", DIGITS, "--deterministic", "--batch-per-rank", "8"],
        "--deterministic with --batch-per-rank: the batch depends on the ranks; give --batch-size",
    ),
    (
        ["train", DIGITS, "--deterministic", "--compile"],
        "--deterministic with --compile: what is compiled depends on what a rank sees first; leave one out",
    ),
    (["train", DIGITS, "--local-steps", "0"], "--local-steps is 0; it must be at least 1"),
    (
        ["train", DIGITS, "--local-after", "25%"],
        "--local-after 25% needs --local-steps, the steps of a round, for example 16",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--local-after", "25"],
        "--local-after is '25'; expected a part of the run ('25%'), epochs ('2ep') or steps ('100st')",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--outer", "nesterov:0.7,1"],
        "--outer is 'nesterov:0.7,1'; expected average, or nesterov:LR,MOMENTUM with a rate above 0 and a momentum "
        "from 0 to below 1, for example nesterov:0.7,0.9",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--deterministic"],
        "--local-steps 4 with --deterministic: the number of ranks is part of the maths of rounds; leave one out",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--exchange", "horovod"],
        "--local-steps 4 with --exchange horovod: it sends gradients in each step; leave one out",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--shard", "optimizer"],
        "--local-steps 4 with --shard optimizer: it needs the sum of gradients; leave one out",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--amp", "fp16"],
        "--local-steps 4 with --amp fp16: each rank would scale its loss differently; use bf16",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--sync-batchnorm"],
        "--local-steps 4 with --sync-batchnorm: it exchanges gradients in each step; use GroupNorm",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--prune", "0.5,from:0ep,to:1ep"],
        "--local-steps 4 with --prune 0.5,from:0ep,to:1ep: each rank would choose other weights; leave one out",
    ),
    (
        ["train", DIGITS, "--local-steps", "4", "--compression", "auto"],
        "--local-steps 4 with --compression auto: it measures steps that exchange gradients; name a method, for "
        "example int8",
    ),
    (["train", DIGITS, "--server", "0"], "--server is 0; it must be at least 1"),
    (
        ["train", DIGITS, "--staleness", "async"],
        "--staleness async needs --server, the number of servers, for example 1",
    ),
    (
        ["train", DIGITS, "--server", "1", "--staleness", "asink"],
        "--staleness is 'asink'; did you mean 'async'?; expected sync, backup:K, bounded:S, async or async+dc",
    ),
    (
        ["train", DIGITS, "--server", "1", "--staleness", "backup:0"],
        "--staleness backup:0 waits for all workers: that is --staleness sync",
    ),
    (
        ["train", DIGITS, "--server", "1", "--staleness", "bounded:0"],
        "--staleness bounded:0 allows no stale gradient: that is --staleness sync; expected bounded:1",
    ),
    *(
        (["train", DIGITS, "--server", server, *options.split()], f"--server {server} with {options}{message}")
        for server, options, message in (
            ("1", "--compression int8", ": it compresses all-reduces; leave one out"),
            ("1", "--deterministic", ": which gradient comes first is part of the maths; leave one out"),
            ("1", "--exchange horovod", ": gradients go to the server; leave one out"),
            ("1", "--shard optimizer", ": several servers have parts as well; leave one out"),
            ("1", "--local-steps 4", ": workers have no weights of their own; leave one out"),
            ("1", "--shares measured", ": fast workers get more examples by themselves; leave one out"),
            ("1", "--batch-per-rank 8", ": give --batch-size; leave one out"),
            ("1", "--amp fp16", ": each worker would scale its loss differently; use bf16"),
            ("1", "--sync-batchnorm", ": workers do not meet in a step; use GroupNorm"),
            ("1", "--prune 0.5,from:0ep,to:1ep", ": gradients travel whole; leave one out"),
            ("1", "--compile", ": a replay would compile something else; leave one out"),
            ("1", "--tensor 2", ": a server has whole layers; leave one out"),
            ("1", "--stages 2", ": a server has whole layers; leave one out"),
            ("1", "--diagnose", ": it compares ranks in their steps; leave one out"),
            ("2", "--clip-norm 1.0", ": no server has the whole gradient; use --server 1"),
            ("2", "--ema 0.9", ": no server has all weights; use --server 1"),
        )
    ),
    (
        ["launch", "--elastic", "--min-np", "3", "-H", "localhost:3", DIGITS, "--server", "2"],
        "--server 2 in an elastic run: a lost server would take its part of the model along; use --server 1",
    ),
    (
        ["launch", "-np", "2", DIGITS, "--deterministic", "--virtual-shards", "0"],
        "--virtual-shards is 0; it must be at least 1",
    ),
    (["train", DIGITS, "--resume"], "--resume needs --run-dir: the folder of the run to continue"),
]


@pytest.mark.parametrize(("args", "message"), CASES, ids=[" ".join(Path(a).name for a in args) for args, _ in CASES])
def test_user_errors_give_one_line_and_exit_2(
    args: list[str],
    message: str | re.Pattern[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import textwrap

    for name, text in FILES.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 2
    error = re.sub(r"\Ahvdtrain: starting .*\n", "", capsys.readouterr().err)  # of launch
    if isinstance(message, str):
        assert error == f"hvdtrain: error: {message}\n"
    else:
        assert re.fullmatch(f"hvdtrain: error: {message.pattern}\n", error)
