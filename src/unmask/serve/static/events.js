// What a stream of server-sent events means: bytes -> chunks -> the canvas at every step. Pure functions, no DOM.

const NEWLINE = 10;

/** A parser that has read nothing: bytes of a line that is not complete yet, and the data lines of an open event. */
export const UNREAD = Object.freeze({ bytes: new Uint8Array(0), data: Object.freeze([]) });

/** A canvas before the server has said how large it is. */
export const EMPTY = Object.freeze({
  step: 0,
  cells: Object.freeze([]),
  changed: Object.freeze([]),
  remasked: Object.freeze([]),
  computed: 0,
  text: "",
  recipe: null,
  promptTokens: 0,
  done: null,
  finish: null,
  error: null,
});

/** A run that has received nothing: chunks as they came, and one state for each step. */
export const NOTHING = Object.freeze({ chunks: Object.freeze([]), states: Object.freeze([EMPTY]) });

const OPEN = Object.freeze({
  status: "open", id: null, text: "", confidence: null, step: null, top: null, draft: null, returned: 0,
});

/** Read more bytes: [parser, chunks]. However the bytes are cut, the chunks are the same. */
export function feed(parser, bytes) {
  const all = join(parser.bytes, bytes);
  const end = all.lastIndexOf(NEWLINE) + 1;
  const chunks = [];
  let data = parser.data;
  if (end > 0) {
    const lines = new TextDecoder().decode(all.subarray(0, end)).split("\n").slice(0, -1);
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line.startsWith("data:")) {
        data = [...data, line.slice(line[5] === " " ? 6 : 5)];
      } else if (line === "" && data.length) {
        const chunk = parse(data.join("\n"));
        if (chunk) chunks.push(chunk);
        data = [];
      }
    }
  }
  return [{ bytes: all.slice(end), data }, chunks];
}

/** The state after one more chunk; the state that was given stays as it was. */
export function reduce(state, chunk) {
  if (chunk.error) return { ...state, error: String(chunk.error.message ?? chunk.error) };
  const choice = chunk.choices?.[0];
  const news = chunk.unmask;
  if ((news?.index ?? choice?.index ?? 0) !== 0) return state;
  const text = choice?.text ?? choice?.delta?.content ?? "";
  const next = { ...state, text: state.text + text, finish: choice?.finish_reason ?? state.finish };
  if (!news) return next;
  next.step = news.step ?? state.step;
  if (news.cells !== undefined) return laidOut(next, news);
  if (news.done) next.done = news;
  else stepped(next, news, state.step);
  return next;
}

/** The run with one more chunk. */
export function append(run, chunk) {
  const last = run.states.at(-1);
  const next = reduce(last, chunk);
  const before = next === last || next.step === last.step ? run.states.slice(0, -1) : run.states;
  return { chunks: [...run.chunks, chunk], states: [...before, next] };
}

/** The state at a step: the last one that is not later. */
export function at(run, step) {
  return run.states.findLast((state) => state.step <= step) ?? run.states[0];
}

/** The state at a step, computed from the chunks alone. */
export function replay(chunks, step) {
  const later = chunks.findIndex((chunk) => (chunk.unmask?.step ?? 0) > step);
  return (later < 0 ? chunks : chunks.slice(0, later)).reduce(reduce, EMPTY);
}

/** How many cells are known, how many of them this run wrote, and its tokens per forward so far. */
export function tally(state) {
  const known = state.cells.filter((cell) => cell.status !== "open").length;
  const written = state.cells.filter((cell) => cell.status === "decided").length;
  const forwards = state.done?.forwards ?? state.step;
  const perForward = state.done?.tokens_per_forward ?? (forwards ? written / forwards : 0);
  return { known, written, forwards, perForward };
}

/** The cells that a resumed request is given: [[cell, token id or text], ...].
 * `edits`: Map of cell -> {kind: "pin" | "edit" | "mask", text}; `only`: keep none but the cells of this set, and those that an edit pins. */
export function pins(state, edits, only = null) {
  const kept = [];
  state.cells.forEach((cell, place) => {
    const edit = edits.get(place);
    if (edit?.kind === "edit") kept.push([place, edit.text]);
    else if (edit?.kind === "mask" || cell.status === "open") return;
    else if (!only || edit?.kind === "pin" || only.has(place)) kept.push([place, cell.id]);
  });
  return kept;
}

function laidOut(next, news) {
  const cells = Array.from({ length: news.cells }, () => OPEN);
  for (const [place, id, text] of news.given ?? []) {
    cells[place] = { ...OPEN, status: "given", id, text, confidence: 1, step: 0 };
  }
  return { ...next, cells, recipe: news.recipe ?? null, promptTokens: news.prompt_tokens ?? 0 };
}

function stepped(next, news, before) {
  const cells = next.cells.slice();
  const same = next.step === before; // a step may come in several chunks
  for (const [place, id, text, confidence] of news.changed ?? []) {
    const old = cells[place] ?? OPEN;
    cells[place] = {
      ...old, status: "decided", id, text, confidence, step: next.step, top: news.top?.[place] ?? null, draft: null,
    };
  }
  for (const place of news.remasked ?? []) {
    cells[place] = { ...OPEN, returned: (cells[place]?.returned ?? 0) + 1 };
  }
  for (const [place, id, text, confidence] of news.draft ?? []) {
    const old = cells[place] ?? OPEN;
    if (old.status === "open") cells[place] = { ...old, draft: { id, text, confidence }, top: news.top?.[place] ?? null };
  }
  const changed = (news.changed ?? []).map(([place]) => place);
  next.cells = cells;
  next.changed = same ? [...next.changed, ...changed] : changed;
  next.remasked = same ? [...next.remasked, ...(news.remasked ?? [])] : (news.remasked ?? []);
  next.computed = news.computed ?? 0;
}

function join(a, b) {
  const all = new Uint8Array(a.length + b.length);
  all.set(a);
  all.set(b, a.length);
  return all;
}

function parse(data) {
  if (data === "[DONE]") return null;
  try {
    return JSON.parse(data);
  } catch {
    return { error: { message: `the server sent an event that is not JSON: ${data.slice(0, 80)}` } };
  }
}
