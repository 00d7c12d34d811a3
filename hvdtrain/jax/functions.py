"""A JAX recipe as pure functions over arrays by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from hvdtrain.bridge.compiled_now import compiled_now
from hvdtrain.bridge.functions import Array, Arrays, Batch, PureOptimizer, Returned, Tree, name_loss
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import describe_error, in_recipe, name_call

AMP_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


class NamedTree:
    """The structure of a tree of arrays, and a name for each of them: "conv.kernel".

    Random keys travel as the numbers that they are made of.

    Attributes:
        names: in the order of the tree's leaves.
    """

    def __init__(self, tree: Any, prefix: str = "") -> None:
        """Take the structure of a tree. Raises UserError if two of its arrays have one name."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        self._structure: Any = structure
        self.names = [join_path(prefix, path) for path, _ in paths]
        self._key_kinds = {
            name: jax.random.key_impl(leaf) for name, (_, leaf) in zip(self.names, paths, strict=True) if is_key(leaf)
        }
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"two arrays of the model are called {twice!r}, by keys joined with dots: rename one")

    def flatten(self, tree: Any) -> Arrays:
        """Return the arrays of a tree of this structure by name. Raises ValueError for one of another structure."""
        leaves, structure = jax.tree.flatten(tree)
        if structure != self._structure:
            raise ValueError(f"its structure is {structure}; expected {self._structure}")
        arrays = dict(zip(self.names, leaves, strict=True))
        return arrays | {name: jax.random.key_data(arrays[name]) for name in self._key_kinds}

    def unflatten(self, arrays: Arrays) -> Any:
        """Return the tree of these arrays."""
        keys = {name: jax.random.wrap_key_data(arrays[name], impl=kind) for name, kind in self._key_kinds.items()}
        return jax.tree.unflatten(self._structure, [keys.get(name, arrays[name]) for name in self.names])


def is_key(array: Any) -> bool:
    """Return whether an array is one of random keys."""
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.prng_key))


def join_path(prefix: str, path: Any) -> str:
    """Return the name of an array: the keys that lead to it, joined by dots."""
    keys = jax.tree_util.keystr(path, simple=True, separator=".")
    return ".".join(part for part in (prefix, keys) if part) or "params"


