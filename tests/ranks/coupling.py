"""Run on 4 MPI processes by test_mpi_coupling.py: two trainings side by side, coupled to the program around them."""

import sys
from pathlib import Path

from mpi4py import MPI

import hvdtrain
from hvdtrain.recipe.registry import load_recipe

WORLD = MPI.COMM_WORLD
COLOR = WORLD.rank % 2
FOLDER = Path(sys.argv[1])

cls = load_recipe(sys.argv[2])
part = WORLD.Split(COLOR, WORLD.rank)
summary = hvdtrain.fit(cls(lr=0.003 if COLOR else 0.001), comm=part, run_dir=FOLDER / str(COLOR), steps=30, log_every=1)
assert summary["world_size"] == 2, summary
# The outer program's MPI still works, and so does a second training, on another communicator.
losses = WORLD.allgather(summary["eval"]["loss"])
assert losses[0] == losses[2] != losses[1] == losses[3], losses
summary = hvdtrain.fit(cls(), comm=WORLD, run_dir=FOLDER / "all", steps=30, log_every=1)
assert summary["world_size"] == 4, summary
