// The chat page: what is shown, what is sent, what the keys do.

import * as api from "./api.js";
import { find, fit, h } from "./dom.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { AnswerView, ToolView, UserView } from "./turns.js";

const NEAR = 80; // pixels from the end within which the view follows an answer
const SAVE_EVERY = 1000; // milliseconds, while an answer arrives
const PLAIN_TOKENS = 256; // of a continuation, where the settings say nothing; the API's own default is 16
const SHORTEST = 0.02; // seconds over which a speed means something

const wide = window.matchMedia("(min-width: 1000px)");
const roomy = window.matchMedia("(min-width: 1280px)");
const touch = window.matchMedia("(hover: none)");
const prompt = find("prompt");
const scroller = find("scroll");

let chat = store.newChat();
let views = [];
let models = [];
let facts = {}; // of the chosen model
let factsCame = Promise.resolve();
let running = null; // { turn, controller, stopped, left } while an answer arrives
let following = true;

// Notices

function notice(text, action) {
  const line = find("notice");
  line.hidden = !text;
  line.replaceChildren(text ?? "");
  if (text && action) line.append(" ", h("button", { type: "button", class: "quiet", onclick: action }, "Try again"));
}

const say = (text) => (find("status").textContent = text);

function askForKey() {
  find("key").hidden = false;
  if (store.apiKey()) find("key-field").value = "";
  find("key-field").focus();
}

// Models and their facts

async function loadModels() {
  try {
    models = await api.models();
  } catch (error) {
    notice(error.message, error.status === 401 ? null : loadModels);
    if (error.status === 401) askForKey();
    return false;
  }
  notice("");
  find("key").hidden = true;
  const menu = find("model");
  const chosen = store.model();
  menu.replaceChildren(...models.map((name) => h("option", { value: name }, name)));
  if (models.includes(chosen)) menu.value = chosen;
  menu.disabled = models.length === 0;
  menu.classList.toggle("single", models.length === 1);
  factsCame = showFacts();
  return true;
}

const count = (value) => Number(value).toLocaleString("en");

function scaled(value, units, base) {
  let i = 0;
  while (value >= base * 0.9995 && i < units.length - 1) {
    value /= base;
    i++;
  }
  return `${value >= 100 || i === 0 ? Math.round(value) : value.toPrecision(3).replace(/\.?0+$/, "")} ${units[i]}`.trim();
}

const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"], 1000);

// [label, from the facts to its value]; what a server does not say is left out
const FACTS = [
  ["Parameters", (f) => f.parameters && scaled(f.parameters, ["", "thousand", "million", "billion"], 1000)],
  ["Bits per weight", (f) => f.bits_per_weight && String(Number(Number(f.bits_per_weight).toFixed(2)))],
  ["Sparsity", (f) => typeof f.sparsity === "number" && (f.sparsity ? `${Number((100 * f.sparsity).toFixed(1))} %` : "dense")],
  ["Size", (f) => f.file_bytes && bytes(f.file_bytes)],
  ["Read per token", (f) => f.weight_bytes && bytes(f.weight_bytes)],
  ["Context, tokens", (f) => f.context && count(f.context)],
  ["KV cache", (f) => f.cache && String(f.cache)],
  ["Threads", (f) => f.threads && count(f.threads)],
];

/** Whether the model can only continue a text. */
const continues = () => facts.chat === false;

async function showFacts() {
  const name = find("model").value;
  find("welcome-title").textContent = name || "Tulle";
  document.title = name ? `${name} · Tulle` : "Tulle";
  showTiles(name, {});
  const slow = setTimeout(() => (find("welcome-note").textContent = "Loading …"), 400);
  const found = (name && (await api.info(name))) || {};
  clearTimeout(slow);
  if (name === find("model").value) showTiles(name, found); // else another one was chosen meanwhile
}

function showTiles(name, found) {
  facts = found;
  settings.showDefaults(facts.defaults ?? {});
  const version = facts.version ? `Served by Tulle ${facts.version}.` : "";
  find("welcome-note").textContent = continues() ? `It has no chat template: it continues what you write. ${version}` : version;
  const shown = FACTS.map(([label, of]) => [label, of(facts)]).filter(([, value]) => value);
  find("tiles").replaceChildren(...shown.map(([label, value]) =>
    h("div", { class: "tile" }, h("div", { class: "label" }, label), h("div", { class: "value" }, value))));
  find("facts").replaceChildren(h("dt", {}, "Name"), h("dd", {}, name || "none"),
    ...shown.flatMap(([label, value]) => [h("dt", {}, label), h("dd", {}, value)]));
}

