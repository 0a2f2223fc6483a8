"""What a recipe says: pydantic models of a run, its model, its stages and their data."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from foveate.accounting import Trained as Updated
from foveate.errors import FoveateError
from foveate.losses import Loss, check_together, parse_loss
from foveate.model.grown import KEPT
from foveate.reducers import parse
from foveate.reducers.learned import learned
from foveate.train.schedule import NONE, Part
from foveate.train.sizes import read_bytes
from foveate.train.values import (
    MicroBatch,
    ReducerString,
    SamplingString,
    Share,
    TilingString,
    ViewTokens,
    Weight,
    fitting_precision,
    known_optimizer,
    named_loss,
    readable_template,
    trainable_dtype,
)

log = logging.getLogger(__name__)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a stage or a source, which files are called after


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False)


class Data(Strict):
    """`conversations` (file or folder) or `dataset` (or a hub name), read by `foveate.data.rows`; names of media start from `images`."""

    conversations: Path | None = None
    images: Path | None = None
    dataset: str | None = None
    split: str = "train"
    config: str | None = None  # of a data set with several
    frames: SamplingString = None  # which frames of clips are shown; default: uniform:frames=8
    limit: int | None = Field(default=None, gt=0)  # only the first N conversations
    on_bad_sample: Literal["stop", "skip"] = "stop"

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and "on_bad_image" in given and "on_bad_sample" not in given:
            log.warning("data.on_bad_image is now called on_bad_sample; the older name will go")
            given = {**{key: value for key, value in given.items() if key != "on_bad_image"}, "on_bad_sample": given["on_bad_image"]}
        return given

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.conversations is None) == (self.dataset is None):
            raise ValueError("give either `conversations` (with `images`) or `dataset`, one of the two")
        return self


class Source(Data):
    """One of the sources that a stage mixes. `share`: how often it is drawn, beside the shares of the others; left out in all, each source
    counts by its samples. `samples`: at most so many of its samples, which the seed chooses, the same in every stage."""

    name: str | None = Field(default=None, pattern=NAME)
    share: Weight | None = None
    samples: int | None = Field(default=None, gt=0)

    @property
    def label(self) -> str:
        """What the log calls it: its name, or else its file's or data set's."""
        return self.name or Path(self.conversations or self.dataset or "").stem


class Features(Strict):
    """The frozen tower's features are kept in the folder `cache`, which any number of runs may share, and read from there.

    The run says how many bytes they take, and stops before its first step if that is more than `at_most`, or if this is left out."""

    cache: Path
    at_most: Annotated[int, BeforeValidator(read_bytes), Field(gt=0)] | None = None
    storage: Literal["exact", "half", "int8"] = "exact"


class Evaluate(Strict):
    """Tasks, as `foveate bench` spells them, that the model is asked every `every` steps and at the end of the stage: at most `limit`
    questions of each. `reducers`: left out, those of the moment. `keep_best`: the figure whose best model is kept."""

    tasks: Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given), Field(min_length=1)]
    every: int = Field(gt=0)
    limit: int | None = Field(default=None, gt=0)
    reducers: ReducerString = NONE
    batch_size: int = Field(default=64, gt=0)
    keep_best: str | None = None

    @property
    def own_reducers(self) -> str | None:
        """Under what the questions are asked; None under whatever the step has."""
        return self.reducers if "reducers" in self.model_fields_set else None


class Validation(Data):
    """Samples that are not trained on, whose loss is logged every `every` steps and at the end of the stage."""

    every: int = Field(gt=0)


class Lora(Strict):
    rank: int = Field(gt=0)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # Left out, every linear map of the decoder layers, which in most families are these seven (`foveate.train.stages.lora_targets`).
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1)


class LoraOf(Strict):
    lora: Lora


# pydantic puts them into the locations of errors
WHOLE, ADAPTED, ONE, BY_PART, SINGLE, MIXED = TAGS = "<bool>", "<lora>", "<rate>", "<rates>", "<source>", "<sources>"


def _lm_kind(value: Any) -> str:
    return ADAPTED if isinstance(value, (dict, LoraOf)) else WHOLE


class Trained(Strict):
    """What a stage trains. The language model's embeddings and head belong to `lm`; `reducers`: the weights of those that have some."""

    bridge: bool = True
    tower: bool = False
    reducers: bool = False
    lm: Annotated[Annotated[bool, Tag(WHOLE)] | Annotated[LoraOf, Tag(ADAPTED)], Discriminator(_lm_kind)] = False

    @model_validator(mode="after")
    def _something(self) -> Trained:
        if not self.parts:
            raise ValueError("nothing is trained: set at least one of bridge, tower, lm, reducers")
        return self

    @property
    def parts(self) -> list[str]:
        """Names of the parts that are trained; LoRA adapters belong to `lm`."""
        return [part for part in ("bridge", "tower", "lm", "reducers") if getattr(self, part)]

    @property
    def updated(self) -> Updated:
        """The same, as the cost model takes it."""
        lora = self.lm.lora if isinstance(self.lm, LoraOf) else None
        adapted = (lora.rank, tuple(lora.targets)) if lora else (0, ())
        return Updated(self.tower, self.bridge, self.lm is True, *adapted, reducers=self.reducers)


