"""Trainings with parameter servers, one after the other in one MPI job: ARGS are FOLDER RECIPE SERVERS STALENESS..."""

import sys
from pathlib import Path

import hvdtrain
from tests.ranks import server_recipes

folder, recipe, servers, *policies = sys.argv[1:]
for staleness in policies:
    summary = hvdtrain.fit(
        getattr(server_recipes, recipe)(),
        server=int(servers),
        staleness=staleness,
        run_dir=Path(folder) / staleness.replace(":", "-"),
        log_every=1,
        threads=1,
        quiet=True,
    )
    assert summary["finished"] and summary["service"]["staleness"] == staleness, summary
