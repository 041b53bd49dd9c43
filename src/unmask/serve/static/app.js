// The page: controls, two panes, the replay, and what can be copied.

import { models } from "./client.js";
import { curl, python } from "./code.js";
import { Pane } from "./pane.js";

const SAMPLES = [
  ["balls", "Sam has 22 balls . Then he loses half of the balls . Tom brings Sam 4 boxes with 8 balls each . How many balls does Sam have now ?"],
  ["dollars", "Tom goes to the shop with 80 dollars . He gets 6 stickers at 5 dollars each . How many dollars does he have left ?"],
  ["cards", "Fred has 25 cards . Leo has twice as many cards as Fred . How many cards does Leo have ?"],
  ["a pub", "name[Blue Spice], eatType[pub], area[city centre]"],
  ["a restaurant", "name[The Mill], eatType[restaurant], food[Italian], priceRange[cheap], area[riverside], familyFriendly[yes]"],
];
const NUMBERS = ["max_tokens", "temperature", "seed"];
const DIFFUSION = ["block_length", "threshold", "steps"];

const $ = (id) => document.getElementById(id);
const form = $("ask");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const view = { cursor: 0, playing: false, timer: 0, frame: 0, queue: [], stopped: false };
const hooks = { changed: () => draw(), arrived: () => later(), began, key: () => form.elements.key.value };
const panes = ["A", "B"].map((name) => new Pane(name, hooks));
const shown = () => ($("both").checked ? panes : panes.slice(0, 1));
const last = () => Math.max(...shown().map((pane) => pane.last));
const running = () => view.queue.length > 0 || shown().some((pane) => pane.running);

/** What the controls say; a field that is empty is left out. */
function asked() {
  const value = (name) => form.elements[name].value;
  const numbers = (names) => Object.fromEntries(names.filter((n) => value(n) !== "").map((n) => [n, Number(value(n))]));
  const suffix = value("suffix") ? { suffix: value("suffix") } : {};
  return { prompt: value("prompt"), as: value("as"), ...numbers(NUMBERS), ...suffix, diffusion: numbers(DIFFUSION) };
}

async function run() {
  const body = asked();
  if (!form.reportValidity()) return;
  view.stopped = false;
  view.queue = shown().slice();
  while (view.queue.length && !view.stopped) {
    const pane = view.queue[0]; // one after the other: neither slows the other, and their times compare
    await pane.send(pane.body(body));
    view.queue.shift();
  }
  view.queue = [];
  draw();
  document.body.dataset.state = "done";
}

/** A new canvas is there: play it from its first step on, unless it joins one that plays already. */
function began(pane) {
  if (view.queue.length && pane !== shown()[0]) view.cursor = Math.min(view.cursor, last());
  else play();
}

/** Play from the first step on, or follow the stream where steps are shown as they come. */
function play() {
  view.cursor = 0;
  setPlaying(true);
}

function setPlaying(on) {
  view.playing = on;
  clearInterval(view.timer);
  if (on) view.timer = setInterval(tick, 1000 / (pace() || 16));
  draw();
}

const pace = () => (calm.matches ? 0 : Number($("pace").value));

function tick() {
  if (view.cursor < last()) view.cursor += 1;
  else if (!running()) return setPlaying(false);
  draw();
}

function seek(step) {
  view.cursor = Math.min(Math.max(0, step), last());
  setPlaying(false);
}

/** Draw once a frame, however many chunks arrive; as they come, the last step is shown. */
function later() {
  if (view.playing && !pace()) view.cursor = last();
  if (!view.frame) view.frame = requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(view.frame);
  view.frame = 0;
  view.cursor = Math.min(view.cursor, last());
  shown().forEach((pane) => pane.show(view.cursor, $("shade").value));
  $("scrub").max = last();
  $("scrub").value = view.cursor;
  $("scrub").setAttribute("aria-valuetext", `step ${view.cursor} of ${last()}`);
  $("where").textContent = `step ${view.cursor} of ${last()}`;
  $("play").dataset.playing = view.playing;
  $("play").setAttribute("aria-label", view.playing ? "Pause" : "Play");
  $("go").textContent = running() ? "Stop" : "Run";
  $("verdict").textContent = verdict();
  code();
}

/** Which of two finished runs was faster, in numbers. */
function verdict() {
  const [a, b] = panes;
  if (shown().length < 2 || !a.final.done || !b.final.done || view.playing) return "";
  const of = (pane) => `${pane.name}, ${pane.request.model} ${pane.request.diffusion?.recipe ?? ""}`.trim();
  const [fast, slow] = a.speed() >= b.speed() ? [a, b] : [b, a];
  const times = slow.speed() ? fast.speed() / slow.speed() : 0;
  const forwards = `${fast.final.done.forwards} forwards against ${slow.final.done.forwards}`;
  const seconds = `${milliseconds(fast)} against ${milliseconds(slow)}`;
  const same = fast.final.text === slow.final.text ? "Both wrote the same text." : "The texts differ.";
  const told = times && times < 1.1
    ? `${of(fast)} was about as fast as ${of(slow)}`
    : `${of(fast)} was ${times.toFixed(1)} times as fast as ${of(slow)}`;
  return `${told} in useful tokens a second: ${forwards}, ${seconds}. ${same}`;
}

