// Conversations and settings in the browser's localStorage, one key per conversation; the API key in sessionStorage.

const PREFIX = "lmchat.conversation.";

export const DEFAULTS = { system: "", temperature: 0.6, top_k: 50, top_p: 1, max_tokens: 256, seed: null, calculator: true };

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // damaged, or storage is not allowed
  }
}

/** Writes a value; false if the browser has no room or allows no storage. */
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function isConversation(value) {
  const fits = (message, index) => message?.role === ["user", "assistant"][index % 2] && Array.isArray(message.parts)
    && message.parts.every((part) => typeof part?.type === "string" && typeof part.text === "string");
  return typeof value?.title === "string" && [value.created, value.updated].every(Number.isInteger)
    && Array.isArray(value.messages) && value.messages.length % 2 === 0 && value.messages.every(fits);
}

/** Settings, with defaults for what is missing or damaged. */
function completed(settings) {
  const fits = (name) => typeof settings?.[name] === (name === "seed" ? "number" : typeof DEFAULTS[name]);
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, (fits(name) ? settings : DEFAULTS)[name]]));
}

/** A conversation; null if there is none, or it is damaged. */
export function find(id) {
  const found = read(PREFIX + id);
  return isConversation(found) && found.id === id ? { ...found, settings: completed(found.settings) } : null;
}

/** All conversations, the latest first. */
export function conversations() {
  let keys = [];
  try {
    keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    // storage is not allowed
  }
  return keys.map((key) => find(key.slice(PREFIX.length))).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

export function newConversation(settings) {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", created: Date.now(), updated: Date.now(), settings: { ...settings }, messages: [] };
}

export const save = (conversation) => write(PREFIX + conversation.id, conversation);

export function remove(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // storage is not allowed
  }
}

export const loadSettings = () => completed(read("lmchat.settings"));
export const saveSettings = (settings) => write("lmchat.settings", settings);
export const loadTheme = () => read("lmchat.theme") ?? "auto";
export const saveTheme = (theme) => write("lmchat.theme", theme);

export function loadToken() {
  try {
    return sessionStorage.getItem("lmchat.token") ?? "";
  } catch {
    return ""; // storage is not allowed
  }
}

export function saveToken(token) {
  try {
    sessionStorage.setItem("lmchat.token", token);
  } catch {
    // storage is not allowed
  }
}
