"""attach: reduces the visual tokens of a model. Hooks on the decoder and its layers; no source edited, no weight changed.

    with foveate.attach(model, VCC(layer=2, stride=8)) as run:
        model.generate(**inputs)
    run.ledger

What happens in one forward pass (prefill, training step or decoding step), a `ForwardPass`:

1. what the model encodes, and which slots it puts that into, is noted (`foveate.probes.encoding`, `arrivals`); cuts inside the tower are
   made, and carried out in front of the first decoder layer (`tower_cuts`);
2. in front of the decoder a `Chunk` is made of the part of the sequence that arrives, and where each question ends is told (`questions`);
3. in front of every layer at which a reducer acts (`wiring`), the hidden states are cut; that layer and those after it get masks, positions
   and side inputs cut by the same map (`chunk`);
4. after each layer a cache policy, if there is one, leaves of its keys and values what later tokens shall see (`thinning`, `held`);
5. after the last layer the states are expanded to the caller's length, so that logits and labels keep their places.

What decoding needs of earlier passes is remembered on the request's cache (`cache`). Nothing of a call is kept on the attachment, so that
several threads may call one attached model.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import nn

from foveate.anatomy import read
from foveate.cache_policies import CachePolicy
from foveate.cache_policies import parse as parse_policy
from foveate.engine.run import RUN, Run
from foveate.errors import FoveateError
from foveate.presets import resolved
from foveate.reducers import Preparing, Reducer, before_processor, load_reducers, parse, saved_reducers, spell

_RECORD = ("none", "last", "all")
_SAVED: Any = object()


def attach(
    model: nn.Module,
    reducers: str | Reducer | Sequence[Reducer] | None = _SAVED,
    *,
    maps: Sequence[Reducer] | None = None,
    processor: Any = None,
    cache: str | CachePolicy | None = None,
    record: str = "last",
    shortcuts: bool = True,
) -> Run:
    """Reduces the visual tokens of `model` until the returned run is detached (or its `with` block is left).

    model: a transformers VLM, also wrapped by PEFT or DDP, or the base model in it.
    reducers: a reducer, a list (applied in order of their layers), a spelling such as "vcc:layer=2,stride=8", None or "none" for
        none at all, or "preset:balanced" for what is known to suit its family (`foveate.presets`); left out, what `foveate.json` beside
        the model's weights says (with a `cache` there may be none).
    maps: `run.maps` of another attachment, in place of reducers: what was done there is done again, on the same batch or a longer one.
    processor: the model's processor, where a reducer acts on the images themselves (downsample): while attached it prepares them.
    cache: a policy that thins the key-value cache, or its spelling, such as "snapkv:keep=0.5"; beside the reducers or with None.
    record: which forward passes with images stay readable in `run.passes`: "none", "last" or "all".
    shortcuts: False runs the whole machinery even where nothing is to be done; results are the same (tests use it).

    Raises FoveateError for a model that cannot be opened, an unknown reducer, or a model that has something attached already.
    """
    if record not in _RECORD:
        raise FoveateError(f"record={record!r} is not possible; choose one of {', '.join(_RECORD)}")
    anatomy = read(model)
    if hasattr(anatomy.core, RUN):
        attached = spell(getattr(anatomy.core, RUN).reducers)
        raise FoveateError(f"the model already has {attached!r} attached; detach it first, or give both reducers to one attach as a list")
    if maps is not None:
        if reducers is not _SAVED:
            raise FoveateError("give either reducers or maps, not both")
        reducers = list(maps)
    around = _around(model, anatomy.core)
    if isinstance(cache, str):
        cache = parse_policy(cache)
    if reducers is _SAVED:
        name = str(next((getattr(module.config, "name_or_path", "") for module in around if hasattr(module, "config")), ""))
        reducers = load_reducers(name) if cache is None else saved_reducers(name)  # a policy alone is enough to attach
    if reducers is None:
        reducers = []
    elif isinstance(reducers, str):
        reducers = parse(resolved(reducers, str(getattr(getattr(anatomy.core, "config", None), "model_type", ""))))
    elif isinstance(reducers, Reducer):
        reducers = [reducers]
    preparing = before_processor(reducers)
    if preparing and processor is None:
        raise FoveateError(
            f"{spell(preparing)!r} acts on the images, in front of the processor: give attach(model, …, processor=processor), or prepare "
            "each image by foveate.reducers.prepare and attach what foveate.reducers.in_model leaves"
        )
    return Run(around, anatomy, list(reducers), record, shortcuts, Preparing(processor, preparing), cache)


def _around(model: nn.Module, core: nn.Module) -> list[nn.Module]:
    """The modules from the outermost one to `core`, each in the one before: wrappers, the model with the head, the base model."""
    around = [module for module in model.modules() if any(part is core for part in module.modules())]
    while (owner := _owner(around[0])) is not None:  # a base model's `generate` and labels are its owner's
        around.insert(0, owner)
    return around


def _owner(module: nn.Module) -> nn.Module | None:
    """The model with a `generate` of its own that has `module` as a part. A module does not know it, the interpreter does."""
    if hasattr(type(module), "generate"):
        return None
    for parts in gc.get_referrers(module):
        if isinstance(parts, dict) and any(part is module for part in parts.values()):
            for holder in gc.get_referrers(parts):
                found = holder if isinstance(holder, nn.Module) else None
                if found is None and isinstance(holder, dict):  # the instance's attributes, of which its parts are one
                    found = next((h for h in gc.get_referrers(holder) if isinstance(h, nn.Module) and vars(h) is holder), None)
                if found is not None and found._modules is parts and hasattr(type(found), "generate"):
                    return found
    return None
