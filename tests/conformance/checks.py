"""The six checks of a cell. Each runs on the bare model first: what fails there says nothing about a reducer."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import foveate
from foveate.anatomy import read
from foveate.contract import Visible, Workload
from foveate.errors import NotApplicable
from foveate.reducers import Reducer, parse
from foveate.reducers.base import tokens_by_layer
from foveate.tokens import Layout, TokenMap
from tests.conformance.family import Family, Row, families

TOLERANCE: dict[str, Any] = {"rtol": 1e-3, "atol": 2e-4}  # float32; states of the tiny models are of order 1
MERGES, RECURS = "masking: the method merges tokens", "masking: a layer recurs or convolves, and sees what is masked"
TOWER = "masking: the tower does not see what is dropped in front of it"
NEW = 4  # tokens generated where the cache is compared with the whole run


class Skip(Exception):
    """The check does not apply to this method or this model, for the reason given."""


@dataclass(eq=False)
class Loaded:
    """A family's model and processor, and what the processor made of its prompts."""

    family: Family
    model: Any
    processor: Any

    @functools.cached_property
    def rows(self) -> list[Row]:
        return self.family.rows()

    @functools.cached_property
    def singles(self) -> list[dict[str, Tensor]]:
        return [self.family.inputs(self.processor, [row]) for row in self.rows]

    @functools.cache  # noqa: B019
    def batch(self, side: str, answers: bool = False) -> dict[str, Tensor]:
        return self.family.inputs(self.processor, self.rows, side, answers=answers)

    def labels(self, inputs: dict[str, Tensor], answers: Sequence[str] | None = None) -> Tensor:
        """The answers' tokens; the prompt and padding are no labels."""
        labels = torch.full_like(inputs["input_ids"], -100)
        for i, row in enumerate(self.rows):
            count = len(row.answer.split())
            there = inputs["attention_mask"][i].nonzero()[-count:, 0]
            labels[i, there] = inputs["input_ids"][i, there]
        return labels

    @property
    def recurs(self) -> bool:
        anatomy = read(self.model)
        return any(anatomy.recurrent(i) for i in range(len(anatomy.layers)))


@functools.lru_cache(maxsize=4)
def load(name: str, attn: str = "sdpa") -> Loaded:
    family = families()[name]
    with tempfile.TemporaryDirectory() as folder:  # written anew in every process: a checkpoint of yesterday's code proves nothing
        model, processor = family.load(Path(folder), attn)
    return Loaded(family, model, processor)


def attached(model: Any, reducers: str | None, **options: Any) -> Any:
    """attach, or nothing at all for the bare model."""
    return nullcontext() if reducers is None else foveate.attach(model, reducers, **options)


def state_of(model: nn.Module) -> list[Any]:
    return [
        (name, sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_always_called))
        for name, m in model.named_modules()
    ]


# ---- 1


