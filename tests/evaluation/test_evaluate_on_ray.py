"""The same evaluation on the actors of a cluster."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.evaluation import evaluate, read_tables, resolve_evaluation
from pipeline.ray_runner import evaluate_on_ray
from tests.evaluation.corpora import config, write_images
from tests.evaluation.models import save_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.slow
def test_actors_give_the_same_tables_and_summary_as_one_process(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    shard = write_images(tmp_path / "in", num_images=11, broken=2)
    folders = tmp_path / "here", tmp_path / "there"
    here, there = (config(tmp_path / "model", shard, folder, batch_size=3) for folder in folders)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor

    alone = evaluate(resolve_evaluation(here), device="cpu")
    spread = evaluate_on_ray(resolve_evaluation(there))

    torch.set_num_threads(threads)
    for one, other in zip(read_tables(folders[0]), read_tables(folders[1]), strict=True):
        timed = [name for name in one.column_names if name == "carve_s"]
        assert other.drop_columns(timed).equals(one.drop_columns(timed))
    assert spread["rejected"] == alone["rejected"] == {"corrupt_image": 2}
    assert spread["information"] == alone["information"]


@pytest.mark.slow
def test_weights_that_an_actor_cannot_load_are_a_configuration_error(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    shard = write_images(tmp_path / "in")
    asked = config(tmp_path / "model", shard, tmp_path / "out")
    task = resolve_evaluation(asked)
    (tmp_path / "model" / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match="cannot be loaded"):
        evaluate_on_ray(task)
