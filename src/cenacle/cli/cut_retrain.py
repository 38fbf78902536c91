"""``cenacle cut retrain`` and ``export``: a tail trained on private data, and ready to serve."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
import yaml

from cenacle.cli.cut import InputOption, ModelArgument, WeightsOption, open_model
from cenacle.cli.cut_samples import parse_classes, parse_feeds, read_tensors
from cenacle.cli.home import write_file
from cenacle.cli.output import JsonOption, errors_in_words, finish, line, progress_bar
from cenacle.documents.base import format_time
from cenacle.errors import ConflictError, InputError

if TYPE_CHECKING:
    from cenacle.cut.rehearsal import Rehearsal
    from cenacle.cut.retraining import PreparedTail

__all__ = ["export", "retrain"]

_FILES: Final = ("front.onnx", "front.safetensors", "weights.safetensors", "job.yaml")


def retrain(
    model: ModelArgument,
    at: Annotated[str, typer.Option(metavar="LAYER", help="The last public, frozen layer.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="A folder for what is to be sealed."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Labels, such as 0-9; with --data those that occur.")
    ] = None,
    head: Annotated[
        Literal["fresh", "kept", "linear", "dense"],
        typer.Option(
            help="fresh: a new last layer on the tail's others; kept: the tail as it is; linear: "
            "one linear layer instead of it; dense: a hidden layer of 128 and a linear one."
        ),
    ] = "fresh",
    fold_norms: Annotated[
        bool,
        typer.Option(help="Freeze batch normalization into the layers before it."),
    ] = False,
    samples: Annotated[str, typer.Option(help="The tensor of samples.")] = "images",
    labels: Annotated[str, typer.Option(help="The tensor of labels.")] = "labels",
    feed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=TENSOR", help="What feeds a further input of the front. Repeatable."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on every element of a sample.")] = 1.0,
    integers: Annotated[bool, typer.Option(help="Samples stay integers, such as words.")] = False,
    standardize: Annotated[bool, typer.Option(help="Standardize what crosses.")] = False,
    epochs: Annotated[
        int, typer.Option(min=1, max=10_000, help="How often each sample is learnt.")
    ] = 5,
    learning_rate: Annotated[float, typer.Option(min=1e-9, max=100.0, help="Of Adam.")] = 0.001,
    batch_size: Annotated[int, typer.Option(min=1, max=65_536, help="Samples a step.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Differential privacy: what the tail may tell of one record."),
    ] = None,
    delta: Annotated[float, typer.Option(help="Of the same promise.")] = 1e-5,
    clipping_norm: Annotated[float, typer.Option(help="Of each record's gradient.")] = 1.0,
    sampling: Annotated[float, typer.Option(help="How often a record joins a step.")] = 0.05,
    owner: Annotated[str, typer.Option(help="Whose data it will be.")] = "owner",
    vendor: Annotated[str, typer.Option(help="Who gets the trained tail.")] = "vendor",
    purpose: Annotated[str, typer.Option(help="What the contract will say.")] = "a tail of a model",
    local: Annotated[
        bool, typer.Option("--local", help="Train here and now, WITHOUT an enclave.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="With --local: samples and labels, .npz or .safetensors.")
    ] = None,
    compare_whole: Annotated[
        bool, typer.Option("--compare-whole", help="With --local: train the uncut model, too.")
    ] = False,
    weights: WeightsOption = None,
    input_: InputOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of an earlier call.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Freeze a model's front, and make a job that trains its tail on somebody's sealed data.

    Writes the front (front.onnx for whoever serves, front.safetensors to be
    sealed), the tail's initial weights to be sealed, and job.yaml for
    `cenacle draft`. With --local the same recipe runs here, for rehearsal.
    """
    with errors_in_words(json_):
        _check_options(out, local=local, data=data, compare_whole=compare_whole)
        tensors = read_tensors(data) if data is not None else None
        found_labels = _classes(classes, tensors, labels)
        with progress_bar(f"reading {Path(model).name}", not json_) as bar:
            from cenacle.cut.retraining import prepare

            source, _ = open_model(model, weights, input_)
            bar.step("cutting")
            prepared = prepare(
                source,
                at,
                len(found_labels),
                head=head,
                fold_norms=fold_norms or epsilon is not None,
                seed=seed,
            )
            recipe: dict[str, Any] = {
                "task": "classification",
                "data": {
                    "form": "tensors",
                    "assets": ["data"],
                    "inputs": samples,
                    "labels": labels,
                    "classes": found_labels,
                    "scale": scale,
                    "standardize": standardize,
                    "integers": integers,
                    "front": prepared.front_fields("front", prepared.cut.front.digest)
                    | ({"inputs": parse_feeds(feed)} if feed else {}),
                },
                "model": prepared.model_fields("weights" if prepared.graph.tensors else None),
                "optimizer": {"type": "adam", "learning_rate": learning_rate},
                "epochs": epochs,
                "batch_size": batch_size,
                "seed": seed,
                "holdout": {"fraction": 0.2} if epsilon is None else {"fraction": 0.0},
            }
            plan = None
            if epsilon is not None:
                plan = {
                    "epsilon": epsilon,
                    "delta": delta,
                    "clipping_norm": clipping_norm,
                    "sampling_probability": sampling,
                }
            _check_recipe(recipe)
            fields = _described(prepared)
            if out is not None:
                bar.step("writing")
                job = _draft(recipe, plan, owner, vendor, purpose)
                fields["files"] = _write(prepared, job, out, owner, vendor, force=force)
            if local and tensors is not None:
                bar.step("training here, without an enclave")
                done = _rehearse(
                    prepared, recipe, plan, tensors, source if compare_whole else None, bar.report
                )
                fields["local"] = _local_fields(done)
                if out is not None:
                    write_file(out / "rehearsed.safetensors", done.model_file, 0o600)
                    fields["local"]["model"] = str(out / "rehearsed.safetensors")
        finish(fields, json_, lambda: _show(fields, at, owner, vendor))


