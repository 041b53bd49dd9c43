"""Law 1 for the engine: what a request gets does not depend on its company; and slots never leak."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest

import unmask
from unmask.engine import Ask, Engine, Full, Ticket, ask
from unmask.engine.lane import Lane
from unmask.errors import UserError
from unmask.generate import Model
from unmask.settings import Settings

PROMPT = "Tom has {} eggs . He buys {} eggs . How many eggs has he ?"
KINDS = (
    {"recipe": "threshold"},
    {"recipe": "dual"},
    {"recipe": "prophet"},
    {"recipe": "llada", "steps": 12},
    {"recipe": "threshold", "temperature": 0.9, "top_p": 0.8},
    {"recipe": "prefix", "temperature": 0.7, "presence_penalty": 0.5},
    {"recipe": "wino"},
    {"recipe": "adjust"},
    {"recipe": "guided"},
    {"recipe": "threshold", "cfg": 0.5},
    {"recipe": "threshold", "template": "{think:11} #### {answer:1}"},
)


@lru_cache
def model(name: str = "dllm") -> Model:
    return unmask.load(name)


def asked(number: int, **more: object) -> Ask:
    draw = random.Random(number)
    kind = {**KINDS[number % len(KINDS)], "seed": number}
    if "template" not in kind:
        kind["length"] = draw.choice([12, 17, 24])
    prompt = PROMPT.format(draw.randint(2, 30), draw.randint(2, 30)) + " Why ?" * draw.randint(0, 4)
    return ask(model(), prompt, Settings(**kind), **more)  # type: ignore[arg-type]


def told(ticket: Ticket) -> tuple[object, ...]:
    assert ticket.error is None, ticket.error
    assert ticket.done is not None
    done = ticket.done
    return done.text, done.tokens, done.reason, done.forwards, done.positions, done.decided


@lru_cache
def alone(number: int) -> tuple[object, ...]:
    return told(Engine(model(), rows=1).run([asked(number)])[0])


def test_a_storm_of_arrivals_and_aborts() -> None:
    draw, engine = random.Random(7), Engine(model(), rows=5, length=96)
    waiting, tickets, given_up = list(range(33)), {}, set()
    while waiting or not engine.idle:
        for number in [waiting.pop(0) for _ in range(min(len(waiting), draw.choice([0, 0, 1, 4])))]:
            tickets[number] = engine.submit([asked(number)])[0]
        if tickets and draw.random() < 0.15:
            number = draw.choice([*tickets])
            if not tickets[number].ended:
                engine.abort(tickets[number])
                given_up.add(number)
        engine.tick()
        assert engine.live <= 5
    assert len(given_up) > 2, "a storm has aborts"
    for number, ticket in tickets.items():
        if number not in given_up:
            assert told(ticket) == alone(number), KINDS[number % len(KINDS)]
    assert [sorted(lane.free) for lane in engine.lanes.values()] == [[*range(5)]] * len(engine.lanes)
    assert engine.counts.finished + engine.counts.aborted == 33
    assert engine.counts.aborted == len(given_up)


@pytest.mark.parametrize("name", ["dllm", "d2f", "twin"])
def test_it_writes_what_generate_writes(name: str) -> None:
    prompts = [PROMPT.format(a, a + 3) for a in range(4, 10)]
    found = Engine(model(name), rows=4).run(ask(model(name), p, Settings()) for p in prompts)
    for prompt, ticket in zip(prompts, found, strict=True):
        output = model(name).generate(prompt)
        assert ticket.done is not None
        assert (ticket.done.text, [*ticket.done.tokens]) == (output.text, output.tokens)
        assert ticket.done.forwards == output.forwards


def test_an_aborted_row_costs_nothing_more() -> None:
    engine = Engine(model(), rows=2)
    first, second = engine.submit([asked(3), asked(14)])
    engine.tick()
    engine.abort(first)
    before = engine.counts.forwards
    engine.tick()
    assert engine.counts.forwards == before + 1 and engine.live == 1
    while engine.tick():
        pass
    assert second.done and not first.done and engine.counts.aborted == 1


def test_first_come_first_served_within_the_budget() -> None:
    engine = Engine(model(), rows=8, cells=100)
    tickets = engine.submit([asked(n) for n in (0, 1, 2, 3)])
    sizes = [t.ask.cells for t in tickets]
    engine.tick()
    fitting = next(n for n in range(5) if sum(sizes[: n + 1]) > 100 or n == 4)
    assert [bool(t.started) for t in tickets] == [i < fitting for i in range(4)]
    while engine.tick():
        pass
    assert [t.started for t in tickets] == sorted(t.started for t in tickets)


def test_bounds() -> None:
    engine = Engine(model(), rows=1, queue=2, length=60)
    with pytest.raises(UserError, match="cells"):
        engine.submit([ask(model(), PROMPT.format(1, 2), Settings(length=90))])
    engine.submit([asked(0), asked(1)])
    with pytest.raises(Full, match="later"):
        engine.submit([asked(1)])
    assert engine.waiting == 2


def test_a_fault_ends_its_own_lane_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(), rows=4)
    good, bad = engine.submit([asked(0), asked(7)])
    engine.tick()
    lane = next(lane for lane in engine.lanes.values() if bad in lane.tickets)
    monkeypatch.setattr(lane, "denoise", lambda *_: 1 / 0)
    while engine.tick():
        pass
    assert isinstance(bad.error, ZeroDivisionError)
    assert told(good) == alone(0)
    assert told(engine.run([asked(7)])[0]) == alone(7), "its slots can be used again"


def test_an_empty_lane_is_used_again() -> None:
    engine = Engine(model(), rows=2)
    engine.run([asked(0)])
    lanes = [*engine.lanes.values()]
    engine.run([asked(1)])
    assert [*engine.lanes.values()] == lanes


def test_there_are_never_many_lanes() -> None:
    engine = Engine(model(), rows=16)
    scales = [scale / 8 for scale in range(9)]
    tickets = engine.submit([ask(model(), PROMPT.format(2, 3), Settings(cfg=scale)) for scale in scales])
    while engine.tick():
        assert len(engine.lanes) <= 4
    for scale, ticket in zip(scales, tickets, strict=True):
        assert ticket.done and ticket.done.text == model().generate(PROMPT.format(2, 3), cfg=scale).text


def test_drawn_and_greedy_rows_share_keys_values_and_slots() -> None:
    engine = Engine(model(), rows=3)
    tickets = engine.submit([asked(0), asked(4), asked(11)])
    engine.tick()
    first, second = engine.lanes.values()
    assert first.base is second.base and first.free is second.free == []
    while engine.tick():
        pass
    assert [told(t) for t in tickets] == [alone(0), alone(4), alone(11)] and sorted(first.free) == [0, 1, 2]


def test_who_asked_for_much_waits_by_turns() -> None:
    engine = Engine(model(), rows=1)
    many, (one,) = engine.submit([asked(0) for _ in range(6)]), engine.submit([asked(1)])
    while not one.done:
        engine.tick()
    assert sum(ticket.done is not None for ticket in many) == 1


def test_nobody_hangs_if_a_row_cannot_join(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(), rows=3)
    live = engine.submit([asked(0)])[0]
    engine.tick()

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "admit", full)
        late = engine.submit([asked(0)])[0]
        engine.tick()
    assert isinstance(live.error, MemoryError) and isinstance(late.error, MemoryError) and engine.idle
    assert told(engine.run([asked(0)])[0]) == alone(0)


def test_a_row_that_cannot_join_keeps_no_slot_of_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(), rows=3)
    greedy, drawn = engine.submit([asked(0), asked(4)])
    engine.tick()

    def full(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("unmask.engine.lane.cat", full)
        late = engine.submit([asked(4)])[0]
        engine.tick()
    assert late.error and drawn.error and not greedy.error
    while engine.tick():
        pass
    assert told(greedy) == alone(0)
    assert [sorted(lane.free) for lane in engine.lanes.values()] == [[0, 1, 2]]
    assert [told(t) for t in engine.run([asked(4), asked(0), asked(15)])] == [alone(n) for n in (4, 0, 15)]


def test_a_constraint_has_a_bound_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ask.__globals__, "WORK", 10)
    with pytest.raises(UserError, match="work"):
        ask(model(), PROMPT.format(1, 2), Settings(), matching={"type": "regex", "regex": r"\d+( \d+)*"})


def test_what_no_lane_can_hold_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="joint sampler"):
        ask(model("d2f"), PROMPT.format(1, 2), Settings(recipe="adjust"))
    engine, made = Engine(model(), rows=3), Lane.__init__

    def broken(self: Lane, of: Model, kind: Ask, **more: int) -> None:
        if kind.recipe.name == "guided":
            raise ValueError("no")
        made(self, of, kind, **more)

    monkeypatch.setattr(Lane, "__init__", broken)
    good, bad = engine.submit([asked(0), asked(8)])
    while engine.tick():
        pass
    assert isinstance(bad.error, ValueError) and told(good) == alone(0)
    late = engine.submit([asked(1)])[0]
    engine.reset(RuntimeError("all"))
    assert late.ended and engine.idle and engine.counts.failed == 2
