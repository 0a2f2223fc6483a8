"""The stages of a recipe one after the other, as configurations: what each begins with, and whether the model has all that it asks for.

Nothing here needs weights. `foveate train` takes this walk before its first step, and `foveate plan` takes the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

import foveate.model  # noqa: F401  registers the Auto classes
from foveate.accounting import Trained, image_shape, image_tokens
from foveate.accounting.dry_run import encode, skeleton
from foveate.accounting.prompts import reached
from foveate.anatomy import read
from foveate.bridges import Bridge, build_bridge, complete_config
from foveate.engine.attach import attach
from foveate.errors import FoveateError, NotApplicable
from foveate.model.assembly import refuse_file
from foveate.model.configuration import FoveateConfig
from foveate.model.grown import check_attention, check_language_model, lineage, refuse_few, refuse_growth, refuse_tiling
from foveate.model.towers import TowersConfig
from foveate.probes.encoding import Encoded
from foveate.probes.tower import TOWER_SIGNALS
from foveate.reducers import Reducer, parse, saved_weights
from foveate.reducers.base import acting
from foveate.reducers.learned import learned, lent_weights
from foveate.tokens import ImagePlan
from foveate.train.frozen import check_features
from foveate.train.schedule import Part
from foveate.train.settings import BridgeScales, Keep, Lora, LoraOf, Model, Recipe, Stage
from foveate.world import resolve

MOST = 2**24
Read = Callable[[str, str], Any]  # (name, "vision" | "text" | "checkpoint") -> the configuration of that model


@dataclass(frozen=True)
class Setup:
    """A stage and what is known of its model without weights.

    before, config  the model's configuration as the stage finds it, and as it trains it
    trained         what its steps update, LoRA targets by name
    cautions        what is possible and perhaps not meant
    size            (width, height) of the images that are counted; None: one view's
    """

    stage: Stage
    before: Any
    config: Any
    trained: Trained
    cautions: list[str]
    size: tuple[int, int] | None = None

    @property
    def assembled(self) -> bool:
        """Whether the model is one of Foveate's own, which can be resized."""
        return is_assembled(self.config)

    @cached_property
    def bridge(self) -> Bridge | None:
        """The bridge on the meta device; None in a model of the library, whose bridge stays as it is."""
        return build(self.config.bridge) if self.assembled else None

    @cached_property
    def budgets(self) -> Sequence[int]:
        """See `budgets_of`."""
        return budgets_of(self.stage, self.config)

    def asking_for(self, view_tokens: int) -> Setup:
        """The stage as it is in a step with so many visual tokens of a view."""
        config = deepcopy(self.config)
        config.view_tokens = view_tokens
        return replace(self, config=config)

    @cached_property
    def image(self) -> ImagePlan:
        """What an image becomes. FoveateError where only the processor of a model of the library knows."""
        if self.assembled:
            width, height = self.size or (self.config.image_size,) * 2
            plan: ImagePlan = self.config.plan_image(height, width)
            return plan
        if self.size is not None:
            raise FoveateError(f"what an image of {self.size[0]} x {self.size[1]} pixels becomes is known of Foveate's own models alone")
        return ImagePlan.whole(image_tokens(self.config), image_shape(self.config)[1])

    @property
    def used(self) -> Any:
        """The configuration of what can be trained: see `foveate.accounting.prompts.reached`."""
        return reached(self.config)

    @property
    def slots(self) -> list[tuple[Fraction, str]]:
        """(share, reducers) of the schedule; the members of a cycle share its steps."""
        parts = self.stage.parts or [Part(Fraction(1))]
        return [(part.share / len(part.cycle), reducers) for part in parts for reducers in part.cycle]


def walk(recipe: Recipe, load: Read) -> Iterator[Setup]:
    """Each stage as it will be, everything checked that needs no weights.

    FoveateError naming the stage: a bridge or image size that does not fit, LoRA targets that are not there, an image size that the tower
    does not take, reducers that the model cannot serve, and samples longer than the positions that a language model has learned."""
    config = start(recipe.model, recipe.stages[0], load)
    check_weights(recipe)
    for stage in recipe.stages:
        with naming(stage):
            before, config = config, advance(config, stage)
            setup = Setup(stage, before, config, check(stage, config), cautions(stage, config))
            if keep_of(stage) is not None:
                check_attention(recipe.model.attn_implementation)
                check_language_model(skeleton(config))
        yield setup


