// Shows a chat: its messages with their buttons, and the notes between them.

import { make, Markdown, plain } from "./markdown.js";
import { split } from "./talk.js";
import { say } from "./words.js";

export const at = id => document.getElementById(id);

function button(name, act, more = {}) {
  const node = make("button", { type: "button", textContent: say(name), ...more });
  node.addEventListener("click", () => act(node));
  return node;
}

export async function copy(text, node) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyOldWay(text);                          // pages without TLS have no clipboard, except on this machine
  } catch {
    notice(say("notCopied"));
    return;
  }
  node.textContent = say("copied");
  setTimeout(() => { node.textContent = say("copy"); }, 1500);
}

function copyOldWay(text) {
  const box = make("textarea", { value: text, className: "out-of-sight" });
  const focused = document.activeElement;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  if (!done) throw new Error("refused");
}

const copyButton = text => button("copy", node => copy(text, node));

// A line above the message box, with one action at most.
export function notice(text, name, act, bad = false) {
  const action = name ? [button(name, () => { notice(""); act(); })] : [];
  at("notice").className = bad ? "bad" : "";
  at("notice").replaceChildren(...(text ? [make("span", { dir: "auto" }, plain(text)), ...action] : []));
}

export function problemText(problem) {
  return problem.name ? say(problem.name, ...(problem.values ?? [])) : problem.text;
}

function figures(message) {
  const parts = [];
  if (message.tokens) parts.push(say("tokens", message.tokens));
  if (message.speed) parts.push(say("speed", message.speed.toFixed(message.speed < 10 ? 1 : 0)));
  if (message.first) parts.push(say("first", message.first.toFixed(2)));
  if (message.prompt) parts.push(say("prompt", message.prompt));
  return parts.join(" · ");
}

// One message. `act(name, message)` is called for its buttons.
class MessageView {
  constructor(message, act) {
    this.message = message;
    this.act = act;
    this.body = make("div", { className: "body" });
    this.foot = make("div", { className: "foot" });
    this.note = make("p", { className: "note" });
    const who = make("h2", { className: "out-of-sight", textContent: say(message.role === "user" ? "you" : "model") });
    this.node = make("article", { className: `turn ${message.role}`, dir: "auto" }, who, this.body, this.note, this.foot);
    if (message.role === "assistant") {
      this.thought = make("div", { dir: "auto" });
      this.summary = make("summary");
      this.details = make("details", { className: "thought", hidden: true }, this.summary, this.thought);
      this.text = make("div", { className: "markdown" });
      this.markdown = new Markdown(this.text, copyButton);
      this.body.append(this.details, this.text);
    }
  }

  update({ running, last, idle }) {
    const { message } = this;
    this.node.classList.toggle("running", running);
    if (message.role === "user") {
      this.body.replaceChildren(plain(message.text));
    } else {
      const { reasoning, text } = split(message);
      this.details.hidden = !reasoning;
      this.summary.textContent = say(running && !text ? "thinking" : "thought");
      if (reasoning) this.thought.replaceChildren(plain(reasoning));
      this.markdown.render(text);
    }
    const problem = message.problem;
    this.note.hidden = !problem && !message.ending;
    this.note.className = problem && problem.name !== "stopped" ? "note bad" : "note";
    this.note.replaceChildren(problem ? plain(problemText(problem)) : message.ending ? say(message.ending) : "");
    this.buttons(running, last, idle);
  }

  buttons(running, last, idle) {
    const { message } = this;
    const mine = message.role === "user";
    const names = running ? [] : ["edit", "remove"];
    if (last && !running) names.unshift(mine ? "retry" : "again", ...(!mine && (message.ending || message.problem) ? ["more"] : []));
    const shown = [names.join(), idle, say("copy"), figures(message)].join("|");
    if (shown === this.shown) return;               // buttons keep the focus
    this.shown = shown;
    const act = names.map(name => button(name, () => this.act(name, message), { disabled: !idle, className: name }));
    const copied = running ? [] : [button("copy", node => copy(mine ? message.text : split(message).text, node))];
    this.foot.replaceChildren(...copied, ...act, make("span", { className: "figures", textContent: figures(message) }));
  }