def _check_options(
    out: Path | None, *, local: bool, data: Path | None, compare_whole: bool
) -> None:
    if local is not (data is not None):
        raise InputError(
            "--local and --data come together",
            expected="both to train here, or neither to make a job",
            remedy="data that others own is sealed by them, and never read here",
        )
    if compare_whole and not local:
        raise InputError("--compare-whole trains here", expected="--local with it")
    if out is None and not local:
        raise InputError("it is not said what to do", expected="--out DIR, or --local --data FILE")


def _classes(text: str | None, tensors: dict[str, Any] | None, labels: str) -> list[int]:
    if text is not None:
        return parse_classes(text)
    if tensors is None:
        raise InputError("the classes are not said", expected="--classes, such as 0-9")
    import numpy as np

    if labels not in tensors or tensors[labels].dtype.kind not in "iu":
        raise InputError(
            f"the data has no tensor {labels!r} of integer labels",
            found=", ".join(sorted(tensors))[:200],
            remedy="name it by --labels",
        )
    found = [int(label) for label in np.unique(tensors[labels])]
    return parse_classes(",".join(map(str, found)))


def _check_recipe(fields: dict[str, Any]) -> None:
    from cenacle.documents.recipe import Recipe

    Recipe.from_fields(fields)


def _described(prepared: PreparedTail) -> dict[str, Any]:
    cut = prepared.cut
    return {
        "layer": cut.layer,
        "crossing": prepared.crossing.to_fields(),
        "front": {"digest": cut.front.digest, "parameters": len(cut.public_parameters)},
        "tail": {
            "layers": [node.op for node in prepared.graph.nodes],
            "numbers": prepared.graph.parameters or None,
        },
    }


def _draft(
    recipe: dict[str, Any], plan: dict[str, Any] | None, owner: str, vendor: str, purpose: str
) -> dict[str, Any]:
    assets = {"data": "data.safetensors", "front": "front.safetensors"}
    if recipe["model"].get("initial_weights") is not None:
        assets["weights"] = "weights.safetensors"
    outputs = [{"name": "model", "kind": "model", "recipient": vendor}]
    if plan is None:
        outputs.append({"name": "metrics", "kind": "metrics", "recipient": vendor})
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=365)
    return {
        "name": "retrained-tail",
        "purpose": purpose,
        "parties": [owner, vendor],
        "assets": {alias: f"{name}.sealed.asset.json" for alias, name in assets.items()},
        "job": {"type": "recipe", "recipe": recipe},
        **({} if plan is None else {"privacy": plan}),
        "outputs": outputs,
        "approval": {"all_of": [owner, vendor]},
        "expires": format_time(expires),
    }


def _write(
    prepared: PreparedTail, job: dict[str, Any], out: Path, owner: str, vendor: str, *, force: bool
) -> dict[str, str]:
    from cenacle.cut.tail_file import write_tail

    taken = [name for name in _FILES if (out / name).exists()]
    if taken and not force:
        raise ConflictError(
            "the folder holds the files of an earlier call",
            found=", ".join(str(out / name) for name in taken),
            remedy="choose another folder, or --force to replace them",
        )
    out.mkdir(parents=True, exist_ok=True)
    prepared.cut.front.save(out / "front.onnx")
    write_tail(prepared.cut.front, out / "front.safetensors")
    if prepared.graph.tensors:
        write_file(out / "weights.safetensors", prepared.weights_file())
    text = (
        f"# {vendor} seals front.safetensors and weights.safetensors, {owner} seals the data\n"
        "# (`cenacle seal`); correct the paths of their manifests below, then `cenacle draft`.\n"
    )
    write_file(out / "job.yaml", (text + yaml.safe_dump(job, sort_keys=False)).encode())
    return {
        name: str(out / name)
        for name in _FILES
        if name != "weights.safetensors" or prepared.graph.tensors
    }