// The conversation

function makeView(turn) {
  if (turn.role === "user") return new UserView(turn, { edit: editTurn, cancelled: () => prompt.focus() });
  if (turn.role === "tool") return new ToolView(turn);
  return new AnswerView(turn, { regenerate, results: sendResults });
}

/** Brings the page in line with the chat: views of turns that are still there stay as they are. */
function show() {
  const kept = new Map(views.map((view) => [view.turn, view]));
  views = chat.turns.map((turn) => kept.get(turn) ?? makeView(turn));
  const elements = views.map((view) => view.element);
  const list = find("turns");
  for (const element of [...list.children]) if (!elements.includes(element)) element.remove();
  elements.forEach((element, i) => list.children[i] !== element && list.insertBefore(element, list.children[i] ?? null));
  views.forEach(update);
  find("welcome").hidden = chat.turns.length > 0;
  find("export").disabled = chat.turns.length === 0;
  find("send").hidden = Boolean(running);
  find("stop").hidden = !running;
  follow();
}

function update(view) {
  view.update({
    running: running?.turn === view.turn && Boolean(running),
    last: view.turn === chat.turns.at(-1),
    several: models.length > 1,
  });
}

function follow() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
  find("latest").hidden = following || !chat.turns.length;
}

function showChats() {
  const list = store.chats();
  find("chat-list").replaceChildren(...list.map((one) => h("li", {},
    h("button", { type: "button", class: "chat", "aria-current": one.id === chat.id ? "true" : false, onclick: () => openChat(one) }, one.title || "Untitled"),
    h("button", { type: "button", class: "quiet remove", "aria-label": `Delete “${one.title || "Untitled"}”`, onclick: () => {
      if (one.id === chat.id) stop(); // which saves it
      store.removeChat(one);
      if (one.id === chat.id) newChat();
      else showChats();
    } }, "×"))));
  find("clear").disabled = list.length === 0;
}

function save() {
  chat.updated = Date.now();
  if (!store.saveChat(chat)) notice("The browser keeps no more: export this chat, or delete earlier ones.");
}

function openChat(next) {
  stop();
  chat = next;
  views = [];
  following = true;
  notice("");
  show();
  showChats();
  rememberChat();
  if (!wide.matches) find("chats").close();
  if (!touch.matches) prompt.focus();
}

const newChat = () => openChat(store.newChat());

function rememberChat() {
  try {
    sessionStorage.setItem("tulle.open", chat.id); // a reload comes back to it; another tab begins its own
  } catch {}
}

/** The chat as the API's messages; `end`: turns before which it ends. */
function messages(end) {
  const turns = chat.turns.slice(0, end);
  const list = [];
  const system = settings.systemPrompt();
  if (system) list.push({ role: "system", content: system });
  turns.forEach((turn, i) => {
    const before = list.at(-1);
    if (turn.role === "user") {
      // Behind an answer that failed; many templates refuse two messages of one side.
      if (before?.role === "user") before.content += `\n\n${turn.text}`;
      else list.push({ role: "user", content: turn.text });
    } else if (turn.role === "tool") {
      list.push({ role: "tool", tool_call_id: turn.call, content: turn.text });
    } else {
      // Calls count only with their results behind them.
      const answered = turn.calls?.length && turns[i + 1]?.role === "tool";
      const calls = answered && turn.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
      if (turn.text || answered) list.push({ role: "assistant", content: turn.text, ...(calls && { tool_calls: calls }) });
    }
  });
  return list;
}

/** The chat as one text, for a model that continues it. */
function plainText() {
  return chat.turns.reduce((text, turn) => (/\S$/.test(text) && turn.role === "user" ? `${text}\n${turn.text}` : text + turn.text), "");
}

function requestBody(model) {
  const fields = { ...(model && { model }), ...settings.requestFields() };
  if (!continues()) return { ...fields, messages: messages(chat.turns.length) };
  delete fields.tools;
  return { max_tokens: PLAIN_TOKENS, ...fields, prompt: plainText() };
}

function send(text) {
  stop();
  chat.turns.push({ role: "user", text });
  answer();
}

function editTurn(turn, text) {
  stop();
  chat.turns.length = chat.turns.indexOf(turn);
  send(text);
  prompt.focus();
}

function regenerate(turn) {
  stop();
  chat.turns.length = chat.turns.indexOf(turn);
  answer();
  prompt.focus();
}

