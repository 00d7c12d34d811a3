"""A model that the ranks of a replica hold together, by torch's tensor parallelism or its FSDP2.

    --tensor 2         rank 0   [ w1 | b1 |  c  ]      layers of the recipe's plan are split, and compute parts of
                       rank 1   [ w2 | b2 |  c  ]      activations; both ranks have the same examples
    --shard model      rank 0   [ w1 | b1 | c1  ]      a block's parameters are gathered before it computes, and freed
                       rank 1   [ w2 | b2 | c2  ]      after it; each rank has examples of its own

Both make DTensors of parameters. Across replicas, `hvdtrain.exchange` sums what ranks at the same place have of the
gradients. Imports torch's modules for it only if it is asked for: they take a second.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_map

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.exchange.local_tensors import gather_whole, is_split_dtensor, local_tensor
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.framework import DataSource
from hvdtrain.system.errors import RecipeError, UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.broadcast import broadcast_state
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.recompute import find_blocks
from hvdtrain.torch.replica_groups import ReplicaGroups
from hvdtrain.torch.scores import Scores, get_numerators

MIXED_TEXT = "got mixed torch.Tensor and DTensor"  # torch's error


class DividedModel:
    """A model, and what it needs besides its calls if ranks of a replica hold it together.

    Attributes:
        is_divided: whether they do; otherwise nothing here does anything.
        pads_passes: whether they have different examples, and must make equally many passes.
        lines: to be printed.
        whole_state: of the model, on rank 0, once it was gathered and until it is saved.
        holds_part: whether what is gathered is this rank's part of it instead, which nobody else is asked for.
        groups: what torch keeps of the replica's process group; None: the model is not divided.
    """

    def __init__(
        self, model: nn.Module, flag: str, groups: ReplicaGroups | None = None, lines: Sequence[str] = ()
    ) -> None:
        """Take a model that was divided.

        Args:
            model: the model.
            flag: the option by which it was divided; "": it was not.
            groups: of the modules that FSDP2 has wrapped, if it has.
            lines: to be printed.
        """
        sharded = () if groups is None else groups.sharded
        self.model, self.flag, self.lines, self.groups = model, flag, lines, groups
        self.holds_part = False
        self.is_divided, self.pads_passes = bool(flag), bool(sharded)
        self.whole_state: StateDict = {}
        self._trained = {p: p.requires_grad for p in model.parameters()} if sharded else {}
        self._sharded, self._is_whole = sharded, False

    def broadcast_parameters(self) -> None:
        """Let all ranks have rank 0's parameters and buffers, unless they have been divided."""
        if not self.is_divided:
            broadcast_state(self.model)

    def gather_parameters(self) -> None:
        """Let the model be whole on each rank, until `free_parameters`: it may be called in any way, or not at all.

        All ranks of the replica call this.
        """
        if not self._is_whole:
            self._is_whole = True
            for module in self._sharded:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()

    def free_parameters(self) -> None:
        """Free what other ranks have of the model."""
        if self._is_whole:
            for module in self._sharded:
                module.reshard()
                module.set_reshard_after_forward(module is not self.model, recurse=False)
        self._is_whole = False

    def enter_world(self) -> None:
        """Continue in another world, whose replica has the same ranks at the same places."""
        if self.groups is not None:
            self.groups.connect()

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Let the model be whole on each rank within a block. All ranks of the replica call this."""
        self.gather_parameters()
        try:
            yield
        finally:
            self.free_parameters()

    def pad_passes(self, passes: Sequence[int]) -> Sequence[int]:
        """Return how many passes a step has on this rank, those included in which others of its replica have examples.

        passes: of this rank's examples. All ranks of the replica call this.
        """
        if not self.pads_passes:
            return passes
        self._check_frozen()
        most = torch.tensor(sum(passes))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return [int(most)]

    @contextlib.contextmanager
    def explain_errors(self, recipe: Recipe) -> Iterator[None]:
        """Make torch's error of a part of a parameter that is used as if it was whole a UserError."""
        try:
            yield
        except RecipeError as error:
            if not self.is_divided or MIXED_TEXT not in str(error.__cause__):
                raise
            raise UserError(
                f"{name_call(recipe, 'score()')} uses parameters outside of the model's calls, where {self.flag} "
                "divides them: call the model, or its layers within its forward"
            ) from error

    def _check_frozen(self) -> None:
        """Raise UserError if what is trained of the model has changed, of which FSDP2 takes no notice."""
        for p, was_trained in self._trained.items():
            if p.requires_grad != was_trained:
                name = next(name for name, own in self.model.named_parameters() if own is p)
                raise UserError(
                    f"{self.flag}: {name} was {'frozen' if was_trained else 'unfrozen'} after the training began; "
                    "decide in model() what is trained"
                )

    def check_graph(self, scores: Scores) -> None:
        """Raise UserError if a pass has no backward pass, for which the others of the replica would wait."""
        if self.pads_passes and not get_numerators(scores["loss"]).requires_grad:
            raise UserError(
                f"{self.flag}: the loss of this rank's examples depends on no parameter: add 0 * the model's output"
            )

    @contextlib.contextmanager
    def gathering_parts(self) -> Iterator[None]:
        """Let what is gathered within a block be this rank's part, if ranks hold the model together."""
        self.holds_part = self.is_divided
        try:
            yield
        finally:
            self.holds_part = False

    def gather_state(self) -> None:
        """Let rank 0 have the state of the whole model in host memory; all ranks call this."""
        if self.is_divided:
            self.whole_state = self.gather_whole(self.model.state_dict())

    def gather_whole(self, named: Mapping[str, object]) -> StateDict:
        """Return tensors that are DTensors whole, in host memory, on rank 0; all ranks call this.

        The others, and the ranks of other replicas, return nothing. With `holds_part` each rank returns its parts.
        """
        if self.holds_part:
            return {name: local_tensor(v.detach()).cpu() if isinstance(v, Tensor) else v for name, v in named.items()}
        whole = {}
        if collectives.rank() < dist.get_world_size():
            for name, value in named.items():
                found = gather_whole(value.detach()).cpu() if isinstance(value, Tensor) else value
                if collectives.rank() == 0:
                    whole[name] = found
        return whole


