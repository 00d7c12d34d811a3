"""Memory that JAX and torch share: who copies, who writes, and when."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import hvdtrain
from hvdtrain.bridge.jax_backend import JaxBackend, JaxScore
from hvdtrain.comm import collectives
from hvdtrain.exchange.bucketed import BucketedExchange
from tests.ranks.jax_optimizer_recipes import Optax
from tests.ranks.jax_recipes import Moving
from tests.support.worlds import on_ranks


class Witness:
    """Sees every array that JAX makes in a training, and every tensor that it imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Any, np.ndarray[Any, Any]]] = []  # with what was in them
        self.gradients: set[int] = set()  # addresses of those of the last pass
        self.stored: list[int] = []  # addresses of gradients as they came into buckets
        self.copied = 0  # stored gradients that were copied before
        self.imported = 0
        score, compile_update, import_tensor, store = (
            JaxScore.score_for_training,
            JaxBackend.compile_update,
            JaxBackend.import_tensor,
            BucketedExchange.store_gradient,
        )

        def score_and_note(*args: Any) -> Any:
            returned, pull_back = score(*args)
            self.note((returned.scores, returned.state))

            def pull_and_note(cotangents: Any) -> Any:
                gradients = pull_back(cotangents)
                self.note(gradients)
                self.gradients = {array.unsafe_buffer_pointer() for array in gradients.values()}
                return gradients

            return returned, pull_and_note

        def compile_and_note(*args: Any) -> Any:
            update = compile_update(*args)

            def update_and_note(*args: Any) -> Any:
                updated = update(*args)
                # It has read the buckets: they may be written.
                assert all(array.is_ready() for array in jax.tree.leaves(updated))
                self.note(updated)
                return updated

            return update_and_note

        def import_and_note(backend: Any, tensor: Any) -> Any:
            array = import_tensor(backend, tensor)
            assert array.unsafe_buffer_pointer() == tensor.data_ptr()
            self.imported += 1
            return array

        def store_and_note(exchange: Any, bucket: Any, index: int) -> None:
            self.copied += bucket.params[index].grad.data_ptr() not in self.gradients
            self.stored.append(bucket.params[index].grad.data_ptr())
            store(exchange, bucket, index)

        monkeypatch.setattr(JaxScore, "score_for_training", score_and_note)
        monkeypatch.setattr(JaxBackend, "compile_update", compile_and_note)
        monkeypatch.setattr(JaxBackend, "import_tensor", import_and_note)
        monkeypatch.setattr(BucketedExchange, "store_gradient", store_and_note)

    def note(self, tree: Any) -> None:
        self.made += [(array, np.array(array)) for array in jax.tree.leaves(tree)]

    def check_nothing_was_written(self) -> None:
        assert self.made
        for array, value in self.made:
            assert np.asarray(array).tobytes() == value.tobytes()


@on_ranks(2)
def test_a_gradient_is_copied_into_its_bucket_only(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        witness = Witness(monkeypatch)
        hvdtrain.fit(Moving(), run_dir=tmp_path / "run", quiet=True)
    assert len(witness.stored) == 2 * 3  # two parameters, three steps
    assert witness.copied == 0
    assert witness.imported
    witness.check_nothing_was_written()


MODES = {
    "micro-batches": {"micro_batch": 2, "clip_norm": 0.1, "ema": 0.9},
    "loss scale": {"amp": "fp16", "clip_norm": 0.1, "micro_batch": 2},
    "horovod": {"exchange": "horovod", "micro_batch": 2, "clip_norm": 0.1},
    "compressed": {"compression": "powersgd:1,warmup=0,min=1"},
    "deterministic": {"deterministic": True, "clip_norm": 0.1, "micro_batch": 1},
}


@on_ranks(1, 2)
def test_nobody_writes_what_jax_has_made(tmp_path):
    for name, options in list(MODES.items())[: 2 if collectives.size() == 1 else None]:  # the others are of exchanges
        with pytest.MonkeyPatch.context() as monkeypatch:
            witness = Witness(monkeypatch)
            hvdtrain.fit(Optax(kind="adam"), run_dir=tmp_path / name, quiet=True, **options)
        witness.check_nothing_was_written()
