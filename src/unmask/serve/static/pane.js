// One pane: its model and recipe, its run and what the user changed in it, and how that is shown.

import { stream } from "./client.js";
import { Cells, percent, sentence, visible } from "./canvas.js";
import { NOTHING, append, at, pins, tally } from "./events.js";

const HINT = "Point at a cell to see what the model believed; click it to pin, edit or re-mask it.";

export class Pane {
  /** `changed`: called after anything that needs drawing anew, `arrived` after a chunk
   * of the stream, `began` when a new canvas takes the place of the last. `key`: the API key at the time of a request. */
  constructor(name, { changed, arrived, began, key }) {
    this.root = document.querySelector("#pane").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.root.querySelector(selector);
    this.find("h2").textContent = name;
    this.root.setAttribute("aria-label", `Pane ${name}`);
    this.root.id = `pane-${name.toLowerCase()}`;
    Object.assign(this, { name, changed, arrived, began, key, models: [], request: null, past: [], controller: null });
    this.fresh();
    this.cells = new Cells(this.find(".canvas"), {
      look: (place) => this.look(place),
      choose: (place) => this.choose(place),
    });
    this.wire();
  }

  get running() { return this.controller !== null; }
  get last() { return this.run.states.at(-1).step; }
  get final() { return this.run.states.at(-1); }

  fresh() {
    Object.assign(this, { run: NOTHING, times: new Map(), edits: new Map(), pinned: new Set(), selected: -1, looked: -1, cursor: 0 });
  }

  wire() {
    const on = (selector, what, act) => this.find(selector).addEventListener(what, act);
    on(".model", "change", () => this.offer());
    for (const control of [".recipe", ".tuned"]) on(control, "change", () => this.changed());
    on(".pin", "click", () => this.pin());
    on(".mask", "click", () => this.edit(this.edits.get(this.selected)?.kind === "mask" ? null : { kind: "mask" }));
    on(".edit", "input", (event) => this.edit({ kind: "edit", text: event.target.value }));
    on(".again", "click", () => this.resume(false));
    on(".only", "click", () => this.resume(true));
    on(".undo", "click", () => this.undo());
  }

  /** Fill in the models of the server. */
  know(models, { model, recipe } = {}) {
    this.models = models;
    const names = models.map(({ id }) => id);
    const chosen = model || this.find(".model").value;
    fill(this.find(".model"), withOwn(names, chosen), chosen);
    this.offer(recipe);
  }

  offer(recipe) {
    const { recipes = [], default_recipe: usual } = this.model?.unmask ?? {};
    fill(this.find(".recipe"), withOwn(recipes, recipe), recipe ?? usual);
    this.changed();
  }

  get model() { return this.models.find(({ id }) => id === this.find(".model").value); }
  get tuned() { return this.find(".tuned").checked; }
  get autoregressive() { return this.model?.unmask?.kind === "autoregressive"; }

  /** The request body that the controls say. An autoregressive model has no diffusion settings. */
  body(asked) {
    const { prompt, as, diffusion, ...plain } = asked;
    const said = as === "messages" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    const recipe = this.find(".recipe").value;
    const own = this.autoregressive ? {} : { ...(recipe ? { recipe } : {}), ...(this.tuned ? diffusion : {}) };
    if (this.autoregressive) delete plain.suffix;
    const more = Object.keys(own).length ? { diffusion: own } : {};
    return { model: this.find(".model").value, ...said, ...plain, ...more, stream: true, diffusing: true };
  }

  /** Say which of the settings this pane leaves out. */
  note({ diffusion, suffix }) {
    const out = [...Object.keys(diffusion), ...(suffix ? ["suffix"] : [])].map((name) => name.replace("_", " "));
    this.find(".tuned").closest("label").hidden = this.autoregressive;
    this.find(".note").textContent = this.autoregressive && out.length
      ? `An autoregressive model has no ${out.join(", ")}; not sent.` : "";
  }

  /** Send a request. What is on the screen stays until the new canvas is there; an error leaves it as it was. */
  async send(body, pinned = new Set()) {
    this.stop();
    const controller = new AbortController();
    this.controller = controller;
    this.say("");
    const before = this.request ? { request: this.request, run: this.run, times: this.times, pinned: this.pinned } : null;
    const start = performance.now();
    const listen = (chunk) => {
      if (this.controller !== controller) return;
      if (chunk.unmask?.cells !== undefined) {
        if (before) this.past = [...this.past.slice(-19), before];
        this.fresh();
        Object.assign(this, { request: body, pinned });
        this.began(this);
      }
      this.run = append(this.run, chunk);
      this.times.set(this.last, performance.now() - start);
      if (chunk.error) this.say(this.final.error);
      this.arrived();
    };
    try {
      await stream(body, { key: this.key(), signal: controller.signal, listen });
      if (this.controller === controller && !this.final.done && !this.final.error) {
        this.say("The stream ended before the response was done.");
      }
    } catch (error) {
      if (error.name !== "AbortError" && this.controller === controller) this.say(error.message);
    }
    if (this.controller === controller) this.controller = null;
    this.changed();
  }

  stop() {
    this.controller?.abort();
    this.controller = null;
  }

  say(words) { this.find(".alert").textContent = words; }

  resume(only) {
    const kept = pins(at(this.run, this.cursor), this.edits, only ? this.pinned : null);
    const own = kept.map(([place]) => place).filter((place) => this.isPinned(place));
    const { pins: old, ...diffusion } = this.request.diffusion ?? {}; // eslint-disable-line no-unused-vars
    return this.send({ ...this.request, diffusion: { ...diffusion, ...(kept.length ? { pins: kept } : {}) } }, new Set(own));
  }

