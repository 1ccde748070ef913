"""The command ``student-train export``."""

from pathlib import Path
from typing import Literal

import click


@click.command()
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["onnx", "expanded"]), required=True, help="What to write.")
@click.option("--int8", is_flag=True, help="With onnx: also model.int8.onnx, about a quarter of the size.")
def export(student: Path, out: Path, form: Literal["onnx", "expanded"], int8: bool) -> None:
    """Write STUDENT (its folder, that of its phase, or of a run with one phase) in another form into the new folder OUT.

    onnx: model.onnx, run by onnxruntime alone. It takes the ids of the teacher's tokenizer; where the student keeps only some words, the
    map and the small table lie inside, so this is the size of such a student. The file is run and compared before it is put in place.
    Needs teachercache[export]. With --int8 a second file has its weights as int8 (dynamic quantisation); what that changes is printed.

    expanded: of a student that keeps only some words, a plain Hugging Face folder with all of them, as large as if none were dropped.
    """
    from online.models import ModelSpec, load_config, load_model
    from student_train.expand import expand
    from student_train.onnx_file import write_onnx
    from student_train.outline import folder_head
    from student_train.output import found_student

    if int8 and form != "onnx":
        raise ValueError("--int8 goes with --to onnx")
    folder = found_student(student)
    if out.exists():
        raise ValueError(f"{out} is there already: give the name of a new folder")
    dtype = "float32" if form == "onnx" else str(load_config(folder).dtype or "float32").removeprefix("torch.")
    loaded = load_model(ModelSpec.model_validate({"model": folder, "head": folder_head(folder), "dtype": dtype}))
    if form == "onnx":
        click.echo(write_onnx(loaded, out, int8=int8))
    else:
        expand(loaded, out)
        click.echo(f"{out}: expanded to {loaded.model.config.vocab_size:,} words, {loaded.model.num_parameters():,} parameters")
