// The chat page: draws the conversation, sends questions, keeps what was said.

import { answer, ApiError, model, setToken } from "./api.js";
import { element, icon, renderParts } from "./markdown.js";
import * as store from "./store.js";

const EXAMPLES = ["Who are you?", "Spell the word lightning", "How many r are in strawberry?", "Tom has 3 boxes of 12 pens and gives 5 away. How many are left?"];

const $ = (id) => document.getElementById(id);
const log = $("log");
const question = $("question");

let settings = store.loadSettings();
let conversation = store.newConversation(settings);
const UNKNOWN = { id: "lmchat", details: {} };
let card = UNKNOWN;
let running = null; // the AbortController of the answer being generated

// ---------------------------------------------------------------------------------------------------------------------
// Drawing

const textOf = (message) => message.parts.map((part) => part.text).join("");

function button(name, label, action) {
  return element("button", { type: "button", className: "icon", "aria-label": label, title: label, onclick: action }, icon(name));
}

/** Draws the conversation, and scrolls to its end, or with `stay` only where the end was in view. */
function draw({ stay = false } = {}) {
  const place = stay && !isAtEnd() ? log.scrollTop : null;
  log.replaceChildren(...(conversation.messages.length ? conversation.messages.map(drawMessage) : [welcome()]));
  document.title = conversation.title ? `${conversation.title} – lmchat` : "lmchat";
  $("export").disabled = !conversation.messages.length;
  drawList();
  if (place === null) scrollDown();
  else log.scrollTo(0, place);
}

function welcome() {
  const examples = EXAMPLES.map((text) => element("button", { type: "button", onclick: () => ask(text) }, text));
  return element("div", { className: "welcome" }, element("h1", {}, "What would you like to ask?"),
    element("p", {}, `${card.id} will answer.`), element("div", { className: "examples" }, ...examples));
}

function drawMessage(message, index) {
  const mine = message.role === "user";
  const body = element("div", { className: "body" });
  const made = element("article", { className: `message ${message.role}`, "aria-label": mine ? "You" : "Answer" },
    element("h2", { className: "hidden" }, mine ? "You" : "Answer"), body);
  if (mine) body.append(textOf(message));
  else body.append(renderParts(message.parts));
  if (message === current()) {
    made.classList.add("busy");
    made.setAttribute("aria-busy", "true");
    return made;
  }
  const tools = element("div", { className: "tools" });
  if (message.parts.length) tools.append(button("copy", "Copy", () => copy(textOf(message))));
  if (mine) tools.append(button("edit", "Edit", () => edit(made, index)));
  else tools.append(button("again", "Regenerate", () => regenerate(index)), element("span", { className: "note" }, note(message)));
  if (message.error) made.append(errorBox(message.error, () => regenerate(index)));
  made.append(tools);
  return made;
}

function note(message) {
  const notes = [message.model];
  if (message.left) notes.push(`without the oldest ${message.left} ${message.left === 1 ? "turn" : "turns"}, which did not fit`);
  if (message.reason === "length") notes.push("cut at the longest answer");
  if (message.reason === "stopped") notes.push("stopped");
  if (!message.error && !message.parts.length) notes.push("empty answer");
  return notes.filter(Boolean).join(" · ");
}

function errorBox(text, again) {
  return element("div", { className: "error", role: "alert" }, element("span", {}, text),
    element("button", { type: "button", onclick: again }, "Try again"));
}

function drawList() {
  const rows = store.conversations().map((each) => {
    const open = element("button", { type: "button", className: "open", onclick: () => show(each) }, each.title || "New chat");
    const here = each.id === conversation.id;
    if (here) open.setAttribute("aria-current", "true");
    return element("li", { className: here ? "current" : "" }, open, button("delete", `Delete ${each.title}`, () => discard(each)));
  });
  $("conversations").replaceChildren(...rows);
}

/** Draws the answer being generated again, at most once a frame. */
let scheduled = false;
function drawAnswer() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    const message = current();
    const body = log.querySelector(".busy > .body");
    if (!message || !body) return;
    const following = isAtEnd();
    body.replaceChildren(renderParts(message.parts));
    if (following) scrollDown();
  });
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const scrollDown = () => log.scrollTo(0, log.scrollHeight);
const current = () => (running ? conversation.messages.at(-1) : null);
const say = (text) => { $("status").textContent = text; };

// ---------------------------------------------------------------------------------------------------------------------
// Asking

function ask(text) {
  if (running || !text.trim()) return;
  conversation.messages.push({ role: "user", parts: [{ type: "text", text }] });
  conversation.title ||= [...text.trim()].slice(0, 60).join("");
  generate();
}

function regenerate(index) {
  if (running) return;
  conversation.messages.length = index;
  generate();
}