class Slot(Strict):
    """One part of a schedule: a share of the stage's optimiser steps with one reducer, or several that alternate step by step."""

    share: Share
    reducer: ReducerString = NONE
    cycle: list[ReducerString] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_kind(self) -> Slot:
        if ("reducer" in self.model_fields_set) == (self.cycle is not None):
            raise ValueError("a part of the schedule has either `reducer` or `cycle`")
        return self

    @property
    def part(self) -> Part:
        return Part(self.share, tuple(self.cycle) if self.cycle is not None else (self.reducer,))


class Term(Strict):
    """A loss over several passes of a step, `foveate.losses`, and the weight of its term."""

    loss: str
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _known(self) -> Term:
        try:
            found = parse_loss(self.loss)
        except FoveateError as error:
            raise ValueError(str(error)) from None
        if self.weight != 1 and not found.compares:
            raise ValueError(f"{found.name} adds no term of its own, so that weight {self.weight:g} has nothing to weigh; leave it out")
        return self


class Rates(Strict):
    """A learning rate for each trained part."""

    bridge: float | None = Field(default=None, gt=0)
    tower: float | None = Field(default=None, gt=0)
    lm: float | None = Field(default=None, gt=0)
    reducers: float | None = Field(default=None, gt=0)


def _rate_kind(value: Any) -> str:
    return BY_PART if isinstance(value, (dict, Rates)) else ONE


LearningRate = Annotated[
    Annotated[float, Field(gt=0), Tag(ONE)] | Annotated[Rates, Tag(BY_PART)],
    Discriminator(_rate_kind),
]


def _data_kind(value: Any) -> str:
    return MIXED if isinstance(value, list) else SINGLE


DataOrSources = Annotated[
    Annotated[Data, Tag(SINGLE)] | Annotated[list[Source], Field(min_length=1), Tag(MIXED)],
    Discriminator(_data_kind),
]


class Keep(Strict):
    """What grown tokens keep of those they are copies of (`foveate.model.grown`), let go of evenly over the first `steps` of the stage;
    without `steps` it stays."""

    positions: bool = True
    keys: bool = True
    order: bool = True
    steps: int | None = Field(default=None, gt=0)

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(name for name in KEPT if getattr(self, name))

    def left(self, step: int) -> float:
        """How much is left of it, from 1 to 0, when `step` optimiser steps were made."""
        return 1.0 if self.steps is None else max(0.0, 1.0 - step / self.steps)

    @model_validator(mode="after")
    def _something(self) -> Keep:
        if not self.kept:
            raise ValueError(f"nothing is kept: set at least one of {', '.join(KEPT)}, or leave `keep` out")
        return self


class BridgeScales(Strict):
    scales: list[tuple[int, int]] = Field(min_length=1)  # (window, queries per window), coarse to fine
    sources: list[int] | None = None  # for each new scale, which scale of the stage before seeds it
    keep: Keep | None = None


