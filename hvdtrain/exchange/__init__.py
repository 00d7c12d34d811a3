"""The gradients' exchange: flat torch tensors that are summed over ranks, free of any framework's optimizer.

buckets.py, layout.py    parameters in flat buckets, and which of them are sent
bucketed.py              the exchange that overlaps with the backward pass; compression per bucket
advisor.py, advice.py    --compression auto
sharded.py               the exchange of --deterministic, along summation_tree.py
state.py                 what it carries from step to step, in checkpoints
"""