def divide_model(
    recipe: Recipe, model: nn.Module, source: DataSource, options: StepOptions, device: torch.device, world: World
) -> DividedModel:
    """Divide a model, the same on all ranks then, in each replica, if the options say so; all ranks call this.

    Raises UserError on all ranks for a recipe whose model cannot be divided.
    """
    flag = options.model_flag
    if not (flag and world.is_grid):
        return DividedModel(model, "")
    collectives.on_all_ranks("model.check", lambda: check_divisible(recipe, model, source, flag))
    broadcast_state(model)
    from torch.distributed.device_mesh import init_device_mesh

    mesh, values = init_device_mesh(device.type, (dist.get_world_size(),)), sum(p.numel() for p in model.parameters())
    divide = split_layers if options.model.tensor > 1 else shard_blocks
    sharded = collectives.on_all_ranks("model.divided", lambda: divide(recipe, model, mesh, flag))
    own = sum(local_tensor(p).numel() for p in model.parameters())
    line = f"model     {own:,} of {values:,} parameters on each rank ({flag})"
    return DividedModel(model, flag, ReplicaGroups(mesh, sharded, flag), [line])


def check_divisible(recipe: Recipe, model: nn.Module, source: DataSource, flag: str) -> None:
    """Raise UserError for a recipe whose model cannot be divided exactly."""
    if source is DataSource.ROLLOUTS:
        raise UserError(f"{flag}: {type(recipe).__name__} has rollouts, which each rank would play by parts of a model")
    if type(recipe).framework != "torch":
        raise UserError(f"{flag}: {type(recipe).__name__} is a recipe of {recipe.framework}; it needs one of torch")
    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, _NormBase))
    odd = next((name for name, norm in norms if isinstance(norm, _BatchNorm) or norm.track_running_stats), None)
    if odd is not None:
        kind = type(model.get_submodule(odd)).__name__
        raise UserError(
            f"{flag}: {odd!r} is a {kind}, whose statistics would be of other examples than without; use GroupNorm or "
            "LayerNorm"
        )


