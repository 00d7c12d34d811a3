"""What a run leaves for TensorBoard: scalars by groups, options, and what the recipe writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.tensorboard import tensorboard
from tests.support.worlds import KeptWorld, train

RECIPES = Path(__file__).parent / "ending_early_recipes.py"


def test_the_runs_folder_has_scalars_options_and_the_recipes_own(world2: KeptWorld, tmp_path: Path) -> None:
    train(world2, f"{RECIPES}:Draws", tmp_path / "run", "--steps", "4", "--log-every", "2", "--seed", "7")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    expected = {"train/loss", "train/lr", "train/epoch", "eval/loss"}
    expected |= {"speed/samples_per_second", "speed/comm_seconds", "own/passes"}
    assert set(events.Tags()["scalars"]) == expected
    assert [image.step for image in events.Images("weights")] == [2, 4]
    assert [text.step for text in events.Tensors("note/text_summary")] == [102, 104]
    # Rank 0's alone, and not those of the trial and of the graph.
    assert [scalar.step for scalar in events.Scalars("own/passes")] == [0, 1, 2, 3]
    found = {}
    for tag in (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG):
        data = events.SummaryMetadata(tag).plugin_data
        assert data.plugin_name == metadata.PLUGIN_NAME
        found[tag] = plugin_data_pb2.HParamsPluginData.FromString(data.content)
    options = found[metadata.SESSION_START_INFO_TAG].session_start_info.hparams
    assert options["recipe.lr"].number_value == 0.1 and options["run.seed"].number_value == 7
    assert options["recipe.schedule"].string_value == "constant" and not options["run.compile"].bool_value
    metrics = found[metadata.EXPERIMENT_TAG].experiment.metric_infos
    assert [info.name.tag for info in metrics] == ["train/loss", "eval/loss"]


def test_before_training_there_is_nothing_to_write_to() -> None:
    from hvdtrain.recipe.base import Recipe

    recipe = Recipe()
    for rank in range(2):
        set_now(recipe, Now.before_training(Path("/nowhere"), rank, 2))
        with pytest.raises(AttributeError, match=r"^now\.step is not known before training$"):
            tensorboard(recipe).add_scalar("own/passes", 1.0)