/** Messages for the server: without turns that have no answer, and without the oldest `left` turns. */
function prompt(left) {
  const messages = conversation.messages.slice(0, -1);
  const last = messages.pop();
  const turns = [];
  for (let at = 0; at < messages.length; at += 2)
    if (messages[at + 1].parts.length)
      turns.push([{ role: "user", content: textOf(messages[at]) }, { role: "assistant", content: messages[at + 1].parts }]);
  if (left > turns.length) return null;
  const system = conversation.settings.system.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns.slice(left).flat(), { role: "user", content: textOf(last) }];
}

function body(messages) {
  const { temperature, top_k, top_p, max_tokens, seed, calculator } = conversation.settings;
  const longest = Math.min(max_tokens, card.details.max_new_tokens ?? max_tokens);
  return { model: card.id, messages, temperature, top_k, top_p, max_tokens: longest, calculator, ...(seed === null ? {} : { seed }) };
}

async function generate() {
  const message = { role: "assistant", parts: [], model: card.id, reason: null };
  conversation.messages.push(message);
  conversation.updated = Date.now();
  const asked = conversation;
  running = new AbortController();
  const { signal } = running;
  keep(asked);
  setBusy(true);
  draw();
  say("Answering");
  try {
    await receive(message, signal);
  } catch (error) {
    if (signal.aborted) message.reason = "stopped";
    else message.error = error.message;
    if (error instanceof ApiError && error.status === 401) askToken();
    if (error.code === "unreachable" || error.code === "model_not_found") await loadModel();
  }
  running = null;
  asked.updated = Date.now();
  keep(asked);
  const unfocused = [document.body, $("stop")].includes(document.activeElement);
  setBusy(false);
  draw({ stay: true });
  if (unfocused) question.focus();
  say(message.error ?? (message.reason === "stopped" ? "Stopped" : `Answer: ${textOf(message)}`));
}

/** Reads the answer. Where the conversation is too long for the model, its oldest turns are left out. */
async function receive(message, signal) {
  if (card === UNKNOWN) await loadModel();
  message.model = card.id;
  for (let left = 0; ; left += 1) {
    const messages = prompt(left);
    try {
      for await (const { parts, reason } of answer(body(messages), signal)) {
        for (const part of parts) append(message.parts, part);
        message.reason = reason ?? message.reason;
        drawAnswer();
      }
      if (left) message.left = left;
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || message.parts.length || !prompt(left + 1)) throw error;
    }
  }
}

function append(parts, part) {
  const last = parts.at(-1);
  if (last?.type === part.type) last.text += part.text;
  else parts.push({ ...part });
}

function keep(which) {
  $("notice").hidden = store.save(which);
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  for (const id of ["new", "settings"]) $(id).disabled = busy;
  $("conversations").inert = busy;
  if (busy && document.activeElement === document.body) $("stop").focus();
  if (!busy) updateSend();
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversations

function show(which) {
  if (running) return;
  conversation = which;
  $("notice").hidden = true;
  closeSidebar();
  draw();
  question.focus();
}

function startNew() {
  show(store.newConversation(settings));
}

function discard(which) {
  if (running || !confirm(`Delete the conversation “${which.title}”?`)) return;
  store.remove(which.id);
  if (which.id === conversation.id) startNew();
  else {
    if (!$("notice").hidden) keep(conversation);
    drawList();
  }
}

/** Shows what another tab has added to the conversation, unless an answer or an edit is in progress. */
function follow() {
  if (running) return;
  const changed = log.querySelector(".editor") ? null : store.find(conversation.id);
  if (!changed || changed.updated === conversation.updated) drawList();
  else {
    conversation = changed;
    draw({ stay: true });
  }
}

function edit(made, index) {
  if (running) return;
  const text = element("textarea", { rows: 3, "aria-label": "Edit the message", value: textOf(conversation.messages[index]) });
  const send = () => {
    if (!text.value.trim()) return;
    conversation.messages.length = index;
    if (!index) conversation.title = "";
    ask(text.value);
    question.focus();
  };
  text.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") { event.stopPropagation(); draw({ stay: true }); question.focus(); }
  };
  const cancel = element("button", { type: "button", onclick: () => draw({ stay: true }) }, "Cancel");
  const done = element("button", { type: "button", className: "main", onclick: send }, "Send");
  made.replaceChildren(element("div", { className: "editor" }, text, element("div", {}, cancel, done)));
  text.focus();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    say("The browser does not allow copying");
  }
}

