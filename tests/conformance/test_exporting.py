"""What other engines get from `reduce_embeddings` is what `attach` does: the same tokens of every image, their states and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.anatomy import read
from foveate.errors import FoveateError
from foveate.probes.encoding import Encodings, Item
from foveate.reducers import METHODS, parse
from foveate.reducers.exporting import count_embeddings, reduce_embeddings, unexportable
from foveate.tokens import Layout
from tests.conformance.checks import load

MORE = ["vcc:layer=0,stride=3", "random:keep=0.3,seed=4", "divprune:keep=0.3,scope=crop", "tome:keep=5", "fastervlm:keep=3,positions=keep"]
EXPORTED = [text for method in METHODS.values() for text in method.examples if "+" not in text and not unexportable(parse(text)[0])]


def test_every_exportable_method_is_here() -> None:
    assert {parse(text)[0].name for text in EXPORTED} >= {name for name, method in METHODS.items() if not unexportable(method())}


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "foveate"])
def test_attach_keeps_the_same_tokens(name: str) -> None:
    loaded = load(name)
    anatomy, inputs = read(loaded.model), loaded.batch("right")
    counted = 0
    for text in [*EXPORTED, *MORE]:
        (reducer,) = parse(text)
        items: list[Item] = []
        features: list[Tensor] = []
        entered: list[Tensor] = []

        def seen(modality: str, found: list[Item], of: list[Tensor], into: Any = (items, features)) -> None:
            into[0].extend(found)
            into[1].extend(of)

        def enters(module: Any, args: Any, kwargs: Any, into: list[Tensor] = entered) -> None:
            into.append(args[0] if args else kwargs["hidden_states"])

        encodings = Encodings(anatomy, reducer.sites(4)[0].needs, seen)
        try:
            with foveate.attach(loaded.model, reducer, shortcuts=False) as run, torch.no_grad():
                hook = anatomy.layers[0].register_forward_pre_hook(enters, with_kwargs=True)
                loaded.model(**inputs)
                hook.remove()
                cut = run.last.maps[0]
        except FoveateError:
            with pytest.raises(FoveateError):
                reduce_embeddings(reducer, features[0], Layout.item(items[0].kind, items[0].place), items[0].values)
            continue
        finally:
            encodings.remove()
        for image, (item, of) in enumerate(zip(items, features, strict=True)):
            row, first = map(int, (cut.source.image == image).nonzero()[0])
            mine = [m for m, at in enumerate(cut.representative[row].tolist()) if first <= at < first + len(item)]
            layout = Layout.item(item.kind, item.place)
            here = cut.source.position[row, first : first + len(item)]
            try:
                left = count_embeddings(reducer, layout)
            except FoveateError:  # the number follows from scores: hired on tiles
                continue
            reduced = reduce_embeddings(reducer, of, layout, item.values, key=item.key, positions=here)
            counted += 1
            assert (first + reduced.kept).tolist() == cut.representative[row, mine].tolist(), text
            assert len(reduced.kept) == left
            torch.testing.assert_close(reduced.embeddings, entered[-1][row, mine], rtol=1e-5, atol=1e-6)
    assert counted >= 30