def check_weights(recipe: Recipe) -> None:
    """FoveateError where a stage has a reducer whose weights neither it trains, nor a stage before, nor came with the checkpoint."""
    there: set[str] | None = None
    for stage in recipe.stages:
        needed = learned([one for spelled in stage.spelled for one in parse(spelled) if not getattr(one, "untrained", False)])
        if needed and there is None:
            checkpoint = recipe.model.checkpoint
            there = {key.partition(".")[0] for key in saved_weights(model_folder(checkpoint)) or {}} if checkpoint else set()
        if stage.train.reducers:
            there = (there or set()) | set(stage.learned)
        if missing := sorted(needed.keys() - (there or set())):
            raise FoveateError(
                f"stage {stage.name}: {missing[0]} needs weights that nothing has trained: set train.reducers: true here or in a stage "
                "before, or begin with a checkpoint that has them"
            )


def read_config(name: str, key: str, known: Mapping[str, Callable[[], Any]] = MappingProxyType({})) -> Any:
    """The configuration of a model: that of `known` by its name, a folder's, a shipped asset's or the hub's. `key`: of the recipe's
    `model`. FoveateError if there is none."""
    if name in known:
        return known[name]()
    what = {"vision": "vision tower", "text": "language model", "checkpoint": "checkpoint"}[key]
    refuse_file(name, what)
    try:
        return AutoConfig.from_pretrained(model_folder(name))
    except (OSError, ValueError) as error:
        more = f", or one of {', '.join(known)}" if known else ""
        raise FoveateError(
            f"model.{key}: the {what} {name!r} could not be loaded: {first_line(error).rstrip('.')}. Give a folder with its "
            f"config.json{more}"
        ) from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class naming:
    """Puts the stage's name in front of errors."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FoveateError):
            raise FoveateError(f"stage {self.stage.name}: {error}") from None


def start(model: Model, first: Stage, load: Read) -> Any:
    """The configuration that the first stage finds; a new bridge is built with that stage's scales at once."""
    if model.checkpoint is not None:
        return load(model.checkpoint, "checkpoint")
    text, levels = load(model.text or "", "text"), model.vision_feature_layer
    if isinstance(model.vision, list):
        vision, levels = TowersConfig.of([load(name, "vision") for name in model.vision], levels), [-1]
    else:
        vision = load(model.vision or "", "vision")
    config = FoveateConfig(
        vision_config=getattr(vision, "vision_config", vision),
        text_config=text,
        bridge=first_bridge(model, first),
        vision_feature_layer=levels,
        image_size=first.image_size,
        tiling=first.tiling or model.tiling,
    )
    blocks = getattr(config.vision_config, "num_hidden_layers", None)
    if blocks is not None and not all(-blocks - 1 <= level <= blocks for level in config.vision_feature_layer):
        raise FoveateError(f"vision_feature_layer {config.vision_feature_layer}: the tower has hidden states 0 to {blocks}")
    return config


def first_bridge(model: Model, first: Stage) -> dict[str, Any]:
    """A new bridge has the scales of the first stage from the beginning; there is nothing to inflate yet."""
    return {**(model.bridge or {}), **({"scales": first.bridge.scales} if first.bridge is not None else {})}


def growth(stage: Stage, config: Any) -> BridgeScales | None:
    """The scales that the bridge grows to as the stage begins; None where it stays."""
    if stage.bridge is None or [tuple(scale) for scale in config.bridge.get("scales", [])] == stage.bridge.scales:
        return None
    return stage.bridge


def keep_of(stage: Stage) -> Keep | None:
    """What grown tokens keep from the beginning of the stage on."""
    return None if stage.bridge is None else stage.bridge.keep


def is_assembled(config: Any) -> bool:
    return isinstance(config, FoveateConfig)


def advance(config: Any, stage: Stage) -> Any:
    """The configuration in `stage`: its image size, and its bridge, scaled from the one before."""
    if not is_assembled(config):
        refuse_resizing(stage, config)
        return config
    size = stage.image_size or config.image_size
    grid = config.patch_grid(size, size)
    bridge = build(config.bridge)
    to, keep = growth(stage, config), keep_of(stage)
    if to is None and keep is not None:
        raise FoveateError("`bridge.keep` says what grown tokens keep, but the bridge does not grow in this stage; leave it out")
    grown = config.grown
    if to is not None:
        bridge = bridge.scaled(scales=to.scales, grid=grid[0], sources=to.sources)
        if keep is not None:
            refuse_few(config)
            refuse_tiling(config)
        grown = None if keep is None else lineage(config, to.sources, keep.kept)
    if (tokens := bridge.tokens(grid)) > MOST:
        raise FoveateError(f"the bridge makes {tokens:,} visual tokens of an image; no language model takes more than {MOST:,}")
    before, config = config, deepcopy(config)
    config.bridge, config.image_size, config.grown = bridge.config(), size, grown
    if stage.view_tokens is not None:
        config.view_tokens = stage.view_tokens if isinstance(stage.view_tokens, int) else None
        refuse_growth(config, "another number of view_tokens")
    bridge.within(grid, config.view_tokens)
    budgets_of(stage, config)
    if (tiling := tiling_of(stage, before)) is not None:
        config.tiling = tiling
        if config.scales != before.scales:
            raise FoveateError(
                f"the bridge reads the maps of {before.scales} sizes, {tiling} would make it {config.scales}: set model.tiling"
            )
        config.check_tiling(config.tiled)
    if config.tiling is not None:
        config.plan_image(size, size)
    return config


