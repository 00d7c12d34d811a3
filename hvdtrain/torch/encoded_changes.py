"""What a sharded optimizer has changed, gathered by a codec: the second round of `CompressedScatterReducer`.

What a step leaves unsent of its change stays with the state of the piece, as "unsent": so it is divided, saved and
loaded with it, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.compression.compressed_scatter import CompressedScatterReducer
from hvdtrain.exchange.buckets import make_views
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.pieces import ShardedBucket, cut_part, view_real

UNSENT = "unsent"  # in a piece's state: a tensor of its shape and type


def find_codec(bucket: ShardedBucket) -> CompressedScatterReducer | None:
    """Return what encodes the changes of a bucket; None if its parameters travel as they are."""
    reducer = None if bucket.source is None else bucket.source.reducer
    return reducer if isinstance(reducer, CompressedScatterReducer) else None


class EncodedChanges:
    """The change of a bucket's parameters in a step, by all ranks.

    Made before the optimizer steps; then `start_gathering`, and `await_values`. Parameters that no rank has used stay
    as they are, and so does what is unsent of them.
    """

    def __init__(self, bucket: ShardedBucket, reducer: CompressedScatterReducer, state: dict[Any, Any]) -> None:
        """Remember this rank's part as it is. state: of the optimizer, by piece."""
        self._bucket, self._reducer, self._state = bucket, reducer, state
        self._before = [values.detach().clone() for _, values in bucket.own]

    @torch.no_grad()
    def start_gathering(self, name: str) -> collectives.Handle:
        """Start bringing every rank the changes; this rank's part is as it was before.

        name: of the collective.
        """
        changes = []
        for (_, values), before in zip(self._bucket.own, self._before, strict=True):
            changes.append(values - before)
            if (unsent := self._state.get(values, {}).get(UNSENT)) is not None:
                changes[-1] += unsent
            values.copy_(before)
        flats = [view_real(change).float() for change in changes]
        payload = self._reducer.encode_own(torch.cat(flats) if flats else torch.empty(0, device=self._bucket.device))
        if self._reducer.residual is not None:
            self._keep_unsent(changes, self._reducer.decode_own(payload))
        return collectives.all_gather_async(payload, name)

    def _keep_unsent(self, changes: Sequence[Tensor], sent: Tensor) -> None:
        """Keep what is not sent with the pieces' state; the rounding of what is added to parameters is not sent either.

        Args:
            changes: of the pieces.
            sent: (own values,) float32.
        """
        used, parts = self._bucket.get_used(), cut_part(self._bucket.own, sent)
        for (piece, values), before, change, part in zip(self._bucket.own, self._before, changes, parts, strict=True):
            if piece.param in used:
                self._state[values][UNSENT] = change - (before + part.to(before.dtype) - before)

    def await_values(self, handle: collectives.Handle) -> list[tuple[nn.Parameter, Tensor]]:
        """Wait for all ranks' changes; return each parameter that was used with its new values."""
        used, found = self._bucket.get_used(), self._reducer.decode_all(collectives.wait(handle))
        changes = zip(self._bucket.params, make_views(found, self._bucket.params), strict=True)
        return [(p, p.detach() + change.to(p.dtype)) for p, change in changes if p in used]


@torch.no_grad()
def settle_unsent(
    params: Mapping[int, nn.Parameter], states: Mapping[int, StateDict], encoded: Collection[nn.Parameter]
) -> None:
    """Add what a codec has not sent to parameters that are not encoded any more; the same on all ranks.

    Args:
        params: of the optimizer, by their numbers in its state dict.
        states: what is loaded of each; what is settled is removed from it.
        encoded: parameters whose changes a codec carries.
    """
    for number, p in params.items():
        if UNSENT in states.get(number, {}) and p not in encoded:
            p.add_(states[number].pop(UNSENT).to(p.device))
