"""What a dump must hold for recipes to run: the lines to put into a dump recipe, from shapes alone."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from store.features import FeatureKey
from store.intervention import Intervention
from store.remote import url_of
from store.together import names
from student_train.outline import Folders, Outline, outline
from student_train.recipe import TrainRecipe


def needs(recipes: Sequence[TrainRecipe], folders: Folders | None = None) -> str:
    """YAML for dump recipes, one document for each pass: store, pass_name, features and the blocks that students start from.

    Of several passes that are read as one it names the first: `teacher-dump add` finds out what is new.

    Args:
        folders: Of teachers (their configurations are enough), for stores and passes that do not exist yet.

    Raises:
        ValueError, StoreError: a recipe that does not fit its data or models.
    """
    features: dict[tuple[Path, str], set[FeatureKey]] = {}
    blocks: dict[tuple[Path, str], set[int]] = {}
    written: dict[tuple[Path, str], Intervention] = {}
    for recipe in recipes:
        for phase in recipe.phases:
            one = outline(recipe, phase, folders)
            for (store, pass_name), keys in one.passes.items():
                features.setdefault((store, names(pass_name)[0]), set()).update(keys)
            for _, method in one.methods:
                for name, intervention in method.interventions.items():
                    written |= {(data.store, names(data.answers[name])[0]): intervention for data in one.taught if name in data.answers}
            shipped = _shipped(one)
            if shipped is not None:
                blocks.setdefault(shipped, set()).update(one.blueprint.taken or (1,))  # embeddings and head come with any block
    if not features:
        return "# these recipes read no teacher's features\n"
    documents = []
    for store, pass_name in sorted(features, key=str):
        tree: dict[str, object] = {"store": str(url_of(store) or store), "pass_name": pass_name}
        if (store, pass_name) in written:
            tree["intervention"] = written[store, pass_name].model_dump(mode="json")
        tree["features"] = [str(key) for key in sorted(features[store, pass_name])]
        if starts := blocks.get((store, pass_name)):
            tree["ship_layers"] = sorted(starts)
        documents.append(yaml.safe_dump(tree, sort_keys=False))
    return "---\n".join(documents)


def _shipped(one: Outline) -> tuple[Path, str] | None:
    """The pass whose weights the student starts from, where no folder is given."""
    student = one.phase.student
    if (student.layers is None and student.width is None and student.rest == "random") or student.source is not None:
        return None
    return next(((data.store, names(data.compared_pass)[0]) for data in one.phase.data if data.answers), None)
