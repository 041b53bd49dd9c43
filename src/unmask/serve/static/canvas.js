// Cells of a canvas as buttons: what each says, how it looks, and how the keyboard walks over them.

/** Text of a token as a reader can see it. */
export function visible(text) {
  if (special(text)) return text.replaceAll(/[<|>\[\]｜]/g, "");
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").trim() || "␣";
}

/** Is it the name of a control token, like <eos>? */
export const special = (text) => /^<.*[a-z].*>$|^\[[A-Z]+\]$/i.test(text);

/** One sentence about a cell, for titles and screen readers. */
export function sentence(cell, place, edit, isPinned = false) {
  const name = `Cell ${place + 1}`;
  if (edit?.kind === "edit") return `${name}: edited to “${edit.text}”`;
  if (edit?.kind === "mask") return `${name}: to be written again`;
  const pinned = isPinned ? ", pinned" : "";
  if (cell.status === "given") return `${name}: “${cell.text}”, given${pinned}`;
  if (cell.status === "decided") {
    return `${name}: “${cell.text}”, confidence ${percent(cell.confidence)}, decided in step ${cell.step}${pinned}`;
  }
  const guess = cell.draft ? `, perhaps “${cell.draft.text}” (${percent(cell.draft.confidence)})` : "";
  return `${name}: undecided${cell.returned ? ", was given back" : ""}${guess}`;
}

export const percent = (p) => (p === null || p === undefined ? "unknown" : `${(100 * p).toFixed(p < 0.9995 ? 1 : 0)} %`);

/** The cells of one pane. `look(place | null)`: pointer or focus is there; `choose(place)`: it was clicked. */
export class Cells {
  constructor(root, { look, choose }) {
    this.root = root;
    this.buttons = [];
    this.drawn = [];
    const placeOf = (event) => this.buttons.indexOf(event.target.closest("button"));
    root.addEventListener("click", (event) => placeOf(event) >= 0 && choose(placeOf(event)));
    root.addEventListener("pointerover", (event) => look(placeOf(event)));
    root.addEventListener("pointerleave", () => look(-1));
    root.addEventListener("focusin", (event) => {
      this.rove(placeOf(event));
      look(placeOf(event));
    });
    root.addEventListener("keydown", (event) => this.walk(event, placeOf(event)));
  }

  /** Draw a state: only cells that differ from what is on the screen are touched. */
  show(state, { edits, selected, shade, last, pinned }) {
    this.fit(state.cells.length);
    const fresh = new Set(state.changed);
    state.cells.forEach((cell, place) => {
      const edit = edits.get(place);
      const key = [cell, edit, pinned(place), fresh.has(place), selected === place, shade, shade === "step" ? last : 0];
      if (this.drawn[place]?.every((part, i) => part === key[i])) return;
      this.drawn[place] = key;
      const look = { edit, pinned: pinned(place), fresh: fresh.has(place), selected: selected === place, shade, last };
      this.draw(this.buttons[place], cell, place, look);
    });
  }

  draw(button, cell, place, { edit, pinned, fresh, selected, shade, last }) {
    const kind = edit?.kind === "mask" ? "open" : edit?.kind === "edit" ? "edited" : cell.status;
    const guess = kind === "open" && edit?.kind !== "mask" ? cell.draft?.text : undefined;
    const text = edit?.kind === "edit" ? edit.text : kind === "open" ? guess : cell.text;
    button.firstChild.textContent = text === undefined ? "·" : visible(text);
    button.className = `cell ${kind}`;
    button.classList.toggle("draft", guess !== undefined);
    button.classList.toggle("special", text !== undefined && special(text));
    button.classList.toggle("fresh", fresh && kind === "decided");
    button.classList.toggle("pinned", pinned);
    button.classList.toggle("returned", kind === "open" && (cell.returned > 0 || edit?.kind === "mask"));
    const share = shade === "step" ? 1 - (cell.step ?? 0) / Math.max(1, last) : cell.confidence;
    button.style.setProperty("--share", kind === "decided" ? share : 0);
    button.title = sentence(cell, place, edit, pinned);
    button.setAttribute("aria-label", button.title);
    button.setAttribute("aria-pressed", String(selected));
  }

  fit(count) {
    while (this.buttons.length > count) this.buttons.pop().remove();
    while (this.buttons.length < count) {
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = this.buttons.length ? -1 : 0;
      button.append(document.createElement("span"));
      this.buttons.push(button);
      this.root.append(button);
    }
    this.drawn.length = count;
    if (count && !this.buttons.some((button) => button.tabIndex === 0)) this.buttons[0].tabIndex = 0;
  }

  /** One cell alone is in the tab order. */
  rove(place) {
    this.buttons.forEach((button, i) => (button.tabIndex = i === place ? 0 : -1));
  }

  walk(event, place) {
    if (place < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: this.buttons.length - 1 }[event.key]
      ?? { ArrowUp: place - this.columns(), ArrowDown: place + this.columns() }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.buttons[to]?.focus();
  }

  columns() {
    const first = this.buttons[0]?.offsetTop;
    const row = this.buttons.findIndex((button) => button.offsetTop !== first);
    return row < 0 ? this.buttons.length : row;
  }
}
