// Conversations and settings in the browser's localStorage, one key per conversation.

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
  const fits = (message) => message && ["user", "assistant"].includes(message.role) && Array.isArray(message.parts)
    && message.parts.every((part) => part && typeof part.type === "string" && typeof part.text === "string");
  return value && typeof value.id === "string" && Array.isArray(value.messages) && value.messages.every(fits);
}

/** All conversations, the latest first. */
export function conversations() {
  let keys = [];
  try {
    keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    // storage is not allowed
  }
  return keys.map(read).filter(isConversation).sort((a, b) => b.updated - a.updated);
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

export const loadSettings = () => ({ ...DEFAULTS, ...(read("lmchat.settings") ?? {}) });
export const saveSettings = (settings) => write("lmchat.settings", settings);
export const loadTheme = () => read("lmchat.theme") ?? "auto";
export const saveTheme = (theme) => write("lmchat.theme", theme);
