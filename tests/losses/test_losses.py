"""The losses against their papers' formulas, written again slowly: token by token, in float64, with provenance read off the maps."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import FoveateError
from foveate.losses import EPIC, LOSSES, DualSpeed, Matryoshka, MDist, RDist, Seen, Step, Whole, check_together, parse_loss, plan_step
from foveate.losses.rdist import relation
from foveate.losses.rows import divergence, matched
from foveate.reducers import parse
from foveate.tokens import Kind, Layout, TokenMap

V, N = 11, 14
LABELS = torch.tensor([[-100] * 9 + [3, -100, 4, 5, -100], [-100] * 12 + [7, 1], [-100, 2, *[-100] * 12]])


def layout() -> Layout:
    """Two samples with an image of eight patches (the second with padding in front), and one without."""
    kind = torch.full((3, N), int(Kind.TEXT))
    kind[0, 1:9] = int(Kind.PATCH)
    kind[1, 3:11] = int(Kind.PATCH)
    valid = torch.ones((3, N), dtype=torch.bool)
    valid[1, :2] = False
    visual = kind == int(Kind.PATCH)
    place = torch.full((3, N, 5), -1)
    place[0, 1:9, 0], place[1, 3:11, 0] = 0, 1
    return Layout(kind, valid, torch.arange(N).expand(3, N), place, visual.to(torch.float32))


def some(share: float, seed: int) -> TokenMap:
    """Patches dropped at random, at least one of an image kept."""
    kept = torch.rand((3, N), generator=torch.Generator().manual_seed(seed)) < share
    kept[0, 4] = kept[1, 5] = True
    return TokenMap.keep(layout(), kept)


def thinned(pooled: TokenMap) -> TokenMap:
    return pooled.then(TokenMap.keep(pooled.target, pooled.target.position % 4 == 3))


MAPS = {
    "all": lambda: TokenMap.identity(layout()),
    "half": lambda: some(0.5, 1),
    "few": lambda: some(0.2, 2),
    "pooled": lambda: TokenMap.pool(layout(), 3),
    "pooled, then dropped": lambda: (pooled := TokenMap.pool(layout(), 2)).then(
        TokenMap.keep(pooled.target, pooled.target.position % 4 == 3)
    ),
}
every_map = pytest.mark.parametrize("student", list(MAPS))


def outputs(token_map: TokenMap, seed: int, width: int = V) -> Tensor:
    """Logits at the caller's length, of the map's targets."""
    x = torch.randn((3, token_map.target.shape[1], width), generator=torch.Generator().manual_seed(seed))
    return token_map.expand(x)


# ---- slowly


def slow_kl(wanted: Tensor, given: Tensor, temperature: float = 1.0) -> float:
    def probabilities(row: Tensor) -> list[float]:
        powers = [math.exp(float(x) / temperature) for x in row]
        return [power / sum(powers) for power in powers]

    return sum(p * math.log(p / q) for p, q in zip(probabilities(wanted), probabilities(given), strict=True))


def slow_answers(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    """Sum over the tokens of the answers: each is predicted at the place before its own."""
    places = [(b, n) for b in range(3) for n in range(1, N) if LABELS[b, n] != -100]
    return sum(slow_kl(teacher[b, n - 1], student[b, n - 1], temperature) for b, n in places)


def slow_matches(student: TokenMap, teacher: TokenMap) -> list[tuple[int, int, list[int]]]:
    """(sample, the student's row, the teacher's rows) of each visual token of the student."""
    found = []
    for b in range(3):
        alive = {source for m in range(teacher.target.shape[1]) for source in teacher.sources(b, m)}
        for m in range(student.target.shape[1]):
            group = student.sources(b, m)
            if group and student.source.visual[b, group[0]] and (there := [s for s in group if s in alive]):
                found.append((b, group[0], there))
    return found


def slow_pairs(student: TokenMap, teacher: TokenMap, mine: Tensor, theirs: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """By sample, (the student's row, the mean of the teacher's) of each match."""
    by_sample: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    for b, row, group in slow_matches(student, teacher):
        by_sample[b].append((mine[b, row].double(), torch.stack([theirs[b, s].double() for s in group]).mean(0)))
    return by_sample


def whole(tokens: int = 5, samples: int = 3) -> Whole:
    return Whole(LABELS, torch.tensor(tokens), samples)


# ---- rows


@every_map
@pytest.mark.parametrize("teacher", [None, "half", "pooled"])
def test_matches_go_by_provenance(student: str, teacher: str | None) -> None:
    mine, theirs = MAPS[student](), None if teacher is None else MAPS[teacher]()
    found = matched(mine, theirs)
    expected = slow_matches(mine, MAPS["all"]() if theirs is None else theirs)
    assert expected
    x, y = outputs(mine, 1), outputs(MAPS["all"]() if theirs is None else theirs, 2)
    given = [
        (b, r, sorted(m for m in members if m >= 0))
        for b, r, members in zip(found.sample.tolist(), found.row.tolist(), found.member.tolist(), strict=True)
    ]
    assert [(b, members) for b, _, members in given] == [(b, members) for b, _, members in expected]
    for i, (b, row, members) in enumerate(expected):
        assert torch.equal(found.student(x)[i], x[b, row])  # all members of a group read the same
        torch.testing.assert_close(found.teacher(y)[i], y[b, members].mean(0))


def test_what_was_dropped_has_no_match() -> None:
    source = layout()
    first, second = (TokenMap.keep(source, torch.arange(N).expand(3, N) % 2 == odd) for odd in (0, 1))
    assert len(matched(first, second).sample) == 0
    assert len(matched(first, first).sample) == 8


def test_other_sequences_are_refused() -> None:
    short = layout().take(torch.arange(N - 1).expand(3, N - 1))
    with pytest.raises(FoveateError, match="cannot be matched"):
        matched(TokenMap.identity(short), MAPS["half"]())


@given(seed=st.integers(0, 99), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_divergence_is_forward_kl(seed: int, temperature: float) -> None:
    a, b = torch.randn(2, 4, V, generator=torch.Generator().manual_seed(seed))
    expected = [slow_kl(x, y, temperature) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(divergence(a, b, temperature), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(divergence(a, b, temperature), divergence(b, a, temperature))


# ---- each loss


@every_map
def test_epic(student: str) -> None:
    mine, theirs = MAPS[student](), MAPS["half"]()
    x, y = outputs(mine, 1), outputs(theirs, 2)
    for alpha, temperature in ((0.5, 2.0), (0.4, 1.0)):
        loss = EPIC(alpha=alpha, temperature=temperature)
        expected = alpha * temperature**2 * slow_answers(x, y, temperature) / 5
        assert float(loss.between(Seen(x, mine), Seen(y, theirs), whole())) == pytest.approx(expected, rel=1e-4)
        assert loss.answers == 1 - alpha


@every_map
def test_dualspeed(student: str) -> None:
    x, y = outputs(MAPS["all"](), 1), outputs(MAPS[student](), 2)
    expected = slow_answers(x, y) / 5
    assert float(DualSpeed().between(Seen(x), Seen(y, MAPS[student]()), whole())) == pytest.approx(expected, rel=1e-4)


@every_map
@pytest.mark.parametrize("teacher", ["all", "half"])
def test_mdist(student: str, teacher: str) -> None:
    mine, theirs = MAPS[student](), MAPS[teacher]()
    x, y = outputs(mine, 1), outputs(theirs, 2)
    visual = 0.0
    for pairs in slow_pairs(mine, theirs, x, y):
        visual += sum(slow_kl(wanted, own) for own, wanted in pairs) / max(len(pairs), 1)
    for loss in (MDist(), MDist(text=0.5, visual=2.0), MDist(visual=0.0), MDist(text=0.0)):
        expected = loss.text * slow_answers(x, y) / 5 + loss.visual * visual / 6
        given = loss.between(Seen(x, mine), Seen(y, None if teacher == "all" else theirs), whole(samples=6))
        assert float(given) == pytest.approx(expected, rel=1e-4)


@every_map
@pytest.mark.parametrize("teacher", ["all", "half"])
def test_rdist(student: str, teacher: str) -> None:
    mine, theirs = MAPS[student](), MAPS[teacher]()
    x, y = outputs(mine, 1), outputs(theirs, 2)
    expected = 0.0
    for pairs in slow_pairs(mine, theirs, x, y):
        if pairs:
            grams = [[float(a[side] @ b[side]) for a in pairs for b in pairs] for side in (0, 1)]
            dot = sum(p * q for p, q in zip(*grams, strict=True))
            expected += 1 - dot / math.prod(math.sqrt(sum(p * p for p in gram)) for gram in grams)
    given = RDist().between(Seen(x, mine), Seen(y, None if teacher == "all" else theirs), whole(samples=6))
    assert float(given) == pytest.approx(expected / 6, rel=1e-4)


def test_relations_by_hand() -> None:
    own, wanted = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(relation(own, wanted)) == pytest.approx(1 - 2 / (math.sqrt(2) * 2), abs=1e-6)
    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    assert float(relation(y, 3 * y @ turned)) == pytest.approx(0, abs=1e-6)
    assert float(relation(y, torch.cat([y, torch.zeros(5, 3)], 1))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [EPIC(), DualSpeed(), MDist(), RDist()], ids=str)
@pytest.mark.parametrize("which", ["all", "half", "pooled"])
def test_a_student_like_its_teacher_loses_nothing_and_gradients_are_its_own(loss: Any, which: str) -> None:
    token_map = MAPS[which]()
    x = outputs(token_map, 1)
    assert float(loss.between(Seen(x, token_map), Seen(x, token_map), whole())) == pytest.approx(0, abs=1e-5)
    mine, theirs = (outputs(token_map, seed).requires_grad_() for seed in (1, 2))
    loss.between(Seen(mine, token_map), Seen(theirs, token_map), whole()).backward()
    assert theirs.grad is None
    assert mine.grad is not None
    assert mine.grad.isfinite().all()
    assert mine.grad.any()


@pytest.mark.parametrize("loss", [EPIC(), DualSpeed(), MDist(), RDist()], ids=str)
def test_parts_of_a_batch_add_up(loss: Any) -> None:
    """Row by row, with the whole step's counts, a term is what it is of all rows at once."""
    mine, theirs = MAPS["pooled"](), MAPS["half"]()
    x, y = outputs(mine, 1), outputs(theirs, 2)

    def part(rows: list[int]) -> Tensor:
        def of(token_map: TokenMap) -> TokenMap:
            def pick(one: Layout) -> Layout:
                return Layout(*(getattr(one, name)[rows] for name in ("kind", "valid", "position", "place", "size")))

            weight = None if token_map.weight is None else token_map.weight[rows]
            source, target = pick(token_map.source), pick(token_map.target)
            return TokenMap(source, target, token_map.member[rows], weight, token_map.representative[rows])

        found: Tensor = loss.between(Seen(x[rows], of(mine)), Seen(y[rows], of(theirs)), Whole(LABELS[rows], 5, 3))
        return found

    torch.testing.assert_close(part([0]) + part([1]) + part([2]), part([0, 1, 2]))
    torch.testing.assert_close(part([0, 2]) + part([1]), part([0, 1, 2]))


