"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli_real import data as real_data
from foveate.cli_real import real_app
from foveate.errors import FoveateError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train and run vision-language models on fewer visual tokens.")
data_app = typer.Typer(no_args_is_help=True, help="Make data.")
app.add_typer(data_app, name="data")
app.add_typer(real_app, name="real")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"foveate {version('foveate')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


TilingOption = Annotated[
    str | None, typer.Option(help='Cut images so, such as "internvl:tiles=4"; for Foveate\'s own models, see docs/tilings.md.')
]
ImageSizeOption = Annotated[int | None, typer.Option(min=1, help="Make images so many pixels large; for Foveate's own models.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe, see docs/training.md.", metavar="RECIPE.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]…")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run a recipe, stage by stage. The same command goes on where an interrupted run was."""
    from accelerate import PartialState

    from foveate.train.run import main as run

    final = run(recipe, overrides or [])
    if PartialState().is_main_process:
        print(f"trained model: {final}")


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="A recipe, see docs/training.md; or a tiling, such as internvl:tiles=6.", metavar="RECIPE.yaml|TILING")
    ],
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option(help="Print JSON.")] = False,
    text_tokens: Annotated[int, typer.Option(min=0, help="Text tokens a sample, counted beside the visual ones.")] = 0,
    answer_tokens: Annotated[int | None, typer.Option(min=0, help="How many of these are supervised. Default: all.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Width and height of an image, such as 1000x500; of a tiling more than once: one prompt.")
    ] = None,
) -> None:
    """Tokens, parameters, FLOPs and memory of a recipe, per stage, or the views of a tiling; without any weights."""
    from foveate.inspect.views import main as views
    from foveate.inspect.views import read_size, tiling_named
    from foveate.train.plan import main as run

    sizes = [read_size(size) for size in image or []]
    if tiling_named(recipe):
        views(recipe, sizes or [(1000, 500)], json=json)
    else:
        size = sizes[-1] if sizes else None
        run(recipe, overrides or [], json=json, text_tokens=text_tokens, answer_tokens=answer_tokens, image=size)


@data_app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="OUT")],
    train: Annotated[int, typer.Option(min=1, help="Scenes for training.")] = 4000,
    test: Annotated[int, typer.Option(min=1, help="Scenes for testing.")] = 400,
    seed: Annotated[int, typer.Option(help="The world's seed.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of the pictures in pixels.")] = 128,
    detail: Annotated[int, typer.Option(min=1, help="So many times smaller things, for pictures of so many times as many pixels.")] = 1,
    video: Annotated[bool, typer.Option("--video", help="Scenes that move, as clips.")] = False,
    frames: Annotated[int | None, typer.Option(min=12, help="Of clips: how many frames, 8 a second. Default: 16.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of clips: mp4, or frames in folders. Default: mp4 where PyAV is there.")] = None,
) -> None:
    """Render the embedded world: scenes with captions, questions and answers in the LLaVA format."""
    if video and detail > 1:
        raise FoveateError(f"--detail {detail} is of scenes that stand still; leave it out beside --video")
    if not video and (frames or kind):
        raise FoveateError("--frames and --kind are of clips; give --video with them")
    if video:
        from foveate.world.films import FRAMES, write_films

        write_films(out, train=train, test=test, seed=seed, size=size, frames=frames or FRAMES, kind=kind)
        return
    from foveate.world.scenes import write_world

    write_world(out, train=train, test=test, seed=seed, size=size, detail=detail)


data_app.command("real")(real_data)


DataFile = Annotated[str, typer.Argument(help="Conversations as in training, or questions, see docs/at-scale.md.", metavar="DATA")]
ModelOption = Annotated[str, typer.Option(help="A model folder, a hub name or asset:vlm.")]
ImagesOption = Annotated[
    str | None, typer.Option(help="Folder of the images. Default: images beside the file, or the file's own.", metavar="DIR")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows that are done together, and lost together by a kill.")]
EngineOptions = Annotated[str | None, typer.Option(help="Of vllm: such as '{\"max_model_len\": 8192}'.", metavar="JSON")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


@app.command()
def generate(
    data: DataFile,
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder of the answers; the same command goes on with what is there.")],
    reduce: Annotated[str | None, typer.Option(help="Such as divprune:keep=0.25. Default: what the model's foveate.json says.")] = None,
    images: ImagesOption = None,
    engine: Annotated[str, typer.Option(help="transformers, ray or vllm.")] = "transformers",
    workers: Annotated[int | None, typer.Option(min=1, help="Of ray: actors that hold the model. Default: one a GPU, or one.")] = None,
    engine_options: EngineOptions = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    batch_size: BatchOption = 16,
    dtype: DtypeOption = "float32",
    frames: Annotated[str | None, typer.Option(help="Which frames of clips are shown. Default: uniform:frames=8.")] = None,
) -> None:
    """Answer a file of questions about images and clips into a file of answers; by several processes under `accelerate launch`."""
    from foveate.batch import Job, told
    from foveate.batch import generate as run

    job = Job(data, model, reduce, images, max_new_tokens, batch_size, dtype, frames)
    done = run(job, out, engine=engine, workers=workers, options=_json(engine_options, "--engine-options"))
    if done is not None:
        print(told(done))


@app.command()
def encode(
    data: DataFile,
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder of the embeddings; the same command goes on with what is there.")],
    reduce: Annotated[str | None, typer.Option(help="Such as divprune:keep=0.25. Default: what the model's foveate.json says.")] = None,
    images: ImagesOption = None,
    batch_size: BatchOption = 16,
    dtype: DtypeOption = "float32",
) -> None:
    """Write what a reducer leaves of the embeddings of a file's images; by several processes under `accelerate launch`."""
    from foveate.batch import Job, told
    from foveate.batch import encode as run

    done = run(Job(data, model, reduce, images, batch_size=batch_size, dtype=dtype), out)
    if done is not None:
        print(told(done))


def _json(text: str | None, option: str) -> dict[str, Any] | None:
    import json

    try:
        given = None if text is None else json.loads(text)
    except ValueError as error:
        raise FoveateError(f"{option} {text!r} is not JSON: {error}") from None
    if not isinstance(given, dict | None):
        raise FoveateError(f'{option} {text!r} must be an object, such as {{"max_model_len": 8192}}')
    return given


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or asset:vlm.", metavar="MODEL")],
    data: Annotated[Path, typer.Option(help="A world made by `foveate data scenes`.")],
    reducers: Annotated[str | None, typer.Option(help='For example "vcc:layer=2,stride=4".')] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    blind: Annotated[bool, typer.Option(help="Show a grey image instead: what can be guessed without looking.")] = False,
    strategy: Annotated[str | None, typer.Option(help='Answer in several passes, such as "zoomeye:nodes=20" or "vcd".')] = None,
    frames: Annotated[str, typer.Option(help="Of clips: which frames are shown, see docs/video.md.")] = "uniform:frames=8",
    dtype: DtypeOption = "float32",
    output: Annotated[Path | None, typer.Option(help="Write all answers to this JSON file.")] = None,
) -> None:
    """Accuracy per family of questions, beside the majority answer."""
    from foveate.evaluation.evaluate import evaluate as run
    from foveate.evaluation.evaluate import print_result

    how: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "blind": blind, "strategy": strategy, "frames": frames, "dtype": dtype}
    result = run(model, data, reducers=reducers, **how)
    if output is not None:
        result.save(output)
    print_result(result)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or asset:vlm.", metavar="MODEL")],
    tasks: Annotated[list[str], typer.Option(help="Questions with a metric, see docs/bench.md; may be given more than once.")],
    out: Annotated[Path, typer.Option(help="Folder of the answers and the report; the same command goes on with what is there.")],
    reduce: Annotated[list[str] | None, typer.Option(help='For example "fastv:layer=3"; may be given more than once.')] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help='Thin the KV cache so, such as "snapkv:window=32", see docs/cache.md; may be given more than once.'),
    ] = None,
    keep: Annotated[str, typer.Option(help="Budgets, as shares of the visual tokens; 1 is the bare model.")] = "1,0.5,0.25,0.11,0.05",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of methods that draw at random.")] = 3,
    baselines: Annotated[bool, typer.Option(help="Random, evenly spaced, and a smaller image beside the reducers.")] = True,
    blind: Annotated[bool, typer.Option("--blind", help="Grey images, too: what the bare model guesses without looking.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Only about so many questions of each task.")] = None,
    tiling: TilingOption = None,
    image_size: ImageSizeOption = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float16. Default: float32; vllm's is an engine option.")] = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    engine_options: EngineOptions = None,
    push_to_model_card: Annotated[
        Path | None, typer.Option(help="Write the table into this Markdown file; nothing is uploaded.", metavar="FILE")
    ] = None,
) -> None:
    """Accuracy against cost: a model under many reducers and budgets, every answer kept, with tests against the bare model."""
    from foveate.evaluation.bench import bench as run
    from foveate.evaluation.bench import budgets
    from foveate.evaluation.table import push_to_model_card as push
    from foveate.report.bench import write_bench_report

    how: dict[str, Any] = {"seeds": seeds, "baselines": baselines, "blind": blind, "batch_size": batch_size, "limit": limit}
    how |= {"tiling": tiling, "image_size": image_size, "dtype": dtype, "cache": cache or ()}
    found = run(_asked(model, engine, _json(engine_options, "--engine-options")), tasks, reduce or [], budgets(keep), out, **how)
    if push_to_model_card is not None:
        push(found, push_to_model_card)
    print(write_bench_report(found.folder))


