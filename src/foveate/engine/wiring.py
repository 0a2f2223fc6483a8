"""Who acts where in a model, and the signals that this takes; everything is checked before a hook is set.

What each type of site does stands in one table, `foveate.contract.sites`. Here it becomes four: what acts in front of blocks of the tower,
in front of decoder layers and around one, and who says which token sees which in decoder layers. The driver sets a hook for each of these,
and knows no site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from foveate.anatomy import Anatomy, grows
from foveate.anatomy.config import latent
from foveate.cache_policies import CachePolicy
from foveate.contract import GROUPS, Attention, Keys, Signal, States, Visibility
from foveate.engine.replay import ReplayInTower
from foveate.engine.rulings import check_rules
from foveate.engine.tower_cuts import Carried
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.probes.tower import TOWER_SIGNALS
from foveate.reducers import Reducer
from foveate.reducers.learned import find_weights

Step = tuple[Reducer, int]  # a reducer, and which of its sites it is at


@dataclass
class Wiring:
    """By block of the tower and by decoder layer, what acts in front of it (`tower`, `cuts`) or around it (`through`), and by the
    layer from which it holds who sees whom (`rulings`); weights by method. `cache` is the policy that acts after the layers `thinned`."""

    tower: dict[int, list[Step]] = field(default_factory=dict)
    cuts: dict[int, list[Step]] = field(default_factory=dict)
    through: dict[int, Step] = field(default_factory=dict)
    rulings: dict[int, list[tuple[Reducer, int, Visibility]]] = field(default_factory=dict)
    needs: set[Signal] = field(default_factory=set)
    tower_needs: set[Signal] = field(default_factory=set)
    weights: dict[str, nn.Module] = field(default_factory=dict)
    cache: CachePolicy | None = None
    thinned: tuple[int, ...] = ()

    @classmethod
    def of(cls, reducers: Sequence[Reducer], anatomy: Anatomy, model: str = "", cache: CachePolicy | None = None) -> Wiring:
        """FoveateError where a reducer's layer is not there, two of them do not go together, or one's weights are missing. model: its
        name, beside whose weights those of the reducers lie. cache: a policy; one that keeps everything is left out."""
        found, depth = cls(weights=find_weights(anatomy, reducers, model)), len(anatomy.layers)
        if cache is not None and not cache.keeps_everything:
            found._thin(cache, anatomy)
        for reducer in reducers:
            for number, site in enumerate(reducer.sites(depth)):
                step = reducer, number
                if site.effect.decides is None:  # `foveate.reducers.Preparing` sees to it
                    continue
                if anatomy.weighs:
                    raise NotApplicable(
                        Reason.NO_TOKENS,
                        f"{reducer} has nothing to reduce: images become weights of this model's decoder, and no tokens that enter it",
                    )
                if site.effect.place == "tower":
                    found.tower.setdefault(site.index, []).append(step)
                    found.tower_needs.update(site.needs)
                    continue
                if site.layer >= depth:
                    if not reducer.beyond:
                        raise FoveateError(f"{reducer}: there is no decoder layer {site.layer} to act at; choose one from 0 to {depth - 1}")
                    continue
                if isinstance(site, Visibility):
                    check_rules(site, anatomy, str(reducer))
                    found.rulings.setdefault(site.layer, []).append((reducer, number, site))
                elif site.effect.lasts:
                    found.cuts.setdefault(site.layer, []).append(step)
                elif found.through.setdefault(site.layer, step) != step:
                    raise FoveateError(f"two reducers say what goes through decoder layer {site.layer}; leave one of them out")
                found.needs.update(site.needs)
        if cache is not None and found.rulings:
            ruling = next(iter(found.rulings.values()))[0][0]
            raise FoveateError(f"{ruling} says which token sees which of all that came, and {cache} lets some go: attach one of the two")
        found._carry()
        found._check()
        return found

    @property
    def acts(self) -> bool:
        return bool(self.tower or self.decides)

    @property
    def decides(self) -> bool:
        """Whether something is decided in front of a decoder layer."""
        return bool(self.cuts or self.through or self.rulings)

    def puts_back(self, layer: int) -> bool:
        """Whether states may have to be put back behind a decoder layer."""
        return layer in self.through or any(site.at(layer) for at in self.rulings.values() for *_, site in at)

    @property
    def tells_images(self) -> bool:
        """Whether anything that acts has to know which tokens are of images."""
        return self.acts or (self.cache is not None and self.cache.tells_images)

    @property
    def watched(self) -> set[int]:
        """The decoder layers whose attention is looked at."""
        return {signal.layer for signal in self.needs if isinstance(signal, (Attention, Keys))} | set(self.thinned)

    @property
    def remembered(self) -> set[int]:
        """The decoder layers whose arriving states the next layer's reducers look at."""
        return {signal.layer for signal in self.needs if isinstance(signal, States)}

    def _thin(self, policy: CachePolicy, anatomy: Anatomy) -> None:
        if latent(anatomy.text_config):
            raise NotApplicable(
                Reason.LATENT_CACHE,
                f"{policy}: this model caches latents, of which keys and values are made anew at every step, so that there are none to be "
                "looked at and let go: take a reducer in place of a policy",
            )
        layers = [site.layer for site in policy.sites(len(anatomy.layers))]
        self.cache = policy
        self.thinned = tuple(layer for layer in layers if grows(anatomy.layers[layer], anatomy.text_config, layer))
        if not self.thinned:
            raise NotApplicable(
                Reason.BOUNDED_CACHE, f"{policy}: no decoder layer of this model attends to all of the sequence, so no cache grows with it"
            )

    def _carry(self) -> None:
        """What is cut in the tower leaves the sequence in front of the language model; recorded maps do so themselves."""
        acting = [step for at in self.tower.values() for step in at if not isinstance(step[0], ReplayInTower)]
        if acting:
            renumber = any(reducer.positions_at(number) == "renumber" for reducer, number in acting)
            self.cuts.setdefault(0, []).insert(0, (Carried(positions="renumber" if renumber else "keep"), 0))
            self.needs.add(GROUPS)

    def _check(self) -> None:
        for signal in self.needs:
            if isinstance(signal, TOWER_SIGNALS) and self.tower:
                raise FoveateError(
                    f"{signal} of a tower in which tokens are cut says nothing of whole images; attach one of the two reducers"
                )
            if isinstance(signal, (Attention, Keys)) and signal.layer in self.through:
                raise FoveateError(f"{signal}: some tokens pass this layer by and have no attention there; choose another layer")