# ---- passes


@pytest.mark.parametrize(
    ("number", "low", "high", "gap"), [(0, 0.1, 0.1, 0.1), (50, 0.18, 0.42, 0.3), (100, 0.26, 0.74, 0.3), (20, 0.132, 0.228, 0.2)]
)
def test_epics_budgets(number: int, low: float, high: float, gap: float) -> None:
    drawn = [EPIC().removed(Step(seed, number, 100)) for seed in range(400)]
    for student, teacher in drawn:
        assert low - 1e-12 <= student <= high + 1e-12
        assert teacher == pytest.approx(max(student - gap, 0), abs=1e-12)
    if high > low:
        mean = sum(student for student, _ in drawn) / len(drawn)
        assert mean == pytest.approx((low + high) / 2, abs=0.1 * (high - low))


def test_epic_sets_the_stages_reducer() -> None:
    first = plan_step([EPIC()], Step(0, 0, 100, "dart:keep=0.5,layer=1"))
    assert (first.students, first.teachers, first.answers) == (("dart:keep=0.9,layer=1",), ("none",), 0.5)
    at = next(step for step in (Step(seed, 70, 100, "dart:keep=0.5,layer=1") for seed in range(99)) if EPIC().removed(step)[1])
    later = plan_step([EPIC()], at)
    (student,), (teacher,) = (parse(spelled) for spelled in (*later.students, *later.teachers))
    assert (1 - student.keep, 1 - teacher.keep) == pytest.approx(EPIC().removed(at))  # type: ignore[attr-defined]
    assert student.layer == teacher.layer == 1  # type: ignore[attr-defined]


