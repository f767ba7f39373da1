// Requests to the server that sent this page, with OpenAI's protocol.

import { apiKey } from "./store.js";

export class Refused extends Error {
  constructor(status, { message, code } = {}) {
    super(message || `HTTP ${status}`);
    Object.assign(this, { status, code });
  }

  get contextIsFull() {
    return this.code === "context_length_exceeded" || /maximum context length is/.test(this.message);
  }
}

async function request(path, body, signal) {
  const key = apiKey();
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const options = body ? { method: "POST", headers, signal, body: JSON.stringify(body) } : { headers, signal };
  const reply = await fetch(path, options);
  if (reply.ok) return reply;
  throw new Refused(reply.status, (await reply.json().catch(() => ({}))).error);
}

// Name, context length, default temperature and example questions of the model.
export const model = async () => (await request("page/model")).json();

let countsTokens = true;                            // until the server answers that it has no such route

// Tokens of a prompt; null where the server does not count them.
export async function count(messages, signal) {
  if (!countsTokens) return null;
  try {
    return (await (await request("tokenize", { messages, add_generation_prompt: true }, signal)).json()).count ?? null;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if ([404, 405].includes(error.status)) countsTokens = false;
    return null;
  }
}

// The parts of an answer: {text, reasoning, finish, usage}, each where it has come.
export async function* answer(body, signal) {
  const reply = await request("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let ended = false;
  for await (const event of events(reply)) {
    if (event === "[DONE]") { ended = true; continue; }
    const value = JSON.parse(event);
    if (value.error) throw new Refused(reply.status, value.error);
    const choice = value.choices?.[0], delta = choice?.delta ?? {};
    yield { text: delta.content ?? "", reasoning: delta.reasoning_content ?? delta.reasoning ?? "",
            finish: choice?.finish_reason, usage: value.usage };
  }
  if (!ended) throw new TypeError("the stream ended early");
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();      // others are comments
  }
}
