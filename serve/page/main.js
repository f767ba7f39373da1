// The page: connects the buttons and boxes with the chats, the server and the view.

import * as api from "./api.js";
import { make, plain } from "./markdown.js";
import * as store from "./store.js";
import { Answer, sendsEarlier, split } from "./talk.js";
import { at, fit, Log, notice, problemText, showChats } from "./view.js";
import { other, say, speak } from "./words.js";

const NUMBERS = ["temperature", "top_p", "seed", "max_tokens"];
const { settings } = store;
let facts = { name: "lit_llm", context: Infinity, temperature: null, questions: [], turns: null };
let chat;
let running = null;                                 // the answer that is coming, of whichever chat
const log = new Log(act);

// ---- showing ---------------------------------------------------------------------------------------------------------

let wanted = false;
function changed() {                                // many parts of an answer are drawn at once
  if (wanted) return;
  wanted = true;
  requestAnimationFrame(() => { wanted = false; show(); });
}

function show() {
  log.show(chat, running?.chat === chat ? running.message : null, welcome);
  at("send").textContent = say(running ? "stop" : "send");
  at("send").classList.toggle("stop", Boolean(running));
}

function list() {
  const kept = store.chats();
  if (!kept.some(each => each.id === chat.id)) kept.unshift(chat);
  showChats(kept, chat, store.titleOf, ofList);
}

function welcome() {
  const node = make("div", { className: "welcome" }, make("p", { className: "hello", textContent: say("hello") }));
  if (facts.turns === 1 && !sendsEarlier(facts)) node.append(make("p", { textContent: say("single") }));
  if (facts.questions.length) {
    node.append(make("p", { textContent: say("examples") }));
    for (const question of facts.questions) {
      const button = make("button", { type: "button", className: "example", dir: "auto" }, plain(question));
      button.addEventListener("click", () => submit(question));
      node.append(button);
    }
  }
  node.append(make("p", { textContent: say("kept") }));
  return node;
}

function translate() {
  speak(settings.language);
  at("language").textContent = say("other");
  at("language").lang = other();
  at("box").placeholder = say("hint");
  at("temperature-help").textContent = say("temperatureHelp", facts.temperature ?? "");
  log.retranslate();
  list();
  show();
}

function colours() {
  document.documentElement.dataset.theme = settings.theme;
}

// ---- chats -----------------------------------------------------------------------------------------------------------

function keep() {
  chat.updated = Date.now();
  keepOf(chat);
}

function keepOf(one) {
  const removed = store.keepChat(one);
  if (removed === null) notice(say("unkept"), "exportOne", () => exportChats([one]), true);
  else if (removed.length) notice(say("dropped", removed.join(", ")));
}

function open(one) {
  chat = running?.chat.id === one.id ? running.chat : one;
  store.rememberOpen(chat.id);
  at("box").value = store.readDraft(chat.id);
  fit(at("box"));
  list();
  show();
}

function begin() {
  open(store.newChat());
  closeList();
  at("box").focus();
}

function ofList(name, one, title) {
  if (name === "open") {
    notice("");
    open(store.readChat(one.id) ?? one);
    closeList();
    at("box").focus();
  } else if (name === "rename") {
    chat.title = title;
    keep();
    list();
  } else {
    if (running?.chat === chat) running.stop();
    const gone = chat;
    store.deleteChat(gone.id);
    open(store.chats()[0] ?? store.newChat());
    notice(say("deletedChat", store.titleOf(gone) || say("untitled")), "undo", () => { keepOf(gone); open(gone); });
  }
}

function exportChats(chats) {
  const lines = chats.map(each => store.record(each, split)).filter(Boolean);
  if (lines.length) store.download("chats.jsonl", lines.join("\n") + "\n");
  else notice(say("nothing"));
}

function showList(visible) {
  document.body.classList.toggle("list", visible);
  at("menu").setAttribute("aria-expanded", String(visible));
}

function closeList() {
  if (document.body.classList.contains("list")) { showList(false); at("menu").focus(); }
}

// ---- messages --------------------------------------------------------------------------------------------------------

function submit(text = at("box").value.trim()) {
  if (running) { notice(say("wait")); return; }
  if (!text) return;
  notice("");
  if (text === at("box").value.trim()) {
    at("box").value = "";
    store.keepDraft(chat.id, "");
    fit(at("box"));
  }
  chat.messages.push({ role: "user", text });
  answer();
}