def everything(loaded: Loaded) -> dict[str, Tensor]:
    """Logits, loss, gradients and eight generated tokens."""
    model = loaded.model
    model.zero_grad()
    inputs = loaded.batch("right", True)
    out = model(**inputs, labels=loaded.labels(inputs), use_cache=False)
    out.loss.backward()
    found = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found |= {"logits": out.logits.detach(), "loss": out.loss.detach()}
    found["generated"] = model.generate(**loaded.batch("left"), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return found


@functools.lru_cache(maxsize=2)
def _bare(name: str) -> dict[str, Tensor]:
    return everything(load(name))


def keep_all(name: str, reducer: str | None, whole: str) -> None:
    """A reducer that keeps everything leaves all as it was, and nothing behind."""
    loaded, bare = load(name), _bare(name)
    with torch.no_grad():
        loaded.model(**loaded.batch("right", True))  # in its first call the library itself leaves hooks
    before = state_of(loaded.model)
    for shortcuts in (True, False):
        with attached(loaded.model, None if reducer is None else whole, shortcuts=shortcuts):
            kept = everything(loaded)
        assert kept.keys() == bare.keys()
        for key, value in bare.items():
            assert torch.equal(kept[key], value), f"{key} is not what the bare model gives (shortcuts={shortcuts})"
    assert state_of(loaded.model) == before, "something is left on the model"


# ---- 2


def batch(name: str, reducer: str | None, whole: str) -> None:
    """Three prompts in one batch, padded on either side, are the three alone."""
    loaded = load(name)
    with attached(loaded.model, reducer), torch.no_grad():
        alone = [loaded.model(**numbered(loaded, single)).logits[0] for single in loaded.singles]
        for side in ("right", "left"):
            inputs = loaded.batch(side)
            together = loaded.model(**numbered(loaded, inputs)).logits
            for i, single in enumerate(loaded.singles):
                there = inputs["attention_mask"][i].bool()
                assert torch.equal(inputs["input_ids"][i, there], single["input_ids"][0])
                _close(together[i, there], alone[i], f"row {i}, padded on the {side}")


def numbered(loaded: Loaded, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With positions, as `generate` hands them in; models whose positions are of several rows make them by themselves."""
    if hasattr(read(loaded.model).core, "get_rope_index"):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


# ---- 3


def decoding(name: str, reducer: str | None, whole: str) -> None:
    """Greedy steps with the cache are the whole sequence again, with the same maps."""
    loaded = load(name)
    inputs, model = loaded.batch("left"), loaded.model
    N = inputs["input_ids"].shape[1]
    # Else a random model may say an image's placeholder, and the whole sequence would have one too many.
    special = sorted(loaded.processor.tokenizer.added_tokens_decoder)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "suppress_tokens": special}
    with attached(model, reducer) as run, torch.no_grad():
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    longer = dict(inputs)
    longer["input_ids"] = out.sequences[:, :-1]
    for key, value in inputs.items():
        if key != "input_ids" and value.ndim == 2 and value.shape == inputs["input_ids"].shape:
            longer[key] = torch.nn.functional.pad(value, (0, NEW - 1), value=1 if key == "attention_mask" else 0)
    with nullcontext() if reducer is None else foveate.attach(model, maps=run.maps), torch.no_grad():
        again = model(**longer, use_cache=False).logits
    for step in range(NEW):
        _close(out.logits[step], again[:, N - 1 + step], f"step {step}")


# ---- 4


def masking(name: str, reducer: str | None, whole: str) -> None:
    """Where positions are kept, dropping tokens is masking them out of the bare model; passing a layer by is being masked out there, and
    behind it what one was in front of it; a rule of who sees whom is laid over the bare model's mask."""
    loaded = load(name, "eager")
    if loaded.recurs:
        with attached(loaded.model, reducer):
            raise Skip(RECURS)
    inputs, model = loaded.batch("right"), loaded.model
    maps: dict[int, TokenMap] = {}
    through: dict[int, TokenMap] = {}
    if reducer is not None:
        with foveate.attach(model, keeping(reducer)) as run, torch.no_grad():
            dropped = model(**inputs, use_cache=False).logits
        if run.last.tower:
            raise Skip(TOWER)
        maps, through = run.last.maps, run.last.bypasses
        for token_map in maps.values():
            if token_map.weight is not None or token_map.member.shape[-1] > 1 or token_map.mean:
                raise Skip(MERGES)
        if any(getattr(step, "steps", None) is not None for step in run.last.steps):
            inputs = {**inputs, "position_ids": run.last.layouts[0].position}
    else:
        with torch.no_grad():
            dropped = model(**inputs, use_cache=False).logits
    anatomy = read(model)
    hidden_BN = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    hooks, alive = [], None
    for layer, module in enumerate(anatomy.layers):
        if layer in maps:
            whole_map = maps[layer]
            alive = whole_map if alive is None else alive.then(whole_map)
            hidden_BN = _gone(alive, inputs)
        here_BN = hidden_BN
        if layer in through:
            here_BN = _gone(through[layer] if alive is None else alive.then(through[layer]), inputs)
            hooks.append(module.register_forward_hook(_passer(here_BN), with_kwargs=True))
        hooks.append(module.register_forward_pre_hook(_masker(here_BN), with_kwargs=True))
        for visible in () if reducer is None else [ruling.visible for ruling in run.last.rulings if ruling.site.at(layer)]:
            hooks.append(module.register_forward_pre_hook(_ruler(visible, run.last.entered), with_kwargs=True))
            if visible.holds:
                hooks.append(module.register_forward_hook(_passer(run.last.entered.visual), with_kwargs=True))
    try:
        with torch.no_grad():
            masked = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    survives = inputs["attention_mask"].bool() & ~hidden_BN
    _close(dropped[survives], masked[survives], "rows that survive")


def _gone(left: TokenMap, inputs: dict[str, Any]) -> Tensor:
    """(B, N) bool: tokens that a map leaves out."""
    there, gone = left.representative, torch.ones_like(inputs["attention_mask"], dtype=torch.bool)
    gone[torch.arange(len(there))[:, None].expand_as(there)[there >= 0], there[there >= 0]] = False
    return gone & inputs["attention_mask"].bool()


def _passer(by_BN: Tensor) -> Callable[..., Any]:
    def restore(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        states = torch.where(by_BN[..., None], before, output[0] if isinstance(output, tuple) else output)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return restore


def _masker(hidden_BN: Tensor) -> Callable[..., Any]:
    def mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("attention_mask")
        assert given is not None, "eager attention without a mask"
        columns = hidden_BN[:, None, None]
        low: Any = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        changed = given.expand(len(hidden_BN), -1, -1, -1).masked_fill(columns, low)
        return args, {**kwargs, "attention_mask": changed}

    return mask


def _ruler(visible: Visible, layout: Layout) -> Callable[..., Any]:
    """Lays a rule over a mask, pair by pair."""

    def rule(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].expand(layout.shape[0], -1, -1, -1).clone()
        low: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        sees, opens, bias = (None if of is None else of(layout, layout) for of in (visible.sees, visible.opens, visible.bias))
        mask = mask if bias is None else torch.where(mask == low, mask, mask + bias[:, None].to(mask.dtype))
        for b, q in layout.valid.nonzero().tolist():
            for k in layout.valid[b].nonzero()[:, 0].tolist():
                if sees is not None and k != q and not sees[b, q, k]:
                    mask[b, :, q, k] = low
                if opens is not None and opens[b, q, k]:
                    mask[b, :, q, k] = True if mask.dtype == torch.bool else 0
        return args, {**kwargs, "attention_mask": mask}

    return rule


def keeping(reducer: str) -> list[Reducer]:
    """The reducers of a spelling, with positions kept."""
    return parse("+".join(part + (":" if ":" not in part else ",") + "positions=keep" for part in reducer.split("+")))


# ---- 5


def ledger(name: str, reducer: str | None, whole: str) -> None:
    """What the run says went through each layer went through it, and is what was predicted."""
    loaded = load(name)
    layers = read(loaded.model).layers
    for single in loaded.singles:
        seen: list[int] = []
        hooks = [_shape_hook(layer, seen) for layer in layers]
        try:
            with attached(loaded.model, reducer) as run, torch.no_grad():
                loaded.model(**single, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        N = single["input_ids"].shape[1]
        assert len(seen) == len(layers)
        pictures = any(key.startswith("pixel_values") for key in single)
        if reducer is None or not pictures:
            assert seen == [N] * len(layers)
            continue
        assert run.last.tokens == seen, "the ledger's tokens are not those that the layers saw"
        first = run.last.maps[0].source if 0 in run.last.maps else run.last.layouts[0]
        text = N - int(first.visual.sum())
        assert [n - text for n in seen] == run.last.visual_tokens
        (prompt,) = run.last.prompts
        reducers = parse(reducer)
        predicted = tokens_by_layer(reducers, prompt.images, len(layers))
        exact = all(r.exact(Workload(tuple(prompt.images), tuple(image.tokens for image in prompt.images))) for r in reducers)
        # Otherwise short by a floor in each crop, or by as much as stands still and is merged, or is under a threshold.
        free = any("pixels" in r.looks_at or r.video or r.name == "atpllava" for r in reducers)
        spare = 0 if exact else sum(image.tokens if free else len(image.crops) for image in prompt.images)
        for counted, images in zip(run.last.visual_tokens, predicted, strict=True):
            assert sum(images) - spare <= counted <= sum(images), f"predicted {predicted}, counted {run.last.visual_tokens}"


def _shape_hook(layer: nn.Module, seen: list[int]) -> Any:
    """Looks inside the layer, at the norm that meets the states: what is done in front of the layer has been done."""
    part = next(m for name, m in layer.named_children() if "norm" in name)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        seen.append(states.shape[1])

    return part.register_forward_pre_hook(note, with_kwargs=True)


# ---- 6


def training(name: str, reducer: str | None, whole: str) -> None:
    """The loss is that of the caller's labels; another answer changes no map; gradient checkpointing changes nothing."""
    loaded = load(name)
    model = loaded.model
    inputs = loaded.batch("right", True)
    labels = loaded.labels(inputs)
    found: list[dict[str, Tensor]] = []
    buffers = {n: b.clone() for n, b in model.named_buffers()}  # a batch norm counts along
    try:
        for checkpointing in (False, True):
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            torch.manual_seed(0)
            with attached(model, reducer) as run:
                out = model(**inputs, labels=labels, use_cache=False)
                out.loss.backward()
                maps = {} if run is None else run.last.maps
            assert out.loss.isfinite()
            assert out.logits.shape[:2] == labels.shape, "supervised tokens are missing"
            logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            _close(out.loss, torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100), "loss")
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"loss": out.loss.detach()})
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]) or torch.allclose(value, found[1][key], rtol=1e-4, atol=1e-6), f"checkpointing: {key}"
    if reducer is not None:
        other = {**inputs, "input_ids": torch.where(labels >= 0, inputs["input_ids"].roll(1, 0).clamp(max=20), inputs["input_ids"])}
        model.train()  # as before: batch norms say something else in evaluation
        with foveate.attach(model, reducer) as run, torch.no_grad():
            model(**other, labels=labels, use_cache=False)
        assert maps.keys() == run.last.maps.keys()
        for layer, token_map in run.last.maps.items():
            assert torch.equal(token_map.representative, maps[layer].representative), "the answer has changed the map"
        model.eval()
    for n, b in model.named_buffers():
        b.copy_(buffers[n])


CHECKS: dict[str, Callable[[str, str | None, str], None]] = {
    "keep-all": keep_all,
    "batch": batch,
    "decoding": decoding,
    "masking": masking,
    "ledger": ledger,
    "training": training,
}


@functools.cache
def bare_failure(check: str, name: str) -> str | None:
    """What is wrong with the check on the bare model, None if nothing is."""
    try:
        CHECKS[check](name, None, "none")
    except (Skip, NotApplicable):
        return None
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _close(a: Tensor, b: Tensor, what: str) -> None:
    a, b = a.detach().float(), b.detach().float()
    worst = float((a - b).abs().max()) if a.numel() else 0.0
    assert torch.allclose(a, b, **TOLERANCE), f"{what}: differs by up to {worst:.2g}"
