// A chat's turns: what is sent of them, and how an answer comes in. It shows nothing; `changed` is called for that.

import { answer as stream, count, Refused } from "./api.js";
import { settings } from "./store.js";

const THOUGHT = /^\s*<think>([^]*?)(?:<\/think>\s*|$)/;
const OPEN_THOUGHT = /^([^]*?)<\/think>\s*/;        // the template has opened it in the prompt

// The reasoning and the answer of a message, whichever way the server separates them.
export function split(message) {
  const found = message.text.match(THOUGHT) ?? message.text.match(OPEN_THOUGHT);
  const within = found ? found[1].trim() : "";
  return { reasoning: [message.reasoning ?? "", within].filter(Boolean).join("\n\n"),
           text: found ? message.text.slice(found[0].length) : message.text };
}

// The messages that are sent: questions without an answer are left out, except for the last one.
export function sent(turns, system, continues = false) {
  const out = system ? [{ role: "system", content: system }] : [];
  turns.forEach((message, place) => {
    const last = place === turns.length - 1;
    if (message.role === "user" && (last || turns[place + 1].role === "assistant")) out.push({ role: "user", content: message.text });
    if (message.role === "assistant") out.push({ role: "assistant", content: last && continues ? message.text : split(message).text });
  });
  return out;
}

// Where a question begins, from a place on.
function nextQuestion(turns, from) {
  for (let place = from + 1; place < turns.length; place++) if (turns[place].role === "user") return place;
  return turns.length;
}

function options() {
  const out = {};
  for (const name of ["temperature", "top_p", "seed", "max_tokens"]) if (settings[name] !== null) out[name] = settings[name];
  return out;
}

export function sendsEarlier(facts) {
  return settings.earlier ?? facts.turns !== 1;
}

// Generates the answer to the last question of a chat, or goes on with its last answer. Resolves when the answer has ended. Why it
// ended early is in `ending` of the answer; what went wrong is in `problem` of the answer, or of the question without one.
export class Answer {
  constructor(chat, facts, changed) {
    Object.assign(this, { chat, facts, changed, stopper: new AbortController() });
  }

  stop() { this.stopper.abort(); }

  async run(continues = false) {
    const { chat } = this;
    chat.system = settings.system.trim();
    const question = chat.messages.at(continues ? -2 : -1);
    const message = this.message = continues ? chat.messages.at(-1) : { role: "assistant", text: "" };
    question.problem = message.problem = message.ending = null;
    if (!continues) chat.messages.push(message);
    this.changed();
    let problem = null;
    this.asked = performance.now();
    try {
      await this.receive(await this.opened(continues));
    } catch (error) {
      if (error.name === "AbortError") message.ending = "stopped";
      else if (!(error instanceof Refused)) problem = { name: message.text ? "cut" : "lost" };
      else if (error.contextIsFull) problem = { name: "tooLong", values: [this.facts.context] };
      else problem = { text: error.message, status: error.status };
    }
    if (message.text || message.reasoning) {
      message.problem = problem;
    } else {
      chat.messages.splice(chat.messages.indexOf(message), 1);
      question.problem = problem ?? { name: message.ending ?? "silent" };
    }
    return problem;
  }

  // The stream, after its first part has come; the oldest turns are left out until the rest fits.
  async opened(continues) {
    const { chat, facts } = this, { signal } = this.stopper;
    const turns = continues ? chat.messages : chat.messages.slice(0, -1);
    const last = turns.findLastIndex(message => message.role === "user");
    let first = sendsEarlier(facts) ? Math.min(chat.omitted ?? 0, last) : last;
    const reserve = Math.min(settings.max_tokens ?? Infinity, Math.floor(facts.context / 4));
    for (;;) {
      const messages = sent(turns.slice(first), chat.system, continues);
      const used = first < last ? await count(messages, signal) : null;
      if (used === null || used + reserve <= facts.context) {
        const more = continues ? { continue_final_message: true, add_generation_prompt: false } : {};
        const parts = stream({ messages, ...options(), ...more }, signal);
        try {
          const opening = await parts.next();
          if (sendsEarlier(facts)) chat.omitted = first;
          return { opening, parts };
        } catch (error) {
          if (!(error instanceof Refused && error.contextIsFull) || first >= last) throw error;
        }
      }
      first = nextQuestion(turns, first);
    }
  }

  async receive({ opening, parts }) {
    const { message } = this;
    const begun = performance.now(), before = message.tokens ?? 0;
    let first = 0, last = 0, pieces = 0, usage = null;
    for (let { value, done } = opening; !done; { value, done } = await parts.next()) {
      if (value.text || value.reasoning) {
        pieces++;
        last = performance.now();
        first ||= last;
        message.text += value.text;
        if (value.reasoning) message.reasoning = (message.reasoning ?? "") + value.reasoning;
        message.tokens = before + pieces;
        this.changed();
      }
      if (value.finish === "length") message.ending = "length";
      usage = value.usage ?? usage;
      if (usage) {
        message.tokens = before + usage.completion_tokens;
        message.prompt = usage.prompt_tokens;
      }
      if (pieces > 1) message.speed = ((usage?.completion_tokens ?? pieces) - 1) / Math.max(1e-3, (last - first) / 1000);
      if (!before && first) message.first = (first - this.asked) / 1000;
    }
  }
}
