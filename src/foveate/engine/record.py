"""What was done in a forward pass: tokens, maps and cost as they were, and the decisions, to be done again."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from foveate.accounting import Ledger, Prompt
from foveate.accounting.predict import observed
from foveate.cache_policies import CachePolicy
from foveate.contract import ImageSize
from foveate.engine.rulings import Ruling, rules_at, unseen_pairs
from foveate.errors import FoveateError
from foveate.probes.encoding import Encoded
from foveate.probes.tower_pass import TowerPass
from foveate.reducers import Reducer
from foveate.tokens import Layout, TokenMap


@dataclass
class Record:
    """One forward pass as it was: the layout at each layer, the map in front of the layers that have one, and for bypassed layers the map
    from arriving to processed slots."""

    layouts: list[Layout] = field(default_factory=list)
    maps: dict[int, TokenMap] = field(default_factory=dict)
    bypasses: dict[int, TokenMap] = field(default_factory=dict)
    tower: list[TowerPass] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    steps: list[Reducer] = field(default_factory=list)  # what was decided, one by one, to be done again
    encoded: list[tuple[Encoded, Fraction] | None] = field(default_factory=list)  # by item: what encoded it, None where that was not seen
    reducers: list[Reducer] = field(default_factory=list)  # what scored and decided; recorded maps do not
    rulings: tuple[Ruling, ...] = ()  # who saw whom
    proportional: set[int] = field(default_factory=set)  # blocks of the tower behind which attention follows the tokens' sizes
    cache: CachePolicy | None = None  # what thinned the layers' caches
    ran: dict[int, Fraction] = field(default_factory=dict)  # layer -> keys that it held when it ran, where a policy has decided then
    stays: dict[int, Fraction] = field(default_factory=dict)  # likewise, those that are left; over the batch, mean over heads

    @property
    def left(self) -> TokenMap:
        """From the slots that entered the language model to those that its last layer gave, what went past a layer among them."""
        whole = TokenMap.identity(self.entered)
        for at in sorted(self.maps):
            whole = whole.then(self.maps[at])
        return whole

    @property
    def entered(self) -> Layout:
        """What entered the language model."""
        entering = self.maps.get(0) or self.bypasses.get(0)
        return self.layouts[0] if entering is None else entering.source

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens that went through each decoder layer, over the whole batch: all tokens but those of text."""
        return [n - int((layout.valid & ~layout.visual).sum()) for n, layout in zip(self.tokens, self.layouts, strict=True)]

    @property
    def tokens(self) -> list[int]:
        """Tokens, text and visual, that went through each decoder layer, over the whole batch: by the shape of the states that the layer
        was given, without the padding in it."""
        return [layout.shape[0] * length - int((~layout.valid).sum()) for layout, length in zip(self.layouts, self.lengths, strict=True)]

    @property
    def images(self) -> int:
        """Images of the batch."""
        return int(self.entered.image.max()) + 1

    def ledger(self, config: Any, **options: Any) -> Ledger:
        """The pass' tokens, KV bytes and FLOPs, from the token counts as they were; options as in `Ledger.observed`."""
        visual = [layout.visual.sum(1).tolist() for layout in self.layouts]
        total = [layout.valid.sum(1).tolist() for layout in self.layouts]
        if [sum(row) for row in total] != self.tokens:
            raise FoveateError(
                f"the layers saw {self.tokens} tokens where the maps leave {[sum(row) for row in total]}: please report this"
            )
        seen = [call for call in self.encoded if call is not None]
        if seen and len(seen) == len(self.encoded):
            calls: dict[int, tuple[Encoded, Fraction]] = {}
            for call, share in seen:  # counting a call takes a while, and many items may share one
                calls[id(call)] = call, share + calls.get(id(call), (call, Fraction(0)))[1]
            options = {"encoded": list(calls.values()), **options}
        if self.rulings:
            options = {"unseen": self.unseen, **options}
        how = {"images": self.images, "reducers": self.reducers, "prompts": self.prompts, "in_tower": self.left_in_tower, **options}
        if self.cache is None or not self.stays or options.get("mode", "prefill") != "prefill":
            return observed(config, visual, total, **how)
        return observed(config, visual, total, cache=self.cache, **how).thinned(self.stays, self.ran, self.cache.together)

    @property
    def left_in_tower(self) -> list[dict[int, int]]:
        """Of each crop that the tower saw, by block in front of which something was cut, the tokens that were left of its patches'."""
        found = []
        for call in self.tower:
            left = {block: token_map.target.visual.sum(1).tolist() for block, token_map in call.maps.items()}
            found += [{block: counts[crop] for block, counts in left.items()} for crop in range(call.first.shape[0])]
        return found

    @property
    def unseen(self) -> list[list[int]]:
        """By decoder layer and row of the batch, (query, key) pairs that need not be computed since a rule hides them."""
        found: dict[Any, list[int]] = {}
        each = []
        for layer, layout in enumerate(self.layouts):
            key = rules_at(layer, self.rulings), id(layout)
            if key not in found:
                found[key] = unseen_pairs(key[0], layout)
            each.append(found[key])
        return each

    @property
    def prompts(self) -> list[Prompt]:
        """The sizes of what entered the language model, row by row, and of what was left of it."""
        layout = self.entered
        found = []
        cuts = {(layer, True): cut.target for layer, cut in self.maps.items()} | {
            (at, False): by.target for at, by in self.bypasses.items()
        }
        for row, (visual, place, length) in enumerate(zip(layout.visual, layout.place, layout.valid.sum(1).tolist(), strict=True)):
            numbers = place[visual][:, 0].unique().tolist()
            images = [ImageSize.of(place[visual & (place[:, 0] == i)][:, 1:]) for i in numbers]
            left = {at: [int((after.visual[row] & (after.image[row] == i)).sum()) for i in numbers] for at, after in cuts.items()}
            found.append(Prompt(images, length - int(visual.sum()), left))
        return found

    def provenance(self, layer: int) -> TokenMap:
        """From the slots that entered the language model to those that went through decoder layer `layer`."""
        whole = TokenMap.identity(self.entered)
        for at in sorted(self.maps):
            if at <= layer:
                whole = whole.then(self.maps[at])
        return whole.then(self.bypasses[layer]) if layer in self.bypasses else whole
