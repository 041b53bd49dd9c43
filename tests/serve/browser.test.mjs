// The playground in a real Chromium over the DevTools protocol, against a server at UNMASK_URL.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test, { after, before } from "node:test";

const { UNMASK_URL: url, UNMASK_CHROMIUM: chromium = "chromium", UNMASK_SCREENSHOT: picture } = process.env;
const folder = mkdtempSync(join(tmpdir(), "unmask-chromium-"));
const PROMPT = "Sam has 22 balls . Then he loses half of the balls . Tom brings Sam 4 boxes with 8 balls each . How many balls does Sam have now ?";
let browser, socket, session;
let count = 0;
const waiting = new Map();
const complaints = [];

function send(method, params = {}) {
  count += 1;
  socket.send(JSON.stringify({ id: count, method, params, ...(session ? { sessionId: session } : {}) }));
  return new Promise((resolve, reject) => waiting.set(count, { resolve, reject }));
}

function receive({ data }) {
  const { id, result, error, method, params } = JSON.parse(data);
  if (method === "Runtime.exceptionThrown") complaints.push(params.exceptionDetails.exception?.description);
  if (method === "Log.entryAdded" && params.entry.level === "error") complaints.push(`${params.entry.text} ${params.entry.url ?? ""}`);
  const waiter = waiting.get(id);
  waiting.delete(id);
  if (error) waiter?.reject(new Error(error.message));
  else waiter?.resolve(result);
}

