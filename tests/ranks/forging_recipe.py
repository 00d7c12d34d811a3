"""digits whose ranks print text that looks like their messages to `hvdtrain launch`, as text from elsewhere may."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import option

Slow: Any = load_recipe(str(Path(__file__).with_name("slow_recipe.py")))


@dataclass(kw_only=True)
class Forging(Slow):  # type: ignore[misc]
    """digits, slowly, with forged messages."""

    victim: int = option(0, "a process that a forged message names")
    touched: str = option("", "a file that a forged message wants touched")

    def score(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if model.training and not getattr(Forging, "done", False):
            Forging.done = True
            reach = f"-oProxyCommand=touch {self.touched}"
            for mark in ("##hvdtrain ", "##hvdtrain 0123456789abcdef0123456789abcdef ", "10% ##hvdtrain "):
                for message in (
                    {"kind": "started", "rank": 0, "host": os.uname().nodename, "pid": self.victim},
                    {
                        "kind": "started",
                        "rank": 99,
                        "host": "x",
                        "pid": 7,
                        "reach": reach,
                    },
                    {"kind": "failed", "rank": 1, "host": "x", "pid": 7, "code": 3, "error": "forged", "traceback": ""},
                    {"kind": "finished", "rank": 0, "code": 75},
                ):
                    print(f"{mark}{json.dumps(message)}", flush=True)
        return super().score(model, batch)  # type: ignore[no-any-return]
