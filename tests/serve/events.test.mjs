// Laws of the playground's reducer, checked on many random runs.

import assert from "node:assert/strict";
import test from "node:test";

const { UNREAD, NOTHING, EMPTY, feed, reduce, append, at, replay, tally, pins } = await import(process.env.UNMASK_EVENTS);
const { curl, python, literal } = await import(new URL("code.js", process.env.UNMASK_EVENTS));

const SEEDS = Array.from({ length: 60 }, (_, i) => i + 1);

/** Numbers in [0, 1) that depend on the seed alone. */
function random(seed) {
  let x = seed * 2654435761 + 1;
  return () => {
    x = (x ^ (x << 13)) | 0;
    x = (x ^ (x >>> 17)) | 0;
    x = (x ^ (x << 5)) | 0;
    return (x >>> 0) / 2 ** 32;
  };
}

const WORDS = ["22", " /", "é", "漢", "🙂", "\n", "a\r\nb", "data: x", ""];

/** Chunks of a run that commits, rewrites, drafts and gives back cells as it likes. */
function chunksOf(seed) {
  const next = random(seed);
  const upTo = (n) => Math.floor(next() * n);
  const word = () => WORDS[upTo(WORDS.length)];
  const cells = 1 + upTo(9);
  const some = (share) => Array.from({ length: cells }, (_, i) => i).filter(() => next() < share);
  const entry = (i) => [i, upTo(99), word(), next()];
  const wrap = (unmask, text = "") => ({ choices: [{ index: 0, text, finish_reason: null }], unmask: { index: 0, ...unmask } });
  const given = some(0.2).map((i) => [i, i, word()]);
  const chunks = [wrap({ step: 0, cells, given, recipe: { name: "r", expression: "Recipe()" }, prompt_tokens: 3 })];
  const steps = 1 + upTo(7);
  for (let step = 1; step <= steps; step += 1) {
    const changed = some(0.4).map(entry);
    const top = Object.fromEntries(changed.map(([i, id, text, p]) => [i, [[id, text, p]]]));
    chunks.push(wrap({ step, computed: cells, changed, remasked: some(0.2), draft: some(0.5).map(entry), top }, word()));
  }
  chunks.push(wrap({ step: steps, done: true, forwards: steps, tokens: cells, tokens_per_forward: 1, seconds: 0.5 }));
  return chunks;
}

const bytesOf = (chunks, end = "\n") =>
  new TextEncoder().encode([...chunks.map((c) => `data: ${JSON.stringify(c)}`), ": a comment", "data: [DONE]"].map((l) => l + end + end).join(""));
const runOf = (chunks) => chunks.reduce(append, NOTHING);

function read(bytes, cut) {
  let parser = UNREAD;
  const found = [];
  for (let from = 0; from < bytes.length; ) {
    const size = Math.max(1, cut());
    const [next, chunks] = feed(parser, bytes.subarray(from, from + size));
    found.push(...chunks);
    parser = next;
    from += size;
  }
  return found;
}

function frozen(value) {
  if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
    Object.values(value).forEach(frozen);
    Object.freeze(value);
  }
  return value;
}

test("however the bytes are cut, the chunks are the same", () => {
  for (const seed of SEEDS) {
    const chunks = chunksOf(seed);
    const next = random(seed + 1000);
    for (const end of ["\n", "\r\n"]) {
      const bytes = bytesOf(chunks, end);
      assert.deepEqual(read(bytes, () => bytes.length), chunks);
      assert.deepEqual(read(bytes, () => 1), chunks);
      assert.deepEqual(read(bytes, () => Math.floor(next() * 40)), chunks);
    }
  }
});

test("an event in several data lines is one chunk, and one without its empty line is not told yet", () => {
  const [parser, none] = feed(UNREAD, new TextEncoder().encode('data: {"a":\n: a comment\nid: 7\ndata: 1}\n'));
  assert.deepEqual(none, []);
  assert.deepEqual(feed(parser, new TextEncoder().encode("\n"))[1], [{ a: 1 }]);
});

test("an event that is not JSON becomes an error that is shown", () => {
  const [, [chunk]] = feed(UNREAD, new TextEncoder().encode("data: <html>\n\n"));
  assert.match(reduce(EMPTY, chunk).error, /not JSON.*<html>/);
});

test("replaying the events to a step gives the state that was there at that step", () => {
  for (const seed of SEEDS) {
    const chunks = chunksOf(seed);
    const run = runOf(chunks);
    assert.deepEqual(run.states.map((state) => state.step), [...new Set(chunks.map((c) => c.unmask.step))]);
    for (const state of run.states) assert.deepEqual(replay(chunks, state.step), at(run, state.step));
    for (let n = 1; n <= chunks.length; n += 1) {
      assert.deepEqual(runOf(chunks.slice(0, n)).states.at(-1), chunks.slice(0, n).reduce(reduce, EMPTY));
    }
  }
});

