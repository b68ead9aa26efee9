// What the browser keeps: chats and settings in localStorage, the API key in sessionStorage only.
//
// A chat is { id, title, updated, turns }. A turn is one of
//   { role: "user", text }
//   { role: "assistant", text, reasoning, calls: [{ id, name, arguments }], model, stats, finish, error }
//   { role: "tool", call, name, text }   the result of the call with this id
// Each chat has a key of its own, so that two open tabs do not overwrite each other's chats.

const CHAT = "tulle.chat.";
const memory = new Map(); // where storage is forbidden, things last as long as the page

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key) ?? "null");
  } catch {
    return memory.get(key) ?? null;
  }
}

/** False where the storage is full or forbidden. */
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    memory.set(key, value);
    return false;
  }
}

function remove(key) {
  memory.delete(key);
  try {
    localStorage.removeItem(key);
  } catch {}
}

function keys() {
  try {
    return [...new Set([...Object.keys(localStorage), ...memory.keys()])];
  } catch {
    return [...memory.keys()];
  }
}

const isTurn = (turn) => ["user", "assistant", "tool"].includes(turn?.role) && typeof turn.text === "string";

/** All chats, the last used first. What is not a chat (another version's, a damaged one) is left alone. */
export function chats() {
  return keys()
    .filter((key) => key.startsWith(CHAT))
    .map(read)
    .filter((chat) => chat && typeof chat.id === "string" && Array.isArray(chat.turns) && chat.turns.every(isTurn))
    .sort((a, b) => b.updated - a.updated);
}

export function newChat() {
  // randomUUID is absent on plain HTTP.
  const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", updated: Date.now(), turns: [] };
}

export function saveChat(chat) {
  const first = chat.turns.find((turn) => turn.role === "user")?.text.trim() ?? "";
  chat.title = first.split("\n")[0].slice(0, 80);
  return write(CHAT + chat.id, chat);
}

export const removeChat = (chat) => remove(CHAT + chat.id);
export const removeChats = () => keys().filter((key) => key.startsWith(CHAT)).forEach(remove);

export const settings = () => read("tulle.settings") ?? {};
export const saveSettings = (value) => write("tulle.settings", value);

/** The model that was chosen last. */
export const model = () => read("tulle.model");
export const saveModel = (name) => write("tulle.model", name);

/** The chosen theme, or null where the system's is followed. Read by theme.js as plain text. */
export function saveTheme(theme) {
  try {
    if (theme) localStorage.setItem("tulle.theme", theme);
    else localStorage.removeItem("tulle.theme");
  } catch {}
}

let heldKey = "";

export function apiKey() {
  try {
    return sessionStorage.getItem("tulle.key") ?? heldKey;
  } catch {
    return heldKey;
  }
}

export function saveApiKey(key) {
  heldKey = key;
  try {
    if (key) sessionStorage.setItem("tulle.key", key);
    else sessionStorage.removeItem("tulle.key");
  } catch {}
}