  // Puts a text box in the place of the message. `save(text, send)` is called with what was written.
  edit(save) {
    const box = make("textarea", { value: this.message.text, dir: "auto", rows: 3 });
    box.setAttribute("aria-label", say("edit"));
    const close = () => { form.remove(); this.body.hidden = this.foot.hidden = false; this.foot.querySelector(".edit")?.focus(); };
    const finish = send => { if (box.value.trim()) { close(); save(box.value.trim(), send); } };
    const mine = this.message.role === "user";
    const form = make("form", { className: "editor" }, box, make("div", { className: "foot" },
      ...(mine ? [button("saveSend", () => finish(true), { className: "main" })] : []),
      button("save", () => finish(false)), button("cancel", close)));
    form.addEventListener("keydown", event => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Escape") { event.stopPropagation(); close(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish(mine);
    });
    this.body.hidden = this.foot.hidden = true;
    this.node.append(form);
    fit(box);
    box.addEventListener("input", () => fit(box));
    box.focus();
  }
}

export function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

// The messages of a chat; those that are still the same keep their nodes.
export class Log {
  constructor(act) {
    this.act = act;
    this.views = new Map();
    this.scroller = at("scroller");
  }

  show(chat, running, welcome) {
    const low = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 80;
    if (this.chat !== chat) this.views.clear();
    const fresh = this.chat !== chat;
    this.chat = chat;
    const nodes = [];
    chat.messages.forEach((message, place) => {
      const view = this.views.get(message) ?? new MessageView(message, this.act);
      this.views.set(message, view);
      view.update({ running: running === message, last: place === chat.messages.length - 1, idle: !running });
      if (place && place === chat.omitted) nodes.push(make("p", { className: "omitted", textContent: say("omitted", place) }));
      nodes.push(view.node);
    });
    if (!chat.messages.length) nodes.push(welcome());
    replace(at("log"), nodes);
    at("log").setAttribute("aria-busy", String(Boolean(running)));
    if (low || fresh) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  retranslate() { this.views.clear(); }

  edit(message, save) { this.views.get(message).edit(save); }
}

// Like replaceChildren, but nodes that stay are not moved: a moved node loses the focus and the selection.
function replace(parent, nodes) {
  const keep = new Set(nodes);
  for (const node of [...parent.childNodes]) if (!keep.has(node)) node.remove();
  nodes.forEach((node, place) => {
    if (parent.childNodes[place] !== node) parent.insertBefore(node, parent.childNodes[place] ?? null);
  });
}

// The list of chats. `act(name, chat)` is called for its buttons.
export function showChats(chats, current, titleOf, act) {
  at("chats").replaceChildren(...chats.map(chat => {
    const open = button("untitled", () => act("open", chat), { className: "open", dir: "auto" });
    open.replaceChildren(plain(titleOf(chat) || say("untitled")));
    const item = make("li", {}, open);
    if (chat.id === current.id) {
      open.setAttribute("aria-current", "true");
      item.append(button("rename", () => rename(item, chat, titleOf, act)), button("remove", () => act("remove", chat)));
    }
    return item;
  }));
}

function rename(item, chat, titleOf, act) {
  const box = make("input", { value: titleOf(chat), maxLength: 100, dir: "auto" });
  box.setAttribute("aria-label", say("title"));
  let done = false;
  const end = keeps => {
    if (done) return;
    done = true;
    act("rename", chat, keeps ? box.value.trim() : chat.title);
  };
  box.addEventListener("keydown", event => {
    if (event.isComposing || event.keyCode === 229 || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter");
  });
  box.addEventListener("blur", () => end(true));
  item.replaceChildren(box);
  box.select();
}