def test_dualspeed_is_slow_now_and_then() -> None:
    fast, slow = "divprune:keep=0.1", "none"
    plans = [plan_step([DualSpeed()], Step(3, number, 2000, fast)) for number in range(2000)]
    kinds = Counter((plan.students, plan.teachers) for plan in plans)
    assert set(kinds) == {((fast,), ()), ((slow,), (fast,))}
    assert 150 < kinds[((slow,), (fast,))] < 250
    assert all(plan.students == (fast,) for plan in (plan_step([DualSpeed(slow=0)], Step(3, n, 50, fast)) for n in range(50)))
    assert all(plan.students == (slow,) for plan in (plan_step([DualSpeed(slow=1)], Step(3, n, 50, fast)) for n in range(50)))


def test_matryoshka_is_all_budgets_or_one_of_them() -> None:
    step = Step(0, 0, 10, "dart:keep=0.3")
    assert plan_step([Matryoshka()], step).students == ("none", "dart:keep=0.5", "dart")  # 0.25 is DART's default
    assert plan_step([Matryoshka(budgets=0.5)], step).students == ("dart:keep=0.5",)
    drawn = Counter(plan_step([Matryoshka(draw="one")], Step(0, n, 900, "dart:keep=0.3")).students for n in range(900))
    assert set(drawn) == {("none",), ("dart:keep=0.5",), ("dart",)}
    assert min(drawn.values()) > 240


