// What the browser keeps: settings, chats and drafts. Each chat is a key of its own, so two tabs do not overwrite each other's.

const SETTINGS = "lit_llm.settings", CHAT = "lit_llm.chat.", DRAFT = "lit_llm.draft.", OPEN = "lit_llm.open", KEY = "lit_llm.key";
const MOST_CHATS = 200;
const LONGEST_TITLE = 60;

const DEFAULTS = { language: null, theme: "system", temperature: null, top_p: null, seed: null, max_tokens: null, system: "",
                   earlier: null };                 // earlier null: as the model was trained

// A browser may forbid storage; the page then works, and keeps nothing.
function read(storage, key) {
  try { return JSON.parse(storage().getItem(key)); } catch { return null; }
}

function write(storage, key, value) {
  try { storage().setItem(key, JSON.stringify(value)); return true; } catch { return false; }
}

function drop(storage, key) {
  try { storage().removeItem(key); } catch { /* nothing was kept */ }
}

const kept = () => localStorage, ofTab = () => sessionStorage;

export const settings = { ...DEFAULTS };

export function readSettings() {
  const found = read(kept, SETTINGS) ?? {};
  for (const [name, value] of Object.entries(found)) if (name in DEFAULTS) settings[name] = value;
}

export const keepSettings = () => write(kept, SETTINGS, settings);
export const apiKey = () => read(ofTab, KEY) ?? "";
export const keepApiKey = key => write(ofTab, KEY, key);

export function newChat() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", updated: Date.now(), system: "",
           omitted: 0, messages: [] };
}

function isChat(value) {
  return value && typeof value.id === "string" && Array.isArray(value.messages)
    && value.messages.every(message => ["user", "assistant"].includes(message?.role) && typeof message.text === "string");
}

export function readChat(id) {
  const chat = read(kept, CHAT + id);
  return isChat(chat) ? chat : null;
}

// All kept chats, the newest first.
export function chats() {
  let keys = [];
  try { keys = Object.keys(kept()); } catch { /* storage is forbidden */ }
  const found = keys.filter(key => key.startsWith(CHAT)).map(key => readChat(key.slice(CHAT.length)));
  return found.filter(Boolean).sort((one, two) => two.updated - one.updated);
}

export function titleOf(chat) {
  const first = chat.title || chat.messages.find(message => message.role === "user")?.text.trim().split("\n")[0] || "";
  return first.length > LONGEST_TITLE ? `${first.slice(0, LONGEST_TITLE - 1)}…` : first;
}

// Keeps a chat. Where the storage is full, the oldest other chats make room. Returns their titles, or null if it does not fit.
export function keepChat(chat) {
  const removed = [];
  const others = chats().filter(each => each.id !== chat.id);
  while (others.length >= MOST_CHATS || !write(kept, CHAT + chat.id, chat)) {
    const oldest = others.pop();
    if (!oldest) return null;
    deleteChat(oldest.id);
    removed.push(titleOf(oldest));
  }
  return removed;
}

export function deleteChat(id) {
  drop(kept, CHAT + id);
  drop(kept, DRAFT + id);
}

export const readDraft = id => read(kept, DRAFT + id) ?? "";
export const keepDraft = (id, text) => text ? write(kept, DRAFT + id, text) : drop(kept, DRAFT + id);

// The chat that this tab shows: after a reload the same one, in a new tab the newest.
export function openChat() {
  const id = read(ofTab, OPEN);
  const known = id && (readChat(id) ?? { ...newChat(), id });
  return known || chats()[0] || newChat();
}

export const rememberOpen = id => write(ofTab, OPEN, id);

// Called where another tab has changed the chats.
export function onOtherTab(react) {
  addEventListener("storage", event => {
    if (event.key === null || event.key.startsWith(CHAT)) react(event.key?.slice(CHAT.length));
  });
}

// ---- training records ------------------------------------------------------------------------------------------------

// One line of JSON in the format of the project's data: answered questions only, with reasoning apart from the answer.
export function record(chat, split) {
  const messages = chat.system ? [{ role: "system", content: chat.system }] : [];
  const turns = chat.messages;
  turns.forEach((message, place) => {
    const answer = turns[place + 1];
    if (message.role !== "user" || answer?.role !== "assistant") return;
    const { reasoning, text } = split(answer);
    if (!text.trim()) return;
    messages.push({ role: "user", content: message.text },
                  { role: "assistant", content: text, ...(reasoning ? { reasoning_content: reasoning } : {}) });
  });
  return messages.some(message => message.role === "assistant") ? JSON.stringify({ messages }) : null;
}

export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
