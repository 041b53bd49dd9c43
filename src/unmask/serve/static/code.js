// A request as a command or a program that sends the same.

const PATHS = { prompt: "/v1/completions", messages: "/v1/chat/completions" };
const OWN = ["diffusion", "diffusing", "top_k"]; // fields that the openai client does not know

/** Where a request body goes. */
export function pathOf(body) {
  return "messages" in body ? PATHS.messages : PATHS.prompt;
}

/** The request as a curl command for a POSIX shell; -N shows every event as it comes. */
export function curl(body, origin) {
  const data = JSON.stringify(body, null, 1).replace(/\n */g, " ").replaceAll("'", "'\\''");
  const lines = [`curl -N ${origin}${pathOf(body)}`, "-H 'content-type: application/json'", `-d '${data}'`];
  return lines.join(" \\\n  ");
}

/** The request as a Python program with the openai client. */
export function python(body, origin) {
  const chat = "messages" in body;
  const { stream, diffusing, ...rest } = body; // eslint-disable-line no-unused-vars
  const extra = Object.fromEntries(Object.entries(rest).filter(([name]) => OWN.includes(name)));
  const plain = Object.entries(rest).filter(([name]) => !OWN.includes(name));
  const lines = plain.map(([name, value]) => `    ${name}=${literal(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra)},`);
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key="none")`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...lines,
    ")",
    `print(answer.choices[0].${chat ? "message.content" : "text"})`,
    "",
  ].join("\n");
}

/** A JSON value as a Python literal. */
export function literal(value) {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, inner]) => `${literal(name)}: ${literal(inner)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