def test_distillation_joins_whoever_chooses() -> None:
    plan = plan_step([Matryoshka(), MDist(), RDist()], Step(0, 0, 10, "dart:keep=0.3"))
    assert plan.teachers == ("none",)
    assert {(i, student) for i, student, _ in plan.pairs} == {(i, student) for i in (1, 2) for student in ("dart:keep=0.5", "dart")}
    alone = plan_step([MDist()], Step(0, 0, 10, "none"))  # of a schedule that ends with all tokens
    assert (alone.students, alone.teachers, alone.pairs) == (("none",), (), ())


@given(seed=st.integers(0, 2**32 - 1), number=st.integers(0, 999))
def test_passes_are_a_function_of_seed_and_step(seed: int, number: int) -> None:
    for losses in ([EPIC()], [DualSpeed(slow=0.5), MDist()], [Matryoshka(draw="one")]):
        plans = [plan_step(losses, Step(seed, number, 1000, "dart:keep=0.3")) for _ in range(2)]
        assert plans[0] == plans[1]
    assert 0 <= Step(seed, number, 1000).draw("x") < 1
    assert Step(seed, number, 1000).draw("x") != Step(seed, number, 1000).draw("y")


# ---- spelling, and what is refused


@pytest.mark.parametrize(
    "spelled",
    [
        "epic",
        "epic:alpha=0.4",
        "dualspeed:slow=0.2",
        "mdist",
        "mdist:text=0.5,visual=2.0",
        "rdist",
        "matryoshka:budgets=1/0.5",
        "matryoshka",
    ],
)
def test_spellings_are_read_back(spelled: str) -> None:
    assert str(parse_loss(spelled)) == spelled
    assert parse_loss(str(parse_loss(spelled))) == parse_loss(spelled)


def test_every_loss_says_where_it_comes_from() -> None:
    for name, loss in LOSSES.items():
        assert loss.name == name
        assert loss.paper in (__import__(loss.__module__, fromlist=["x"]).__doc__ or "")


@pytest.mark.parametrize(
    ("spelled", "why"),
    [
        ("epics", "unknown loss 'epics'"),
        ("epic:alfa=1", "has no option 'alfa'"),
        ("epic:alpha=0", "alpha=0 must be above 0"),
        ("epic:temperature=0", "temperature=0 above 0"),
        ("dualspeed:slow=1.5", "slow=1.5 is a probability"),
        ("matryoshka:budgets=2/1", "are not different shares"),
        ("matryoshka:budgets=0.5/0.5", "are not different shares"),
        ("matryoshka:budgets=half", "are no shares"),
        ("matryoshka:draw=two", "choose all or one"),
        ("mdist:text=-1", "weights"),
        ("mdist:text=0,visual=0", "one of them above 0"),
        ("epic:alpha", "cannot read 'alpha'"),
    ],
)
def test_impossible_options_are_errors(spelled: str, why: str) -> None:
    with pytest.raises(FoveateError, match=why):
        parse_loss(spelled)


@pytest.mark.parametrize(
    ("losses", "schedule", "why"),
    [
        (["mdist", "mdist"], ["dart"], "mdist stands among the losses twice"),
        (["epic", "dualspeed"], ["dart"], "epic and dualspeed each say which passes"),
        (["epic"], ["dart", "none"], "epic sets how many tokens"),
        (["epic"], ["vcc:stride=4"], "vcc keeps at most"),
        (["epic"], ["schedule"], "schedule has no option keep"),
        (["epic"], ["vcc+dart"], "needs one that has an option keep"),
        (["epic"], ["dart+fastv"], "needs one that has an option keep"),
        (["matryoshka"], ["none"], "matryoshka sets how many tokens"),
        (["dualspeed"], ["dart", "none"], "a part of its schedule has none"),
        (["mdist", "rdist"], ["none"], "in this stage every pass has all"),
    ],
)
def test_what_does_not_go_together_is_refused(losses: list[str], schedule: list[str], why: str) -> None:
    with pytest.raises(FoveateError, match=why):
        check_together([parse_loss(loss) for loss in losses], schedule)