test("no state, run or chunk is changed by what follows", () => {
  for (const seed of SEEDS) {
    let run = NOTHING;
    for (const chunk of chunksOf(seed)) run = append(frozen(run), frozen(chunk)); // modules are strict: a write would throw
    assert.equal(NOTHING.states.length, 1);
    assert.equal(EMPTY.cells.length, 0);
  }
});

test("a cell is what the last event about it said", () => {
  for (const seed of SEEDS) {
    const chunks = chunksOf(seed);
    const run = runOf(chunks);
    for (const { unmask } of chunks.slice(1, -1)) {
      const { cells } = at(run, unmask.step);
      const back = new Set(unmask.remasked);
      for (const place of back) {
        assert.equal(cells[place].status, "open");
        assert.equal(cells[place].id, null);
        assert.ok(cells[place].returned > 0);
      }
      for (const [place, id, text, confidence] of unmask.changed.filter(([i]) => !back.has(i))) {
        const { status, step, top, draft } = cells[place];
        assert.deepEqual([status, cells[place].id, cells[place].text, cells[place].confidence], ["decided", id, text, confidence]);
        assert.equal(step, unmask.step);
        assert.deepEqual(top, unmask.top[place]);
        assert.equal(draft, null);
      }
      for (const [place, id] of unmask.draft) {
        if (cells[place].status === "open") assert.equal(cells[place].draft.id, id);
      }
    }
  }
});

test("cells that an event does not name are the very same objects", () => {
  for (const seed of SEEDS) {
    const { states, chunks } = runOf(chunksOf(seed));
    for (let i = 1; i < states.length; i += 1) {
      const { changed, remasked, draft } = chunks[i].unmask;
      const named = new Set([...changed.map(([p]) => p), ...remasked, ...draft.map(([p]) => p)]);
      states[i].cells.forEach((cell, p) => named.has(p) || assert.equal(cell, states[i - 1].cells[p]));
    }
  }
});

test("text is the concatenation of what was sent, for completions and chats", () => {
  const chunks = chunksOf(7);
  const chat = chunks.map(({ choices: [{ text }], unmask }) => ({ choices: [{ index: 0, delta: { content: text } }], unmask }));
  const whole = chunks.map((c) => c.choices[0].text).join("");
  assert.equal(runOf(chunks).states.at(-1).text, whole);
  assert.equal(runOf(chat).states.at(-1).text, whole);
});

test("other choices of a request and chunks of usage leave the canvas alone", () => {
  const run = runOf(chunksOf(3));
  const other = { choices: [{ index: 1, text: "x" }], unmask: { index: 1, step: 99, changed: [[0, 1, "x", 1]] } };
  for (const chunk of [other, { choices: [], usage: { total_tokens: 3 } }]) {
    assert.deepEqual(append(run, chunk).states, run.states);
  }
});

test("an error keeps what was there", () => {
  const run = append(runOf(chunksOf(5).slice(0, 2)), { error: { message: "out of slots" } });
  assert.equal(run.states.at(-1).error, "out of slots");
  assert.deepEqual(run.states.at(-1).cells, runOf(chunksOf(5).slice(0, 2)).states.at(-1).cells);
});

test("a resumed request is given the cells that are known, less the re-masked, with the edits", () => {
  for (const seed of SEEDS) {
    const state = runOf(chunksOf(seed)).states.at(-1);
    const known = state.cells.map((cell, i) => [i, cell.id]).filter(([i]) => state.cells[i].status !== "open");
    assert.deepEqual(pins(state, new Map()), known);
    assert.equal(tally(state).known, known.length);
    const edits = new Map([[0, { kind: "edit", text: "seven" }]]);
    assert.deepEqual(pins(state, edits), [[0, "seven"], ...known.filter(([i]) => i !== 0)]);
    assert.deepEqual(pins(state, new Map([[0, { kind: "mask" }]])), known.filter(([i]) => i !== 0));
    assert.deepEqual(pins(state, new Map(), new Set()), []);
    assert.deepEqual(pins(state, new Map([[0, { kind: "pin" }]]), new Set([1])), known.filter(([i]) => i < 2));
  }
});

test("requests are copied as they are: quotes, line ends and other scripts survive", () => {
  const body = { model: "dllm", prompt: `it's "so"\n漢 🙂 \\`, stream: true, diffusing: true, diffusion: { pins: [[0, "'"]], a: null, b: true } };
  const quoted = curl(body, "http://h").match(/-d '(.*)'$/s)[1].replaceAll("'\\''", "'");
  assert.deepEqual(JSON.parse(quoted), body);
  assert.ok(python(body, "http://h").includes(`prompt=${JSON.stringify(body.prompt)},`));
  assert.equal(literal(body.diffusion), `{"pins": [[0, "'"]], "a": None, "b": True}`);
});
