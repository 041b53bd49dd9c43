// Talking to the server: models, and a stream of events.

import { UNREAD, feed } from "./events.js";
import { pathOf } from "./code.js";

/** The models of the server; Error with the server's own words. */
export async function models(key) {
  const response = await reach("/v1/models", { headers: headers(key) });
  if (!response.ok) throw new Error(await words(response));
  return (await response.json()).data;
}

/** Send a request and hand every chunk to `listen` as it arrives; Error with the server's own words. */
export async function stream(body, { key, signal, listen }) {
  const response = await reach(pathOf(body), {
    method: "POST", headers: headers(key), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await words(response));
  const reader = response.body.getReader();
  let parser = UNREAD;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [next, chunks] = feed(parser, value);
    parser = next;
    chunks.forEach(listen);
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`The server cannot be reached (${error.message}).`);
  }
}

function headers(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function words(response) {
  const text = await response.text();
  try {
    const { error, detail } = JSON.parse(text);
    return String(error?.message ?? detail ?? text);
  } catch {
    return `${response.status} ${response.statusText}: ${text.slice(0, 200)}`;
  }
}