async function answer(continues = false) {
  const mine = running = new Answer(chat, facts, changed);
  keepOf(chat);
  list();
  const problem = await mine.run(continues);
  running = null;
  mine.chat.updated = Date.now();
  if (store.readChat(mine.chat.id)) keepOf(mine.chat);        // it may have been deleted meanwhile
  if (chat === mine.chat) list();
  show();
  if (problem?.status === 401) openSettings();
  at("announcer").replaceChildren(plain(problem ? problemText(problem) : say("answered", split(mine.message).text)));
}

// Changes the messages of the chat; the notice offers to take it back.
function change(messages, text) {
  const before = { messages: chat.messages, omitted: chat.omitted, chat };
  chat.messages = messages;
  chat.omitted = 0;
  keep();
  list();
  show();
  if (text) notice(text, "undo", () => {
    if (running?.chat === before.chat) return;
    Object.assign(before.chat, { messages: before.messages, omitted: before.omitted });
    open(before.chat);
    keep();
    list();
  });
}

function act(name, message) {
  if (running) return;
  const { messages } = chat;
  const place = messages.indexOf(message);
  notice("");
  if (name === "more") answer(true);
  if (name === "retry") answer();
  if (name === "again") {
    change(messages.slice(0, place), say("replaced"));
    answer();
  }
  if (name === "remove") {                          // a question goes with its answer
    const first = message.role === "assistant" ? place - 1 : place;
    const count = messages[first + 1]?.role === "assistant" ? 2 : 1;
    change(messages.toSpliced(first, count), say("deletedTurn"));
    at("box").focus();
  }
  if (name === "edit") log.edit(message, (text, sends) => {
    if (text === message.text && !sends) return;
    const rest = sends ? [] : messages.slice(place + 1);
    change([...messages.slice(0, place), { role: message.role, text, ...(sends ? {} : { ending: message.ending }) }, ...rest],
           say("replaced"));
    if (sends) answer();
  });
}

// ---- settings --------------------------------------------------------------------------------------------------------

function openSettings() {
  for (const name of NUMBERS) at(name).value = settings[name] ?? "";
  at("system").value = settings.system;
  at("theme").value = settings.theme;
  at("earlier").checked = sendsEarlier(facts);
  at("key").value = store.apiKey();
  if (!at("settings").open) at("settings").showModal();
}

function readSetting(event) {
  const { id, value, checked } = event.target;
  if (id === "key") { store.keepApiKey(value.trim()); return; }
  if (!event.target.checkValidity()) return;        // the browser marks it; the last valid value stays
  if (NUMBERS.includes(id)) settings[id] = value === "" ? null : Number(value);
  else if (id === "earlier") settings.earlier = checked;
  else settings[id] = value;
  store.keepSettings();
  colours();
  if (id === "earlier") show();
}

let triedKey = "";                                  // with which the server was last asked who it is

async function greet() {
  triedKey = store.apiKey();
  try {
    facts = { ...facts, ...await api.model() };
    notice("");
    at("model").textContent = document.title = facts.name;
    translate();
  } catch (error) {
    notice(error instanceof api.Refused ? error.message : say("lost"), "retry", greet, true);
    if (error.status === 401) openSettings();
  }
}

// ---- events ----------------------------------------------------------------------------------------------------------

at("form").addEventListener("submit", event => { event.preventDefault(); if (running) running.stop(); else submit(); });
at("box").addEventListener("input", () => { fit(at("box")); store.keepDraft(chat.id, at("box").value); });
at("box").addEventListener("keydown", event => {
  // Enter also picks a word in an input method for Chinese; Safari says so only by the number.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
addEventListener("keydown", event => {
  if (event.key !== "Escape" || event.isComposing || at("settings").open) return;
  if (document.body.classList.contains("list")) closeList();
  else running?.stop();
});
at("language").addEventListener("click", () => { settings.language = other(); store.keepSettings(); translate(); });
at("fresh").addEventListener("click", begin);
at("menu").addEventListener("click", () => showList(!document.body.classList.contains("list")));
at("shade").addEventListener("click", closeList);
at("options").addEventListener("click", openSettings);
at("settings").addEventListener("input", readSetting);
at("close").addEventListener("click", () => at("settings").close());
at("settings").addEventListener("close", () => { if (store.apiKey() !== triedKey) greet(); });
at("export").addEventListener("click", () => exportChats([chat]));
at("export-all").addEventListener("click", () => exportChats(store.chats()));
store.onOtherTab(id => {
  const other = id === chat.id && running?.chat !== chat ? store.readChat(id) : null;
  if (other) { chat = other; show(); }
  list();
});

store.readSettings();
colours();
chat = store.openChat();
translate();
open(chat);
greet();
at("box").focus();