function exportConversation() {
  const { system, ...sampling } = conversation.settings;
  const messages = conversation.messages.map(({ role, parts }) => ({ role, content: role === "user" ? textOf({ parts }) : parts }));
  const content = { messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    title: conversation.title, model: card.id, sampling, created: new Date(conversation.created).toISOString() };
  const url = URL.createObjectURL(new Blob([`${JSON.stringify(content, null, 2)}\n`], { type: "application/json" }));
  element("a", { href: url, download: `lmchat-${conversation.id}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---------------------------------------------------------------------------------------------------------------------
// Settings, theme, sidebar

function openSettings() {
  const { elements } = $("settings-dialog").querySelector("form");
  fill(elements, conversation.settings);
  $("settings-dialog").showModal();
}

function fill(elements, values) {
  for (const [name, value] of Object.entries(values)) {
    if (!elements[name]) continue;
    if (elements[name].type === "checkbox") elements[name].checked = value;
    else elements[name].value = value ?? "";
  }
}

function closeSettings() {
  const dialog = $("settings-dialog");
  if (dialog.returnValue !== "save") return;
  const { elements } = dialog.querySelector("form");
  const number = (name) => Number(elements[name].value);
  settings = { system: elements.system.value, temperature: number("temperature"), top_k: number("top_k"), top_p: number("top_p"),
    max_tokens: number("max_tokens"), seed: elements.seed.value === "" ? null : number("seed"), calculator: elements.calculator.checked };
  conversation.settings = { ...settings };
  store.saveSettings(settings);
  if (conversation.messages.length) keep(conversation);
}

function askToken() {
  if (!$("token-dialog").open) $("token-dialog").showModal();
}

function setTheme(theme) {
  const dark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").title = `Theme: ${theme}`;
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
}

function nextTheme() {
  const themes = ["auto", "light", "dark"];
  const theme = themes[(themes.indexOf(store.loadTheme()) + 1) % themes.length];
  store.saveTheme(theme);
  setTheme(theme);
  say(`Theme: ${theme}`);
}

function openSidebar() {
  $("sidebar").classList.add("shown");
  $("shade").hidden = false;
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeSidebar() {
  if (!$("sidebar").classList.contains("shown")) return;
  $("sidebar").classList.remove("shown");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
  $("menu").focus();
}

function updateSend() {
  $("send").disabled = !question.value.trim();
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

async function loadModel() {
  try {
    card = await model();
  } catch (error) {
    card = UNKNOWN;
    $("model-name").textContent = error.status === 401 ? "locked" : "no connection";
    $("model-details").textContent = "";
    if (error.status === 401) askToken();
    return;
  }
  const { stage, step, parameters, max_new_tokens: longest } = card.details;
  const size = parameters >= 1e9 ? `${(parameters / 1e9).toPrecision(3)} B` : `${(parameters / 1e6).toPrecision(2)} M`;
  $("model-name").textContent = card.id;
  $("model-details").textContent = `${stage}, step ${step} · ${size} parameters · context ${card.max_model_len.toLocaleString("en")}`;
  $("settings-dialog").querySelector("[name=max_tokens]").max = longest;
  if (!conversation.messages.length) draw();
}

// ---------------------------------------------------------------------------------------------------------------------

function submit() {
  if (running) return;
  const text = question.value;
  question.value = "";
  updateSend();
  ask(text);
}

$("composer").onsubmit = (event) => { event.preventDefault(); submit(); };
question.oninput = updateSend;
question.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  running?.abort();
  closeSidebar();
};
$("stop").onclick = () => { running?.abort(); question.focus(); };
$("new").onclick = startNew;
$("export").onclick = exportConversation;
$("theme").onclick = nextTheme;
$("settings").onclick = openSettings;
$("settings-dialog").onclose = closeSettings;
$("settings-dialog").querySelector("[value=reset]").onclick = (event) => {
  event.preventDefault();
  fill($("settings-dialog").querySelector("form").elements, store.DEFAULTS);
};
$("token-dialog").onclose = () => {
  const input = $("token-dialog").querySelector("input");
  if (!input.value) return;
  setToken(input.value);
  input.value = "";
  loadModel();
};
$("menu").onclick = openSidebar;
$("shade").onclick = closeSidebar;
$("latest").onclick = scrollDown;
log.onscroll = () => { $("latest").hidden = isAtEnd(); };
log.onclick = (event) => {
  const pressed = event.target.closest(".copy-code");
  if (pressed) copy(pressed.closest(".codeblock").querySelector("code").textContent);
};
matchMedia("(prefers-color-scheme: dark)").onchange = () => setTheme(store.loadTheme());
addEventListener("storage", follow);
addEventListener("pagehide", () => {
  if (!running) return;
  running.abort();
  current().reason = "stopped";
  keep(conversation);
});

setTheme(store.loadTheme());
draw();
updateSend();
loadModel();
question.focus();