def tiling_of(stage: Stage, config: Any) -> str | None:
    """The tiling that a stage changes to, None where it stays."""
    return None if stage.tiling in (None, config.tiling) else stage.tiling


def budgets_of(stage: Stage, config: Any) -> Sequence[int]:
    """The numbers of visual tokens of a view of which one is drawn for each step of the stage; () where all steps have the same."""
    wanted = stage.view_tokens
    if wanted is None or isinstance(wanted, int):
        return ()
    bridge = build(config.bridge)
    possible = bridge.budgets(config.grid)
    if wanted != "any":
        return [bridge.within(config.grid, each) for each in wanted]
    if len(possible) == 1:
        raise FoveateError(f"view_tokens: any draws of several numbers, but the {bridge.kind} bridge makes {possible[0]} of every view")
    return possible


def build(bridge: dict[str, Any]) -> Bridge:
    with torch.device("meta"):
        return build_bridge(bridge)


def refuse_resizing(stage: Stage, config: Any) -> None:
    """A model of the library is trained as it is."""
    if stage.bridge is not None:
        raise FoveateError(f"`bridge` needs a Foveate model, but the checkpoint is a {config.model_type} model; leave it out")
    if stage.tiling is not None:
        raise FoveateError(f"`tiling` needs a Foveate model, but the checkpoint is a {config.model_type} model, which cuts images itself")
    if stage.view_tokens is not None:
        raise FoveateError(f"`view_tokens` needs a Foveate model, but the checkpoint is a {config.model_type} model; leave it out")
    native = getattr(getattr(config, "vision_config", None), "image_size", None)
    if stage.image_size is not None and native not in (stage.image_size, [stage.image_size] * 2, (stage.image_size,) * 2):
        raise FoveateError(f"a {config.model_type} model takes images of {native} pixels, not image_size {stage.image_size}")


def model_folder(name: str) -> str:
    """`asset:NAME`, `real:NAME`, and the output or stage folder of a run as the folder of the model in it; others as they are.

    FoveateError for a run or stage that has not ended, and for a checkpoint, which holds only what was trained."""
    path = Path(found := resolve(name))
    if not os.path.isdir(path) or (path / "config.json").is_file():
        return found
    if (path / "progress.json").is_file():
        raise FoveateError(f"{path} is a checkpoint of a stage under way, with the trained weights alone; name the stage's `model` folder")
    for inner in ("final", "model"):
        if (path / inner / "complete").is_file():
            return str(path / inner)
    if (path / "recipe.json").is_file():
        raise FoveateError(f"{path} is a run that has not ended: it has no `final` model yet. Finish it, or name the `model` of a stage")
    return found


# ---- what a stage asks for -----------------------------------------------------------------------------------------------------------


def check(stage: Stage, config: Any) -> Trained:
    """Looks for everything that can be known of a stage without weights; returns what it trains, LoRA targets by name."""
    part_modules(skeleton(config))
    if stage.kind == "align" and not is_assembled(config):
        raise FoveateError(f"kind align needs a Foveate model, but the checkpoint is a {config.model_type} model; leave the stage out")
    if stage.kind == "align" and config.weighs:
        raise FoveateError("kind align is for visual tokens, and the images of a vlora bridge become none; leave the stage out")
    if stage.boxes and stage.kind != "align":
        raise FoveateError("`boxes` say which tokens are to say which word, in a stage of kind align alone; leave them out")
    if stage.contrast and stage.kind != "align":
        raise FoveateError("`contrast` is of what a stage of kind align tells a word apart, and no other has it; leave it out")
    if stage.boxes and config.tiling is not None:
        raise FoveateError(f"`boxes` are of images that are seen whole, once, and the tiling {config.tiling} cuts them; leave them out")
    trained = trained_parts(stage, skeleton(config))
    check_positions(stage, config)
    check_image_size(config)
    for spelled in stage.spelled:
        check_reducers(parse(spelled), config)
    if stage.features is not None:
        check_features(stage, config)
    return trained