class Stage(Strict):
    name: str = Field(pattern=NAME)
    kind: Literal["generate", "align"] = "generate"  # align: the bridge alone, by `foveate.train.align`
    boxes: bool | None = None  # of kind align: rows say what is where
    contrast: Literal["vocabulary", "data"] | None = None  # of kind align: the words that the softmax goes over; default: vocabulary
    data: DataOrSources
    image_size: int | None = Field(default=None, gt=0)  # pixels; default: as it was
    tiling: TilingString | None = None  # default: as it was
    view_tokens: ViewTokens = None  # default: as it was; drawn: all, from then on
    bridge: BridgeScales | None = None
    train: Trained = Trained()
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(gt=0)
    micro_batch: MicroBatch = None  # default: batch_size divided by the number of processes
    learning_rate: LearningRate
    lr_schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Annotated[str, BeforeValidator(known_optimizer)] = "adamw_torch"
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Annotated[Literal["fp32", "bf16", "bf16-copy", "fp16", "auto"], BeforeValidator(fitting_precision)] = "fp32"
    gradient_checkpointing: bool = False
    max_length: int = Field(default=2048, gt=0)
    save_steps: int = Field(default=500, gt=0)
    group_by_length: bool = False
    pack: bool | Annotated[int, Field(gt=1)] = False  # all samples in a row; or rows of at most so many tokens
    reducers: list[Slot] = []
    losses: list[Annotated[Term, BeforeValidator(named_loss)]] | None = None
    validation: Validation | None = None
    features: Features | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _mixes(self) -> Stage:
        labels = [source.label for source in self.sources]
        double = sorted({label for label in labels if labels.count(label) > 1})
        if double:
            raise ValueError(f"two sources of `data` are called {double[0]}: give each a `name` of its own")
        without = [source.label for source in self.sources if source.share is None]
        if 0 < len(without) < len(labels):
            raise ValueError(f"a `share` is given to each source of `data` or to none, but {', '.join(without)} has none")
        return self

    @model_validator(mode="after")
    def _adds_up(self) -> Stage:
        if isinstance(self.learning_rate, Rates):
            rated = [part for part in Rates.model_fields if getattr(self.learning_rate, part) is not None]
            if set(rated) != set(self.train.parts):
                raise ValueError(
                    f"`learning_rate` by part has {', '.join(rated) or 'no part'}, but the stage trains {', '.join(self.train.parts)}: "
                    "give one rate to each of them"
                )
        if self.kind == "align":
            if self.train.lm:
                raise ValueError("a stage of kind align runs no language model: it trains the bridge and perhaps the tower, not lm")
            if self.reducers:
                raise ValueError("a stage of kind align runs no language model for reducers to act in; leave them out")
            if self.pack or isinstance(self.data, list):
                raise ValueError("a stage of kind align takes one source of data, image after image: leave out `pack` and the list")
        if self.train.reducers and not self.learned:
            raise ValueError(
                "`train.reducers` trains the weights of the stage's reducers, but none of its `reducers` has any; leave it out"
            )
        if self.train.reducers and self.pack:
            raise ValueError("reducers that are trained count their loss sample by sample: leave out `pack`")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        if self.fixed_micro_batch is not None and self.batch_size % self.fixed_micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}")
        if self.precision == "bf16-copy" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing would recompute with the float32 weights: with it use precision bf16 (autocast) or fp32"
            )
        if self.reducers:
            total = sum((slot.share for slot in self.reducers), Fraction(0))
            if total != 1:
                shares = " + ".join(str(slot.share) for slot in self.reducers)
                raise ValueError(f"the shares of `reducers` must add up to 1, but {shares} = {total} (fractions such as 1/3 are exact)")
        return self

    @model_validator(mode="after")
    def _losses_fit(self) -> Stage:
        if self.losses and self.micro_batch == "auto":
            raise ValueError("`micro_batch: auto` tries one pass, and `losses` keep several in memory: give a number of samples")
        if self.losses and (self.pack or isinstance(self.data, list) or self.kind == "align"):
            raise ValueError("`losses` compare passes sample by sample, of one source, at logits: leave out `pack`, lists, kind align")
        try:
            check_together(self.terms, [spelled for part in self.parts or [Part(Fraction(1))] for spelled in part.cycle])
        except FoveateError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def terms(self) -> list[Loss]:
        return [parse_loss(term.loss) for term in self.losses or []]

    @property
    def fixed_micro_batch(self) -> int | None:
        """None where it is left out or chosen as the stage begins."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None

    @property
    def sources(self) -> list[Source]:
        """What is trained on, one source or several."""
        return self.data if isinstance(self.data, list) else [Source(**dict(self.data))]

    @property
    def parts(self) -> list[Part]:
        return [slot.part for slot in self.reducers]

    @property
    def spelled(self) -> list[str]:
        """All reducers that the model is to have, each once, in training and while it is asked."""
        own = None if self.evaluate is None else self.evaluate.own_reducers
        return list(dict.fromkeys([*(one for part in self.parts for one in part.cycle), *([] if own is None else [own])]))

    @property
    def learned(self) -> list[str]:
        """Names of the reducers of its schedule that have weights."""
        return list(learned([one for part in self.parts for spelled in part.cycle for one in parse(spelled)]))

    @property
    def rates(self) -> dict[str, float] | None:
        """The learning rate of each trained part, None where all have one."""
        if not isinstance(self.learning_rate, Rates):
            return None
        return {part: getattr(self.learning_rate, part) for part in self.train.parts}


class Model(Strict):
    """Either `vision` + `text` + `bridge` (assembled anew), or `checkpoint` (a Foveate model, or another vision-language model).

    Each name is a hub name, a local folder, `asset:NAME` for what ships with the package, or `real:NAME` for what `foveate real prepare`
    has made. `vision` may be several, of which `vision_feature_layer` then has an entry each, a number or several."""

    vision: str | Annotated[list[str], Field(min_length=1)] | None = None
    text: str | None = None
    bridge: dict[str, Any] | None = None
    vision_feature_layer: list[int | list[int]] | None = None
    tiling: TilingString | None = None
    add_image_token: bool = False
    checkpoint: str | None = None
    chat_template: Annotated[str | None, BeforeValidator(readable_template)] = (
        None  # a file, or the template itself; default: the tokenizer's
    )
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(trainable_dtype)] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        built = [key for key in ("vision", "text", "bridge") if getattr(self, key) is not None]
        if self.checkpoint is not None and self.tiling is not None:
            raise ValueError("a checkpoint has its own tiling, or none: give `tiling` in a stage, which changes it")
        if self.checkpoint is not None and built:
            raise ValueError(f"give either `checkpoint` or `vision`, `text` and `bridge`, not both (found also {', '.join(built)})")
        if self.checkpoint is None and len(built) < 3:
            missing = [key for key in ("vision", "text", "bridge") if key not in built]
            raise ValueError(f"`{'`, `'.join(missing)}` missing: a model is `vision` + `text` + `bridge`, or a `checkpoint`")
        if (
            self.vision_feature_layer
            and not isinstance(self.vision, list)
            and not all(isinstance(n, int) for n in self.vision_feature_layer)
        ):
            raise ValueError("`vision_feature_layer` has levels of several towers, but `vision` is one: give numbers, or several towers")
        if self.bridge is not None and not isinstance(self.bridge.get("kind"), str):
            raise ValueError("`bridge` needs a `kind`, the name of one")
        return self


class Recipe(Strict):
    name: str
    output: Path
    seed: int = Field(default=0, ge=0)
    model: Model
    stages: list[Stage] = Field(min_length=1)
    log_steps: int = Field(default=10, gt=0)
    workers: int = Field(default=1, ge=0)  # processes that load data, per training process
    report_to: list[str] = []

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"two stages are called {double[0]}: names of stages must differ")
        return self

    def folder(self, index: int) -> Path:
        """Where stage `index` puts its checkpoints and its model."""
        return self.output / f"{index}-{self.stages[index].name}"