def _rehearse(
    prepared: PreparedTail,
    recipe: dict[str, Any],
    plan: dict[str, Any] | None,
    tensors: dict[str, Any],
    whole: Any,
    report: Any,
) -> Rehearsal:
    from cenacle.cli.privacy import completed_plan
    from cenacle.cut.rehearsal import rehearse_tail
    from cenacle.documents.privacy import PrivacyPlan
    from cenacle.documents.recipe import Recipe

    private = None
    if plan is not None:
        job = {"type": "recipe", "recipe": recipe}
        private = PrivacyPlan.from_fields(completed_plan(plan, job))
    return rehearse_tail(
        prepared,
        Recipe.from_fields(recipe),
        tensors,
        plan=private,
        whole=whole,
        progress=report,
    )


def _local_fields(done: Rehearsal) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "enclave": False,
        "accuracy": done.accuracy,
        "rows": {"training": done.rows[0], "held_out": done.rows[1]},
        "seconds": round(done.seconds, 2),
    }
    if done.whole is not None:
        fields["whole"] = {
            "accuracy": done.whole.accuracy,
            "seconds": round(done.whole.seconds, 2),
            "why_not": done.whole.why_not,
        }
    return fields


def _show(fields: dict[str, Any], at: str, owner: str, vendor: str) -> None:
    spec = fields["crossing"]
    sizes = " x ".join(str(size) for size in spec["shape"][1:])
    line(f"frozen up to {at}; {spec['name']} crosses: {sizes} numbers of {spec['dtype']} a sample")
    numbers = fields["tail"]["numbers"]
    line(
        f"the tail has {len(fields['tail']['layers'])} layers"
        + ("" if numbers is None else f" and {numbers:,} numbers, all trained")
    )
    for name, path in fields.get("files", {}).items():
        what = {
            "front.onnx": "public; whoever serves or asks the tail runs it",
            "front.safetensors": f"the same, packed: {vendor} seals it",
            "weights.safetensors": f"where training starts: {vendor} seals it",
            "job.yaml": f"correct its paths; {owner} seals the data; then `cenacle draft`",
        }[name]
        line(f"{path}  {what}")
    if (done := fields.get("local")) is not None:
        line("TRAINED HERE, WITHOUT AN ENCLAVE: nothing protected these samples from this machine")
        rows = done["rows"]
        line(
            f"accuracy {done['accuracy']:.1%} on {rows['held_out']} held-out samples, after "
            f"{rows['training']} in {done['seconds']:.1f} s"
        )
        whole = done.get("whole")
        if whole is not None and whole["accuracy"] is not None:
            line(
                f"the uncut model, all layers trained by the same recipe: "
                f"{whole['accuracy']:.1%} on the same samples, in {whole['seconds']:.1f} s"
            )
        elif whole is not None:
            line(f"the uncut model is not comparable: {whole['why_not']}")


def export(
    model: Annotated[Path, typer.Argument(help="A trained model that `cenacle open` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the tail goes.")],
    front: Annotated[
        Path | None, typer.Option(help="The front.onnx that it was trained behind, if it was.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option(help="End with a softmax: answers are probabilities.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier tail.")] = False,
    json_: JsonOption = False,
) -> None:
    """Make a trained model a tail that `cenacle seal` seals and `cenacle serve` serves."""
    with errors_in_words(json_):
        from cenacle.cut.onnx_model import OnnxModel
        from cenacle.cut.retraining import export_tail
        from cenacle.cut.tail_file import write_tail

        if not model.is_file():
            raise InputError("the model is not there", found=str(model))
        path = out / "tail.safetensors"
        if path.exists() and not force:
            raise ConflictError(
                "the folder holds a tail already",
                found=str(path),
                remedy="choose another folder, or --force to replace it",
            )
        public = None if front is None else OnnxModel.load(front)
        tail = export_tail(model.read_bytes(), front=public, probabilities=probabilities)
        out.mkdir(parents=True, exist_ok=True)
        digest = write_tail(tail, path)
        fields: dict[str, Any] = {
            "tail": {"path": str(path), "digest": digest},
            "front": None if public is None else public.digest,
            "inputs": [spec.to_fields() for spec in tail.inputs],
            "outputs": [spec.to_fields() for spec in tail.outputs],
        }

        def show() -> None:
            line(f"tail   {path}  is SECRET and not yet encrypted: seal it, then delete it")
            line(f"       cenacle seal {path} --type model --terms terms.yaml --as PARTY")
            if public is not None:
                line(f"front  {front}  {public.digest}, for the serving contract")

        finish(fields, json_, show)