def part_modules(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(tower, bridge) of a vision-language model as its anatomy has them; everything else is the language model. Where a part is several
    modules they are one list of modules. FoveateError if one is not found."""
    anatomy = read(model)
    parts = anatomy.visual
    found = {part: [module for module, of in parts.items() if of == part] for part in ("tower", "bridge")}
    for part, what in (("tower", "vision tower"), ("bridge", "bridge beside its vision tower")):
        if not found[part]:
            raise FoveateError(f"{type(model).__name__} has no {what} that is known by its name, so it is not trained by a recipe")
    tower, bridge = (modules[0] if len(modules) == 1 else nn.ModuleList(modules) for modules in found.values())
    return tower, bridge


def trained_parts(stage: Stage, model: nn.Module) -> Trained:
    """What the stage trains as the cost model takes it, with the names of the maps that get adapters."""
    trained = stage.train.updated
    if isinstance(stage.train.lm, LoraOf):
        return replace(trained, lora_targets=lora_targets(model, stage.train.lm.lora))
    return trained


def lora_targets(model: nn.Module, lora: Lora) -> tuple[str, ...]:
    """Names of linear maps in the decoder layers: those of the recipe, each of which has to be there; without any, all of them."""
    anatomy = read(model)
    there = sorted({name.rpartition(".")[2] for name, module in anatomy.layers.named_modules() if isinstance(module, nn.Linear)})
    if "targets" not in lora.model_fields_set:
        return tuple(lora.targets) if set(lora.targets) <= set(there) else tuple(there)
    missing = [name for name in lora.targets if name not in there]
    if missing:
        # the head and the embeddings are maps of the language model too, but none of a layer
        outside = {name.rpartition(".")[2] for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
        hint = "; what lies outside of them is trained by train.lm: true" if outside & set(missing) else ""
        raise FoveateError(f"LoRA targets {', '.join(missing)} are not in the decoder layers, which have {', '.join(there)}{hint}")
    return tuple(lora.targets)


def positions(config: Any) -> tuple[int | None, bool]:
    """How many positions the language model was made for (None: no such limit), and whether each of them is a learned row of a table."""
    anatomy = read(skeleton(config))
    made_for = getattr(anatomy.text_config, "max_position_embeddings", None)
    tables = [m for name, m in anatomy.decoder.named_modules() if isinstance(m, nn.Embedding) and "pos" in name]
    return made_for, any(made_for is not None and table.num_embeddings >= made_for for table in tables)


def check_positions(stage: Stage, config: Any) -> None:
    made_for, learned = positions(config)
    if learned and made_for is not None and stage.max_length > made_for:
        raise FoveateError(
            f"max_length {stage.max_length} is more than the {made_for} positions that the language model has learned; set max_length to "
            f"{made_for} or less (longer samples then lose their end)"
        )


def cautions(stage: Stage, config: Any) -> list[str]:
    """What is possible and perhaps not meant."""
    made_for, learned = positions(config)
    if made_for is None or learned or stage.max_length <= made_for:
        return []
    return [
        f"max_length {stage.max_length} is more than the {made_for} positions that the language model was made for; what lies behind is "
        f"trained as new positions. max_length: {made_for} cuts samples there"
    ]


def check_image_size(config: Any) -> None:
    """Of the tower, in front of a bridge that takes any grid. A tower that cannot be run without values is believed."""
    if not is_assembled(config) or config.image_size == config.native_size:
        return
    config = deepcopy(config)
    given = {"vision_width": config.bridge["vision_width"], "text_width": config.bridge["text_width"]}
    config.bridge = complete_config({"kind": "mlp"}, levels=len(config.vision_feature_layer), **given)
    config.tiling = None
    native = deepcopy(config)
    native.image_size = config.native_size
    try:
        encode(native, pictures(native))
    except FoveateError:
        return
    encode(config, pictures(config))


def pictures(config: FoveateConfig) -> Encoded:
    """A call that encodes one image."""
    shape = 1, getattr(config.vision_config, "num_channels", 3), config.image_size, config.image_size
    return Encoded("get_image_features", {"pixel_values": torch.ones((1,) * 4, dtype=torch.bool).expand(shape)})


def check_reducers(reducers: list[Reducer], config: Any) -> None:
    """Layers that are not there, methods that do not go together, and signals that the tower does not give."""
    model = skeleton(config)
    with lent_weights(model, reducers):  # whether there are any is asked of the recipe as a whole
        attach(model, reducers, record="none").detach()
    sites = [site for site, _, _ in acting(reducers, len(read(model).layers))]
    needs = [signal for site in sites for signal in site.needs if isinstance(signal, TOWER_SIGNALS)]
    if not is_assembled(config) or not (needs or any(site.effect.place == "tower" for site in sites)):
        return
    try:
        encode(config, pictures(config), needs)
    except NotApplicable:
        raise
    except FoveateError:  # its code wants values: the trial on the model itself will tell
        return