def split_layers(recipe: Recipe, model: nn.Module, mesh: Any, flag: str) -> list[Any]:
    """Split the layers of the recipe's plan. Raises UserError for what is wrong with it."""
    method = name_call(recipe, "split_plan()")
    if not is_overridden(recipe, "split_plan"):
        raise UserError(
            f"{flag}: {type(recipe).__name__} has no method split_plan(self), which returns torch's ParallelStyle by "
            'the names of modules, such as {"layers.*.linear1": ColwiseParallel(), "layers.*.linear2": '
            "RowwiseParallel()}: define it"
        )
    from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

    with in_recipe(recipe, "split_plan()"):
        plan = recipe.split_plan()
    if not isinstance(plan, Mapping) or not plan:
        raise UserError(f"{method} returned {plan!r:.60}; expected a dict of torch's ParallelStyle by names of modules")
    names, styles = [name for name, _ in model.named_modules()], dict[str, ParallelStyle]()
    for pattern, style in plan.items():
        if not isinstance(style, ParallelStyle):
            raise UserError(f"{method}[{pattern!r}] is {style!r:.60}; expected a torch.distributed ParallelStyle")
        if not any(matches_pattern(name, pattern) for name in names):
            raise UserError(f"{method}: no module of the model is named {pattern!r}")
        styles[pattern] = style
    try:
        parallelize_module(model, mesh, styles)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{method}: torch cannot split the model so: {error}") from error
    check_even_parts(model, method, mesh.size())
    return []


def matches_pattern(name: str, pattern: str) -> bool:
    """Return whether torch's parallelize_module applies the style of a pattern to a module."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatch, parts, wanted))


def check_even_parts(model: nn.Module, method: str, ranks: int) -> None:
    """Raise UserError unless parameters are split, and into equal parts, as torch assumes in backward."""
    split = [(name, p) for name, p in model.named_parameters() if is_split_dtensor(p)]
    if not split:
        raise UserError(f"{method} splits no parameter of the model: name modules such as Linear by ColwiseParallel()")
    for name, p in split:
        if local_tensor(p).numel() * ranks != p.numel():
            raise UserError(f"{method}: {name}, {tuple(p.shape)}, cannot be split into {ranks} equal parts")


def shard_blocks(recipe: Recipe, model: nn.Module, mesh: Any, flag: str) -> list[Any]:
    """Shard a recipe's blocks, and what is in none of them, by FSDP2; return the modules that it has wrapped."""
    from torch.distributed.fsdp import fully_shard

    blocks = find_blocks(recipe, model, flag)
    check_groups(model, blocks, flag)
    sharded: list[Any] = [*(block for block in blocks.values() if block is not model), model]
    for module in sharded:
        module.register_forward_hook(clone_views)
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # gradients are summed
        module.set_force_sum_reduction_for_comms(True)
    return sharded


def clone_views(module: nn.Module, inputs: object, outputs: Any) -> Any:
    """Return a module's outputs, none of which is a view: FSDP2 would miss the backward pass if one was changed."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x._is_view() else x, outputs)


def check_groups(model: nn.Module, blocks: Mapping[str, nn.Module], flag: str) -> None:
    """Raise UserError for parameters that FSDP2 cannot gather together, block by block."""
    owners = {id(p): name for name, block in blocks.items() for p in block.parameters()}
    dtypes: dict[str, torch.dtype] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        inside = next((block for block in blocks if name.startswith(f"{block}.")), "")
        owner = owners.get(id(p), "")
        if owner != inside:
            raise UserError(
                f"{flag}: {name} is a parameter of the block {owner!r} too: return blocks that share none, or leave "
                "that block out of blocks()"
            )
        if not p.is_contiguous():
            raise UserError(f"{flag}: {name} is not contiguous, which FSDP2 needs: leave out --channels-last")
        if p.dim() == 0:
            raise UserError(f"{flag}: {name} is a single number, which cannot be sharded: give it the shape (1,)")
        if dtypes.setdefault(owner, p.dtype) != p.dtype:
            raise UserError(f"{flag}: {name} is {p.dtype}, and others of its block {dtypes[owner]}: use one type")