const milliseconds = (pane) => `${(1000 * pane.final.done.seconds).toFixed(0)} ms`;

function code() {
  const pane = panes[Number($("whose").value)];
  const said = asked();
  const body = pane.body(said);
  panes.forEach((one) => one.note(said));
  $("curl").textContent = curl(body, location.origin);
  $("python").textContent = python(body, location.origin);
  $("export").disabled = !pane.run.chunks.length;
}

async function copy(id, what) {
  try {
    await navigator.clipboard.writeText($(id).textContent);
    $("copied").textContent = `Copied as ${what}.`;
  } catch {
    getSelection().selectAllChildren($(id)); // without a clipboard: selected, ready for Ctrl+C
    $("copied").textContent = "Selected; copy it with Ctrl+C.";
  }
}

function save() {
  const pane = panes[Number($("whose").value)];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(pane.export(), null, 1)], { type: "application/json" }));
  link.download = `unmask-run-${pane.name.toLowerCase()}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function keys(event) {
  const busy = event.target.closest("input:not([type=range]):not([type=checkbox]), textarea, select, pre");
  if (busy || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = event.target.closest("button, summary, [type=checkbox]");
  const acts = {
    " ": () => (view.playing ? setPlaying(false) : view.cursor >= last() ? play() : setPlaying(true)),
    ArrowLeft: () => seek(view.cursor - 1),
    ArrowRight: () => seek(view.cursor + 1),
    Home: () => seek(0),
    End: () => seek(last()),
  };
  if (!acts[event.key] || (button && event.key === " ")) return;
  event.preventDefault();
  acts[event.key]();
}

function wire() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running()) {
      view.stopped = true;
      panes.forEach((pane) => pane.stop());
    } else run();
    draw();
  });
  form.addEventListener("input", () => code());
  $("prompt").addEventListener("input", named);
  form.elements.key.addEventListener("change", () => load({}));
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  $("sample").addEventListener("change", (event) => {
    if (event.target.value) $("prompt").value = SAMPLES[Number(event.target.value)][1];
    code();
  });
  $("both").addEventListener("change", sides);
  $("play").addEventListener("click", () => (view.playing ? setPlaying(false) : view.cursor >= last() ? play() : setPlaying(true)));
  $("scrub").addEventListener("input", (event) => seek(Number(event.target.value)));
  for (const id of ["shade", "whose"]) $(id).addEventListener("change", () => draw());
  $("pace").addEventListener("change", () => setPlaying(view.playing));
  $("copy-curl").addEventListener("click", () => copy("curl", "a curl command"));
  $("copy-python").addEventListener("click", () => copy("python", "Python"));
  $("export").addEventListener("click", save);
  document.addEventListener("keydown", keys);
}

/** Say which sample the prompt is, if it is one. */
function named() {
  const place = SAMPLES.findIndex(([, prompt]) => prompt === $("prompt").value);
  $("sample").value = place < 0 ? "" : place;
}

function sides() {
  $("stage").replaceChildren(...shown().map((pane) => pane.root));
  $("stage").dataset.panes = shown().length;
  draw();
}

/** Ask for the models; pane B starts with the autoregressive one. `link`: what the address says. */
async function load(link) {
  try {
    const found = await models(form.elements.key.value);
    const twin = found.find(({ unmask }) => unmask?.kind === "autoregressive")?.id;
    const first = { model: link.model, recipe: link.recipe };
    const second = { model: link["model-b"] ?? (link["recipe-b"] ? link.model : twin ?? link.model), recipe: link["recipe-b"] };
    panes[0].know(found, first);
    panes[1].know(found, second);
    $("alert").textContent = "";
    return true;
  } catch (error) {
    $("alert").textContent = error.message;
    return false;
  }
}

/** #run&prompt=...&recipe=...&model-b=... fills in the controls, and runs where it says run. */
async function begin() {
  const link = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  $("sample").replaceChildren(new Option("own words", ""), ...SAMPLES.map(([name], i) => new Option(name, i)));
  $("prompt").value = SAMPLES[0][1];
  for (const [name, value] of Object.entries(link)) {
    if (form.elements[name] && name !== "key") form.elements[name].value = value;
    if (["pace", "shade"].includes(name)) $(name).value = value;
  }
  if ("panes" in link) $("both").checked = link.panes === "2";
  named();
  wire();
  sides();
  if ((await load(link)) && "run" in link) await run();
}

begin();