def _asked(model: str, engine: str, options: dict[str, Any] | None) -> Any:
    """Whom bench asks: the model in this process, or a serving engine."""
    from foveate.batch import OnVLLM
    from foveate.errors import nearest

    if engine not in ("transformers", "vllm"):
        raise FoveateError(f"engine={engine} is not known{nearest(engine, ('transformers', 'vllm'))}; choose transformers or vllm")
    if engine == "vllm":
        return OnVLLM(model, options)
    if options is not None:
        raise FoveateError("engine options are of the engine vllm")
    return model


@app.command()
def look(
    words: Annotated[
        list[str],
        typer.Argument(
            help="A model folder, a hub name or asset:vlm, which is the model if none is named; then image files, or scene:7 for the "
            "embedded test scene of that number.",
            metavar="[MODEL] IMAGE",
        ),
    ],
    ask: Annotated[str, typer.Option(help="The question about the images.")],
    reduce: Annotated[list[str] | None, typer.Option(help='For example "fastv:keep=0.25"; may be given more than once.')] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help='Draw how the picture is searched, such as "zoomeye:nodes=20"; may be given more than once.'),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Budgets, such as 0.5,0.25,0.11: each reducer with every one of them, in a row.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Decoder layers, such as 0,2,4, in front of which to look.")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Look in front of every layer at which the set changes.")] = False,
    tiling: TilingOption = None,
    frames: Annotated[
        str | None, typer.Option(help='The image is a film, or a folder of its frames: which of them, such as "uniform:frames=8".')
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("look.png"),
) -> None:
    """Draw which patches of an image the reducers keep or merge, or how strategies search it, with the model's answers."""
    from foveate.inspect.look import main as run

    print(run(words, ask, reduce or [], keep, layer or [], per_layer, out, tiling, strategy or [], frames))


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or asset:vlm.", metavar="MODEL")],
    tasks: Annotated[list[str], typer.Option(help="Questions to calibrate on, see docs/bench.md; may be given more than once.")],
    out: Annotated[Path, typer.Option(help="Folder of the schedule and its trials; the same command goes on with what is there.")],
    tokens: Annotated[float | None, typer.Option(help="Budget: the share of the visual tokens that may stay, mean over layers.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: the share of the decoder layers' FLOPs in the prefill.")] = None,
    loss: Annotated[float | None, typer.Option(help="No budget: as few tokens as lose at most so many points of the score.")] = None,
    method: Annotated[str | None, typer.Option(help="gsearch or psigmoid; psigmoid where there is a budget.")] = None,
    signal: Annotated[str, typer.Option(help="What ranks the tokens: attention, cls, random or uniform.")] = "attention",
    positions: Annotated[str, typer.Option(help="Of the tokens that stay: keep or renumber.")] = "keep",
    trials: Annotated[int, typer.Option(min=1, help="Schedules that psigmoid tries.")] = 40,
    samples: Annotated[int, typer.Option(min=1, help="About so many questions of each task.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of psigmoid's optimiser.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    image_size: ImageSizeOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """The best schedule of visual tokens over a model's layers, within a budget or without loss, as a reducer to attach."""
    from foveate.search.run import main as run

    how = {"method": method, "signal": signal, "positions": positions, "trials": trials, "samples": samples, "seed": seed}
    how |= {"batch_size": batch_size, "image_size": image_size, "dtype": dtype}
    print(run(model, tasks, out, tokens=tokens, flops=flops, loss=loss, **how))


@app.command()
def reproduce(
    table: Annotated[str | None, typer.Argument(help="A published table, or a YAML file; none lists them.", metavar="[TABLE]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; may be given more than once.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Only this benchmark; GQA=gqa_lite asks another task of lmms-eval. May be given more than once."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another checkpoint: a hub name, a model folder or asset:vlm.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; the same command goes on. Default: runs/reproduce/TABLE.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each benchmark; nothing is judged then.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it takes, and stop.")] = False,
    tflops: Annotated[float | None, typer.Option(help="This machine's rate, for the time that is shown.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure that rate on a few questions first.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before downloading and running.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one, else the CPU.")] = None,
    include_path: Annotated[str | None, typer.Option(help="A folder of lmms-eval tasks of your own.", metavar="DIR")] = None,
) -> None:
    """Run a published table on your weights, by lmms-eval. Exit code 1: a judged number lies outside its tolerance; 0: none does."""
    from foveate.reproduce.run import Choice, How
    from foveate.reproduce.run import main as run

    choice = Choice(tuple(only or ()), tuple(task or ()), model, limit, batch_size, device, include_path)
    raise typer.Exit(run(table, out, choice, How(plan, yes, probe, tflops)))


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or asset:vlm.", metavar="MODEL")],
    reduce: Annotated[list[str] | None, typer.Option(help='For example "fastv:keep=0.25"; may be given more than once.')] = None,
    image: Annotated[list[str] | None, typer.Option(help="An image file, or scene:7; may be given more than once.")] = None,
    ask: Annotated[str, typer.Option(help="The question about the images.")] = "what is in the picture?",
    frames: Annotated[str | None, typer.Option(help='The image is a film: which of its frames, such as "uniform:frames=8".')] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; medians are shown.")] = 5,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one, else the CPU.")] = None,
    json: Annotated[bool, typer.Option(help="Print JSON.")] = False,
) -> None:
    """What a prompt costs on this machine, predicted beside measured: FLOPs, tokens, KV cache, time to the first token, memory."""
    from foveate.inspect.profile import main as run

    how: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "device": device, "json": json, "frames": frames}
    run(model, reduce or [], image or ["scene:7"], ask, **how)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A Foveate model with an MLP bridge: a folder or a hub name.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="Folder to write to, new or empty.", metavar="OUT")],
) -> None:
    """Write a model as transformers' own LLaVA, which loads without foveate."""
    from foveate.inference import load_model
    from foveate.model.export import export as run

    print(run(*load_model(model, "cpu", dtype="auto"), out))


@app.command()
def presets(
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, a hub name, asset:vlm or a model type, such as llava; none lists all.", metavar="[MODEL]"),
    ] = None,
    json: Annotated[bool, typer.Option(help="Print JSON.")] = False,
) -> None:
    """Settings that measurements speak for on a model's family, with the measurements; attach(model, "preset:balanced") takes one."""
    from foveate.inspect.presets import main as run

    run(model, json=json)


@app.command("list")
def list_methods() -> None:
    """The reducers and bridges with their papers and what they need, and the architectures that are tested."""
    from foveate.inspect.catalogue import print_catalogue

    print_catalogue()


def main(argv: list[str] | None = None) -> Any:
    """Exit code 0, or 2 with one message for bad input; 1 of `reproduce` where a number lies outside its tolerance."""
    try:
        return app(args=argv, standalone_mode=True)
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        _ends_with(2)
        sys.exit(2)
    except SystemExit as end:
        _ends_with(end.code)
        raise


def _ends_with(code: Any) -> None:
    if together := sys.modules.get("foveate.processes"):  # a command that has not asked for them works alone
        together.ends_with(code)


if __name__ == "__main__":
    main()