class JaxFunctions:
    """`hvdtrain.bridge.functions.Functions` of a JAX recipe."""

    def __init__(self, recipe: Any, entropy: NDArray[Any], amp: str) -> None:
        """Make the model and the optimizers.

        Raises UserError for what is not as it should be, and whatever the recipe's methods raise.
        """
        self.recipe, self._dtype = recipe, AMP_DTYPES.get(amp)
        trees = check_model(recipe, recipe.model(make_key(entropy)))
        params, rest = trees.pop("params"), trees
        self._params_tree, self._state_trees = NamedTree(params), {k: NamedTree(v, k) for k, v in rest.items()}
        self.params = self._params_tree.flatten(params)
        self.state = {n: a for key, tree in self._state_trees.items() for n, a in tree.flatten(rest[key]).items()}
        with in_recipe(recipe, "optimizer()"):
            returned = recipe.optimizer()
        self.several = isinstance(returned, dict)
        with in_recipe(recipe, "optimizer()"):
            self.optimizers: Mapping[str, PureOptimizer] = self._make_optimizers(returned, params)

    def _make_optimizers(self, returned: Any, params: Any) -> dict[str, PureOptimizer]:
        call, lr = name_call(self.recipe, "optimizer()"), self.recipe.lr
        parts: dict[str, Tree] = returned if self.several else {"": returned}
        for key, tx in parts.items():
            if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
                raise UserError(
                    f"{call} returned {f'{key!r}: ' if key else ''}{type(tx).__name__}; expected an "
                    "optax.GradientTransformation" + (": does it lack a return?" if tx is None else "")
                )
        if not self.several:
            return {"loss": OptaxOptimizer(call, returned, NamedTree(params), params, lr)}
        keys = list(params) if isinstance(params, Mapping) else []
        if sorted(map(str, parts)) != sorted(map(str, keys)):
            raise UserError(
                f"{call} returned optimizers for {', '.join(map(repr, parts)) or 'nothing'}; expected one for each "
                f"top-level key of params: {', '.join(map(repr, keys))}"
            )
        named = {key: NamedTree(params[key], str(key)) for key in parts}
        return {name_loss(key): OptaxOptimizer(call, parts[key], named[key], params[key], lr) for key in parts}

    def score(self, params: Arrays, state: Arrays, batch: Batch, entropy: Array | None) -> Returned:
        key = None if entropy is None else make_key(entropy)
        model = self._unflatten_model(self._cast(params), state)
        with compiled_now(self.recipe, training=key is not None):
            returned = self.recipe.score(model, self._cast(batch), key)
        is_pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)
        scores, others = returned if is_pair else (returned, {})
        scores = dict(scores) if isinstance(scores, Mapping) else scores
        changed = {k: v for k, v in others.items() if k in self._state_trees}
        outputs = {k: v for k, v in others.items() if k not in self._state_trees}
        if odd := [key for key, value in outputs.items() if not hasattr(value, "shape")]:
            raise UserError(
                f"{name_call(self.recipe, 'score()')} returned {odd[0]!r} next to the scores; expected what training "
                f"changes of the model ({', '.join(self._state_trees) or 'nothing'}), or an array (B, ...)"
            )
        return Returned(scores, state | self._flatten_state(changed, state), outputs or None)

    def outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        with compiled_now(self.recipe, training=False):
            returned = self.recipe.outputs(self._unflatten_model(self._cast(params), state), self._cast(batch))
        return dict(returned) if isinstance(returned, Mapping) else returned

    def export_model(self, params: Arrays, state: Arrays) -> dict[str, Tree]:
        copies = [{name: jnp.array(array, copy=True) for name, array in part.items()} for part in (params, state)]
        return self._unflatten_model(*copies)

    def _unflatten_model(self, params: Arrays, state: Arrays) -> dict[str, Tree]:
        rest = {key: tree.unflatten(state) for key, tree in self._state_trees.items()}
        return {"params": self._params_tree.unflatten(params), **rest}

    def _flatten_state(self, changed: Mapping[str, Tree], state: Arrays) -> Arrays:
        """Return collections that `score` has returned, by name, in the types that they had."""
        found: Arrays = {}
        for key, value in changed.items():
            try:
                new = self._state_trees[key].flatten(value)
            except ValueError as error:
                raise UserError(f"{name_call(self.recipe, 'score')} returned another {key!r}: {error}") from error
            for name, array in new.items():
                if jnp.shape(array) != state[name].shape:
                    raise UserError(
                        f"{name_call(self.recipe, 'score')} returned {name!r} of shape {jnp.shape(array)}; expected "
                        f"{state[name].shape}"
                    )
                found[name] = jnp.asarray(array, state[name].dtype)
        return found

    def _cast(self, tree: Any) -> Any:
        """Return a tree with numbers with a fraction in the type of --amp."""
        if self._dtype is None:
            return tree

        def cast_array(array: Any) -> Any:
            return array.astype(self._dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

        return jax.tree.map(cast_array, tree)


def make_key(entropy: Any) -> Array:
    """Return the random key of (2,) uint32."""
    return jax.random.wrap_key_data(jnp.asarray(entropy))


def check_model(recipe: Any, model: Any) -> dict[str, Tree]:
    """Return what `model` has returned, by collection. Raises UserError unless it has arrays, and "params"."""
    call = name_call(recipe, "model()")
    if not isinstance(model, Mapping) or "params" not in model:
        found = f"a dict of {', '.join(map(repr, model))}" if isinstance(model, Mapping) else type(model).__name__
        raise UserError(
            f'{call} returned {found}; expected {{"params": a tree of arrays that is trained}}, with other collections '
            "that training changes" + (": does it lack a return?" if model is None else "")
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(model))[0]:
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise UserError(
                f"{call} returned {join_path('', path)!r}, a {type(leaf).__name__}; expected arrays only: keep the "
                "rest on self (equinox: eqx.partition(model, eqx.is_inexact_array); nnx: nnx.split)"
            )
    if not jax.tree.leaves(model["params"]):
        raise UserError(f'{call} returned no array in "params": there is nothing to train')
    return {str(key): jax.tree.map(jnp.asarray, value) for key, value in model.items()}


class OptaxOptimizer:
    """`hvdtrain.bridge.functions.PureOptimizer` of optax."""

    def __init__(self, call: str, tx: optax.GradientTransformation, tree: NamedTree, params: Any, lr: float) -> None:
        """Initialize the optimizer. Raises UserError if gradients, state and parameters are not all that it needs.

        Args:
            call: of the recipe's method that has returned it.
            tx: the optimizer.
            tree: the structure of the parameters.
            params: of it.
            lr: the recipe's learning rate.
        """
        self._tx, self._params_tree = tx, tree
        state = jax.tree.map(jnp.asarray, tx.init(params))
        self._state_tree = NamedTree(state)
        try:
            jax.eval_shape(tx.update, params, state, params)
        except TypeError as error:
            if "required keyword-only" not in str(error):
                raise
            raise UserError(
                f"{call} returned an optimizer that needs more than gradients ({describe_error(error)}): expected one "
                "without a line search or the value of the loss"
            ) from error
        self.parameters: Sequence[str] = tree.names
        self.state = self._state_tree.flatten(state)
        injected = find_learning_rate(state)
        self._sets_rate = injected is not None
        self.lr = lr if injected is None else float(injected)

    def update(self, gradients: Arrays, state: Arrays, params: Arrays, factor: Array) -> tuple[Arrays, Arrays]:
        tree, old = self._params_tree.unflatten(params), self._state_tree.unflatten(state)
        if self._sets_rate:
            rate = optax.tree_utils.tree_get(old, "learning_rate")
            old = optax.tree_utils.tree_set(old, learning_rate=(self.lr * factor).astype(rate.dtype))
        changes, new = self._tx.update(self._params_tree.unflatten(gradients), old, tree)
        if not self._sets_rate:
            changes = jax.tree.map(lambda change: change * factor.astype(change.dtype), changes)
        updated: Arrays = self._params_tree.flatten(optax.apply_updates(tree, changes))
        return updated, self._state_tree.flatten(new)


def find_learning_rate(state: Any) -> Array | None:
    """Return the learning rate that optax.inject_hyperparams keeps in a state; None if there is none."""
    with contextlib.suppress(KeyError):  # several of them
        found: Array | None = optax.tree_utils.tree_get(state, "learning_rate")
        return found
    return None


def make_jax_functions(recipe: Any, entropy: NDArray[Any], amp: str, load_examples: Callable[[], Batch]) -> Any:
    """Return a JAX recipe's functions, and the backend that compiles them: `FunctionsFactory`."""
    from hvdtrain.bridge.jax_backend import JaxBackend

    return JaxFunctions(recipe, entropy, amp), JaxBackend()
