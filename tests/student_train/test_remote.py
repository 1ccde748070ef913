"""Training from object storage: loader processes are forked from one that has read there already."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader

from store import cache, remote
from store.features import FeatureKey
from store.reader import Store
from store.transfer import upload
from student_train.data import Failed, MicroBatches, Source
from student_train.teacher import StoredTeacher

WANTED = (FeatureKey("hidden", 2), FeatureKey("task_logits", positions="row"))


def _object_storage() -> ModuleType:
    path = Path(__file__).parents[1] / "store" / "object_storage.py"
    spec = importlib.util.spec_from_file_location("object_storage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_in_object_storage_gives_the_batches_of_the_local_one(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    storage = _object_storage()
    with storage.s3_server() as port:
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
        environment |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", cache.FOLDER: str(tmp_path), remote.SECONDS: "30"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        storage.make_bucket(port, "bucket")
        upload(taught, "s3://bucket/taught", lambda done, total: None)
        found = {}
        for place in (taught, Path("s3://bucket/taught")):
            store = Store.open(place)
            source = Source(store, StoredTeacher(store, "bert", WANTED), pass_name="bert")
            items = MicroBatches([source], batch_rows=8, accumulation=1, steps=6, epochs=None, seed=3)
            loader = DataLoader(items, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None)
            found[place] = [item for item in loader]
    for local, there in zip(*found.values(), strict=True):
        assert not isinstance(local, Failed)
        assert not isinstance(there, Failed), there.error
        assert torch.equal(local.batch.input_ids, there.batch.input_ids)
        for key, arrays in local.fetched.items():
            assert all(array.tobytes() == there.fetched[key][name].tobytes() for name, array in arrays.items())