function sendResults(turn, texts) {
  turn.calls.forEach((call, i) => chat.turns.push({ role: "tool", call: call.id, name: call.name, text: texts[i] }));
  answer();
  prompt.focus();
}

/** One chunk of a streamed completion. */
function take(chunk, turn, clock) {
  const { usage } = chunk;
  if (usage) {
    clock.tokens = usage.completion_tokens ?? clock.tokens;
    turn.stats.prompt = usage.prompt_tokens;
    turn.stats.cached = usage.prompt_tokens_details?.cached_tokens;
  }
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? { content: choice.text };
  const now = performance.now();
  if (delta.content || delta.reasoning_content || delta.tool_calls?.length) {
    clock.first ??= now;
    clock.last = now;
    turn.stats.first = (clock.first - clock.start) / 1000;
  }
  if (typeof delta.reasoning_content === "string") turn.reasoning += delta.reasoning_content;
  if (typeof delta.content === "string" && delta.content) {
    if (turn.reasoning) turn.stats.thought ??= (now - clock.first) / 1000;
    turn.text += delta.content;
  }
  for (const part of delta.tool_calls ?? []) {
    const call = (turn.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (choice.finish_reason) turn.finish = choice.finish_reason;
}

async function answer() {
  const model = find("model").value;
  const turn = { role: "assistant", text: "", reasoning: "", calls: [], model, stats: {}, finish: "", error: "" };
  const mine = { turn, controller: new AbortController(), stopped: false, left: false };
  const home = chat;
  running = mine;
  chat.turns.push(turn);
  following = true;
  notice("");
  save();
  show();
  showChats();
  rememberChat();
  say("Answering");

  const clock = { start: performance.now(), tokens: 0 };
  let drawing = false;
  let saved = clock.start;
  const draw = () => {
    drawing = false;
    const view = views.find((one) => one.turn === turn);
    if (!view || running !== mine) return;
    update(view);
    follow();
  };
  try {
    await factsCame; // they tell how this model is to be asked
    mine.controller.signal.throwIfAborted();
    const chunks = api.complete(requestBody(model), mine.controller.signal);
    for (;;) {
      const { value, done } = await chunks.next();
      if (mine.stopped) break;
      if (done) {
        if (value) turn.stats.unread = value;
        break;
      }
      take(value, turn, clock);
      if (!drawing) requestAnimationFrame(draw);
      drawing = true;
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        store.saveChat(home);
      }
    }
  } catch (error) {
    if (mine.left) {
      turn.finish = "left"; // the browser cut the connection, not the server
    } else if (error.name !== "AbortError") {
      turn.error = error instanceof api.Failure ? error.message : `The page failed: ${error.message}. Try again, or reload.`;
      if (!(error instanceof api.Failure)) console.error(error);
      if (error.status === 401) askForKey();
    }
  }
  if (!turn.error && !models.length) loadModels(); // the server was away when the page came
  turn.calls = turn.calls.filter(Boolean);
  if (clock.tokens) turn.stats.tokens = clock.tokens;
  // Of the tokens after the first. Where all came at once, as through a buffering proxy, no speed was seen.
  const span = (clock.last - clock.first) / 1000;
  if (clock.tokens > 1 && span > SHORTEST) turn.stats.rate = (clock.tokens - 1) / span;
  if (mine.stopped) turn.finish = "stopped";
  if (running === mine) running = null;
  home.updated = Date.now();
  // A chat that was deleted, or a turn that was replaced, stays gone.
  if (home === chat && chat.turns.includes(turn)) {
    save();
    show();
    say(turn.error || `${mine.stopped ? "Stopped" : "Answer"}: ${turn.text || "no text"}`);
  }
}

function stop() {
  if (!running) return;
  const { turn, controller } = running;
  running.stopped = true;
  turn.finish = "stopped";
  running = null;
  controller.abort();
  if (chat.turns.includes(turn)) save();
  show();
}

// Buttons and keys

function submit() {
  const text = prompt.value;
  if (!text.trim() || running) return;
  prompt.value = "";
  fit(prompt);
  send(text.trimEnd());
}

function exportChat() {
  const content = { format: "tulle-chat", exported: new Date().toISOString(), model: find("model").value, settings: settings.requestFields(), messages: messages(chat.turns.length), ...chat };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  const name = chat.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40);
  h("a", { href: url, download: `${name || "chat"}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Asks once more before everything goes, in place. */
function clearChats() {
  const button = find("clear");
  if (button.dataset.sure) {
    stop();
    store.removeChats();
    newChat();
  }
  const sure = !button.dataset.sure;
  if (sure) button.dataset.sure = "yes";
  else delete button.dataset.sure;
  button.textContent = sure ? "Really delete all chats?" : "Clear all chats";
  clearTimeout(clearChats.timer);
  if (sure) clearChats.timer = setTimeout(() => clearChats.back(), 5000);
}
clearChats.back = () => {
  delete find("clear").dataset.sure;
  find("clear").textContent = "Clear all chats";
};

/** The side panels: beside the conversation where there is room, else over it. */
function togglePanel(name, open) {
  const panel = find(name);
  const button = find(`show-${name}`);
  if (!open) {
    const inside = panel.contains(document.activeElement);
    panel.close();
    if (inside) button.focus();
  } else if ((name === "chats" ? wide : roomy).matches) {
    panel.setAttribute("open", ""); // unlike show(), it leaves the focus alone
  } else {
    panel.showModal();
  }
  button.setAttribute("aria-expanded", String(open));
}

function bindPanel(name) {
  const panel = find(name);
  const button = find(`show-${name}`);
  button.addEventListener("click", () => {
    togglePanel(name, !panel.open);
    if (panel.open) {
      for (const field of panel.querySelectorAll("textarea")) fit(field);
      if (name === "settings") panel.querySelector("textarea").focus();
    }
  });
  panel.addEventListener("close", () => button.setAttribute("aria-expanded", "false"));
  panel.querySelector("[data-close]").addEventListener("click", () => togglePanel(name, false));
  panel.addEventListener("click", (event) => event.target === panel && panel.matches(":modal") && panel.close());
}

function arrangePanels() {
  for (const name of ["chats", "settings"]) if (find(name).open) find(name).close();
  if (wide.matches) togglePanel("chats", true);
}

function dark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  find("theme").setAttribute("aria-pressed", String(dark()));
}

function toggleTheme() {
  const next = dark() ? "light" : "dark";
  delete document.documentElement.dataset.theme;
  // What the system has anyway is followed, not fixed.
  const followed = (dark() ? "dark" : "light") === next;
  if (!followed) document.documentElement.dataset.theme = next;
  store.saveTheme(followed ? null : next);
  showTheme();
}

function onKey(event) {
  const modal = document.querySelector("dialog:modal");
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape" && running && !modal && !event.isComposing) {
    event.preventDefault();
    stop();
    prompt.focus();
  }
}

prompt.addEventListener("input", () => fit(prompt));
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !prompt.value && !running) {
    const last = views.findLast((view) => view.edit);
    if (last) {
      event.preventDefault();
      last.edit();
    }
  }
});
find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
find("stop").addEventListener("click", () => {
  stop();
  prompt.focus();
});
find("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  store.saveApiKey(find("key-field").value.trim());
  if (!(await loadModels())) return;
  find("key-field").value = "";
  const last = chat.turns.at(-1);
  if (last?.error && !running) regenerate(last);
  else prompt.focus();
});
find("model").addEventListener("change", () => {
  store.saveModel(find("model").value);
  factsCame = showFacts();
});
find("new-chat").addEventListener("click", newChat);
find("export").addEventListener("click", exportChat);
find("clear").addEventListener("click", clearChats);
find("theme").addEventListener("click", toggleTheme);
find("latest").addEventListener("click", () => {
  following = true;
  follow();
});
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  find("latest").hidden = following || !chat.turns.length;
});
document.addEventListener("keydown", onKey);
window.addEventListener("pagehide", () => {
  if (!running) return;
  running.left = true;
  running.turn.finish = "left";
  save();
});
window.addEventListener("storage", showChats); // another tab's chats
new ResizeObserver(follow).observe(scroller); // a panel opens, the message grows, a phone's keyboard comes up
wide.addEventListener("change", arrangePanels);
roomy.addEventListener("change", () => find("settings").open && find("settings").close());
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

if (/Mac|iPhone|iPad/.test(navigator.platform)) find("new-chat-key").textContent = "⌘ K";
settings.build();
bindPanel("chats");
bindPanel("settings");
arrangePanels();
showTheme();
let remembered = null;
try {
  remembered = sessionStorage.getItem("tulle.open");
} catch {}
openChat(store.chats().find((one) => one.id === remembered) ?? (remembered ? null : store.chats()[0]) ?? store.newChat());
loadModels();