async function evaluate(expression) {
  const { result, exceptionDetails } = await send("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true });
  if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
  return result.value;
}

async function until(expression, what = expression) {
  const end = Date.now() + 15_000;
  for (;;) {
    const value = await evaluate(expression);
    if (value) return value;
    if (Date.now() > end) throw new Error(`waited in vain for ${what}; the page says ${await evaluate("document.body.innerText")}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function open(hash, { width = 1280, height = 980, scheme = "light", motion = "no-preference" } = {}) {
  complaints.length = 0;
  await send("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: false });
  const features = [{ name: "prefers-color-scheme", value: scheme }, { name: "prefers-reduced-motion", value: motion }];
  await send("Emulation.setEmulatedMedia", { features });
  await send("Page.navigate", { url: "about:blank" });
  await until("location.href === 'about:blank'");
  await send("Page.navigate", { url: `${url}/#${hash}` });
  await until("document.readyState === 'complete' && document.querySelectorAll('.model option').length > 0", "the models");
}

const finished = () => until("document.body.dataset.state === 'done' && document.querySelector('#play').dataset.playing === 'false'", "the end of the run");
const ran = (settings) => new URLSearchParams({ run: "", prompt: PROMPT, pace: "16", ...settings }).toString();
const cells = (pane, kind = "") => evaluate(`document.querySelectorAll('#pane-${pane} button.cell${kind}').length`);
const text = (selector) => evaluate(`document.querySelector(${JSON.stringify(selector)}).textContent`);
const click = (selector) => evaluate(`document.querySelector(${JSON.stringify(selector)}).click()`);
const press = async (key) => {
  const code = { " ": "Space" }[key] ?? key;
  await send("Input.dispatchKeyEvent", { type: "keyDown", key, code, ...(key === " " ? { text: " " } : {}) });
  await send("Input.dispatchKeyEvent", { type: "keyUp", key, code });
};
const shoot = async (path, whole = false) =>
  writeFileSync(path, Buffer.from((await send("Page.captureScreenshot", { format: "png", captureBeyondViewport: whole })).data, "base64"));

before(async () => {
  const flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-background-networking"];
  browser = spawn(chromium, [...flags, "--remote-debugging-port=0", `--user-data-dir=${folder}`, "about:blank"]);
  let told = "";
  const address = await new Promise((resolve, reject) => {
    browser.stderr.on("data", (data) => {
      told += data;
      const found = told.match(/DevTools listening on (ws:\S+)/);
      if (found) resolve(found[1]);
    });
    browser.on("exit", (code) => reject(new Error(`chromium ended with ${code}: ${told}`)));
  });
  socket = new WebSocket(address);
  socket.addEventListener("message", receive);
  await new Promise((resolve) => socket.addEventListener("open", resolve));
  const { targetInfos } = await send("Target.getTargets");
  const { targetId } = targetInfos.find(({ type }) => type === "page");
  ({ sessionId: session } = await send("Target.attachToTarget", { targetId, flatten: true }));
  for (const domain of ["Page", "Runtime", "Log"]) await send(`${domain}.enable`);
  await send("Emulation.setFocusEmulationEnabled", { enabled: true });
});

after(async () => {
  session = undefined;
  await send("Browser.close").catch(() => {});
  socket.close();
  await new Promise((resolve) => (browser.exitCode === null ? browser.on("exit", resolve) : resolve()));
  rmSync(folder, { recursive: true, force: true, maxRetries: 5 });
});

test("a run fills the canvas of both panes, and the page breaks no rule of its own", async () => {
  await open(ran({ recipe: "threshold" }));
  await finished();
  const count = await cells("a");
  assert.ok(count >= 20, `${count} cells`);
  assert.ok((await cells("a", ".decided")) > 15);
  assert.match(await text("#pane-a .step"), /^[1-9]\d*, done$/);
  assert.match(await text("#pane-a .text"), /^22 \/ 2 = 11 ;/);
  assert.ok(Number((await text("#pane-a .rate")).trim()) > 1, "a diffusion model writes more than one token a forward");
  assert.equal(Number((await text("#pane-b .rate")).trim()), 1, "an autoregressive one writes one");
  assert.match(await text("#verdict"), / as fast as .* \d+ forwards against \d+, \d+ ms against \d+ ms\. Both wrote the same text/);
  assert.match(await text("#where"), /^step (\d+) of \1$/);
  assert.deepEqual(complaints, []);
});

test("the keyboard replays every step", async () => {
  await open(ran({ recipe: "llada", steps: "12", panes: "1", pace: "0" }));
  await finished();
  const whole = await evaluate("document.querySelector('#pane-a .canvas').innerHTML");
  const decided = await cells("a", ".decided");
  await press("Home");
  assert.match(await text("#where"), /^step 0 of/);
  assert.equal(await cells("a", ".decided"), 0);
  await press("ArrowRight");
  const first = await cells("a", ".decided");
  assert.ok(first > 0 && first < decided);
  assert.ok((await cells("a", ".draft")) > 0, "undecided cells show what the model would say");
  await press("End");
  assert.equal(await evaluate("document.querySelector('#pane-a .canvas').innerHTML"), whole);
  await press(" ");
  assert.equal(await evaluate("document.querySelector('#play').dataset.playing"), "true");
});

test("a cell tells its five likeliest tokens, and arrows walk over the cells", async () => {
  await open(ran({ panes: "1", pace: "0" }));
  await finished();
  await evaluate("document.querySelectorAll('#pane-a button.cell')[3].focus()");
  assert.equal(await evaluate("document.querySelectorAll('#pane-a .top li').length"), 5);
  assert.match(await text("#pane-a .about"), /^Cell 4: “ ?=”, confidence [\d.]+ %, decided in step \d+$/);
  assert.equal(await evaluate("document.activeElement.getAttribute('aria-label')"), await text("#pane-a .about"));
  await press("ArrowRight");
  assert.match(await text("#pane-a .about"), /^Cell 5:/);
  assert.equal(await evaluate("document.querySelectorAll('#pane-a button.cell[tabindex=\"0\"]').length"), 1);
});

test("a re-masked cell is written anew, and all others stay; an edit is kept", async () => {
  await open(ran({ panes: "1", pace: "0" }));
  await finished();
  const before = await text("#pane-a .text");
  await click("#pane-a button.cell:nth-of-type(5)");
  await click("#pane-a .mask");
  assert.equal(await cells("a", ".open.returned"), 1);
  await click("#pane-a .again");
  await until("document.querySelectorAll('#pane-a button.cell.given').length > 15 && document.querySelector('#pane-a.over')", "the resumed run");
  assert.equal(await text("#pane-a .text"), before);
  assert.equal(await text("#pane-a .step"), "1, done", "one cell takes one forward");
  await click("#pane-a button.cell:nth-of-type(1)");
  await evaluate("{ const f = document.querySelector('#pane-a .edit'); f.value = '24'; f.dispatchEvent(new Event('input', { bubbles: true })); }");
  if (process.env.UNMASK_SCREENSHOTS) await shoot(join(process.env.UNMASK_SCREENSHOTS, "edited.png"), true);
  await click("#pane-a .only");
  await until("document.querySelectorAll('#pane-a button.cell.given').length === 1", "one pin");
  await until("document.querySelector('#pane-a .text').textContent.startsWith('24')", "the edit in the text");
  assert.equal(await cells("a", ".pinned"), 1);
  await click("#pane-a .undo");
  assert.equal(await text("#pane-a .text"), before);
});

test("what the server refuses is said, and nothing is lost", async () => {
  await open(ran({ panes: "1", pace: "0" }));
  await finished();
  const before = await text("#pane-a .text");
  await evaluate("document.querySelector('[name=threshold]').value = '7'");
  await click("#go");
  const words = await until("document.querySelector('#pane-a [role=alert]').textContent", "an alert");
  assert.match(words, /threshold/);
  assert.equal(await text("#pane-a .text"), before);
  await click("#pane-a .tuned");
  assert.ok(!(await text("#curl")).includes("threshold\": 7"), "a pane may leave the settings to its recipe");
  await click("#go");
  await until("document.querySelector('#pane-a [role=alert]').textContent === ''", "the alert to go");
  await open(ran({ panes: "1", model: "dlm" }));
  assert.match(await until("document.querySelector('#pane-a [role=alert]').textContent", "an alert"), /dllm/);
  await open(ran({ panes: "1", recipe: "thresold" }));
  assert.match(await until("document.querySelector('#pane-a [role=alert]').textContent", "an alert"), /threshold/);
});

test("cells that a recipe gives back are undecided again, and say so", async () => {
  await open(ran({ prompt: "name[Blue Spice], eatType[pub], area[city centre]", recipe: "wino", panes: "1", pace: "0" }));
  await finished();
  await press("Home");
  const back = () => evaluate("document.querySelectorAll('#pane-a button.cell.open.returned').length");
  for (let step = 0; step < 60 && !(await back()); step += 1) await press("ArrowRight");
  assert.ok((await back()) > 0);
  assert.match(await evaluate("document.querySelector('#pane-a .returned').title"), /undecided, was given back/);
});

test("a run can be watched half-way", { skip: !picture && "no path for a picture" }, async () => {
  await open(ran({ block_length: "8" }), { height: 1080, motion: "reduce" });
  await finished();
  await press("Home");
  for (let step = 0; step < 2; step += 1) await press("ArrowRight");
  assert.ok((await cells("a", ".draft")) > 0 && (await cells("a", ".decided")) > 0);
  assert.match(await text("#pane-b .note"), /no block length; not sent/);
  await shoot(picture);
});

test("a chat is a chat, and what is copied says so", async () => {
  await open(ran({ as: "messages", panes: "1", pace: "0", threshold: "0.8" }));
  await finished();
  assert.equal(await text("#pane-a [role=alert]"), "");
  assert.ok((await cells("a", ".decided")) > 3);
  assert.match(await text("#curl"), /^curl -N http:\S+\/v1\/chat\/completions/);
  assert.match(await text("#python"), /client\.chat\.completions\.create\(\n(.*\n)* +extra_body=\{"diffusion": \{"recipe": "threshold", "threshold": 0\.8\}\},/);
});

test("it fits into 360 pixels, and dark and calm are respected", async () => {
  await open(ran({}), { width: 360, height: 740, scheme: "dark", motion: "reduce" });
  await finished();
  assert.ok((await evaluate("document.documentElement.scrollWidth")) <= 360);
  const [red] = (await evaluate("getComputedStyle(document.body).backgroundColor")).match(/\d+/);
  assert.ok(Number(red) < 60, "dark paper");
  assert.equal(await evaluate("getComputedStyle(document.querySelector('.cell')).transitionDuration"), "0s");
  if (process.env.UNMASK_SCREENSHOTS) await shoot(join(process.env.UNMASK_SCREENSHOTS, "narrow.png"), true);
});
