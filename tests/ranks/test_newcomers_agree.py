"""Newcomers of an elastic run train what the run began with: its copy of the recipe, and the same examples."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import elastic
from tests.ranks.elastic import ElasticJob, verify

RECIPE = f"""
from pathlib import Path
{Path(elastic.RECIPE).read_text().partition("from __future__ import annotations")[2]}
import shift

@dataclass(kw_only=True)
class Mine(SlowDigits):
    def dataset(self, split):
        data = super().dataset(split)
        images, labels = data.tensors
        data.tensors = (images + shift.BY + float((Path(__file__).parent / "data.txt").read_text()), labels)
        return data
"""


def test_a_newcomer_takes_the_run_s_copy_and_one_with_other_data_is_refused(tmp_path: Path) -> None:
    mine, data = tmp_path / "mine.py", tmp_path / "data.txt"
    mine.write_text(RECIPE)
    (tmp_path / "shift.py").write_text("BY = 0.5\n")
    data.write_text("0.25")
    with ElasticJob(tmp_path, "localhost:1", "--pause", "0.4", recipe=f"{mine}:Mine") as job:
        job.step(3)
        mine.write_text("def broken(:\n")
        (tmp_path / "shift.py").write_text("BY = 1.5\n")
        job.hosts("localhost:2")
        job.world(2)
        data.write_text("0.125")
        job.hosts("localhost:2 127.0.0.1:1")
        refused = "dataset('train')[0] differs from the run's"
        job.until(lambda: refused in job.said(), "refusal of the newcomer", hold=True)
        job.more(3)
        assert job.world_size() == 2
        job.end()
    assert (job.run_dir / "source" / "mine.py").read_text() == RECIPE
    assert (job.run_dir / "source" / "shift.py").read_text() == "BY = 0.5\n"
    assert job.summary()["membership_changes"] == 1
    verify(job.run_dir)