  /** Did the user pin or edit it, now or before an earlier resume? */
  isPinned(place) {
    const kind = this.edits.get(place)?.kind;
    return kind === "pin" || kind === "edit" || (kind !== "mask" && this.pinned.has(place));
  }

  pin() {
    const place = this.selected;
    if (!this.isPinned(place)) return this.edit({ kind: "pin" });
    this.pinned = new Set([...this.pinned].filter((other) => other !== place));
    this.edit(null);
  }

  undo() {
    if (this.edits.size) this.edits = new Map();
    else if (this.past.length) {
      const before = this.past.pop();
      this.fresh();
      Object.assign(this, before);
    }
    this.changed();
  }

  choose(place) {
    this.selected = this.selected === place ? -1 : place;
    this.changed();
  }

  look(place) {
    this.looked = place;
    this.inspect();
  }

  edit(what) {
    if (what) this.edits.set(this.selected, what);
    else this.edits.delete(this.selected);
    this.changed();
  }

  /** Draw the state at a step of the replay. */
  show(cursor, shade) {
    this.cursor = cursor;
    const state = at(this.run, cursor);
    const { edits, selected } = this;
    this.cells.show(state, { edits, selected, shade, last: this.last, pinned: (place) => this.isPinned(place) });
    this.find(".canvas").setAttribute("aria-label", `${state.cells.length} cells at step ${state.step}`);
    this.root.classList.toggle("running", this.running);
    this.root.classList.toggle("over", Boolean(state.done));
    this.figures(state);
    this.find(".text").textContent = state.text;
    this.find(".expression").textContent = state.recipe?.expression ?? "";
    this.find(".again").disabled = this.find(".only").disabled = !state.cells.length || this.autoregressiveRun;
    this.find(".undo").disabled = !edits.size && !this.past.length;
    this.inspect();
  }

  get autoregressiveRun() {
    return this.models.find(({ id }) => id === this.request?.model)?.unmask?.kind === "autoregressive";
  }

  figures(state) {
    const { known, perForward, forwards } = tally(state);
    this.find(".step").textContent = state.done ? `${forwards}, done` : String(state.step);
    this.find(".known").textContent = `${known} / ${state.cells.length}`;
    this.find(".rate").textContent = forwards ? perForward.toFixed(2) : "–";
    const speed = this.speed(state);
    this.find(".speed").textContent = speed ? Math.round(speed).toLocaleString("en") : "–";
    this.find("progress").max = Math.max(1, state.cells.length);
    this.find("progress").value = state.done ? Math.max(1, state.cells.length) : known;
  }

  /** Useful tokens a second by the server's clock once the run is done; until then written cells by ours. */
  speed(state = this.final) {
    if (state.done?.seconds) return (state.done.useful_tokens ?? state.done.tokens) / state.done.seconds;
    const time = this.times.get(state.step);
    return state.step && time ? (1000 * tally(state).written) / time : 0;
  }

  inspect() {
    const state = at(this.run, this.cursor);
    const pointed = this.looked >= 0 ? this.looked : this.selected;
    const place = pointed >= 0 ? pointed : leastSure(state);
    const cell = state.cells[place];
    this.find(".acts").hidden = this.selected < 0 || !cell || this.autoregressiveRun;
    const told = cell ? sentence(cell, place, this.edits.get(place), this.isPinned(place)) : HINT;
    this.find(".about").textContent = cell && pointed < 0 ? `Least sure · ${told}` : told;
    this.find(".top").replaceChildren(...(cell?.top ?? []).slice(0, 5).map((entry) => likely(entry, cell.id)));
    if (!this.find(".acts").hidden) this.actions();
  }

  actions() {
    const edit = this.edits.get(this.selected);
    const chosen = at(this.run, this.cursor).cells[this.selected];
    this.find(".pin").setAttribute("aria-pressed", String(this.isPinned(this.selected)));
    this.find(".mask").setAttribute("aria-pressed", String(edit?.kind === "mask"));
    this.find(".pin").disabled = chosen?.status === "open" && !edit;
    this.find(".mask").disabled = chosen?.status === "open";
    const field = this.find(".edit");
    if (document.activeElement !== field) field.value = edit?.text ?? chosen?.text ?? "";
    field.setAttribute("aria-label", `Text of cell ${this.selected + 1}`);
  }

  /** Everything that was received, as a value for a file. */
  export() {
    const { request, run, name } = this;
    return { pane: name, request, chunks: run.chunks, milliseconds: [...this.times], edits: [...this.edits] };
  }
}

/** The decided cell of the lowest confidence, or -1. */
function leastSure(state) {
  return state.cells.reduce((least, cell, place) => {
    const lower = cell.status === "decided" && !(state.cells[least]?.confidence <= cell.confidence);
    return lower ? place : least;
  }, -1);
}

function likely([id, text, probability], own) {
  const line = document.createElement("li");
  const [token, bar, value] = ["span", "meter", "span"].map((tag) => document.createElement(tag));
  token.className = "token";
  token.textContent = visible(text);
  token.title = text;
  bar.value = probability;
  value.textContent = percent(probability);
  value.className = "share";
  bar.setAttribute("aria-hidden", "true");
  line.classList.toggle("own", id === own);
  line.append(token, bar, value);
  return line;
}

/** The names, and one that the server does not list: it will refuse it in its own words. */
const withOwn = (names, own) => (!own || names.includes(own) ? names : [...names, own]);

function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}
