// The settings' form, and what of it goes into a request. An empty field is not sent: the server's default holds.

import { find, fit, h } from "./dom.js";
import * as store from "./store.js";

// [name in the request, label, what it does, lowest, highest, step]
const NUMBERS = [
  ["temperature", "Temperature", "0: always the likeliest token; higher: more varied", 0, 5, "any"],
  ["top_p", "Top p", "Keeps the likeliest tokens up to this total probability", 0, 1, "any"],
  ["top_k", "Top k", "Keeps so many of the likeliest tokens; 0: all", 0, 1e6, 1],
  ["min_p", "Min p", "Drops tokens below this fraction of the likeliest one's probability", 0, 1, "any"],
  ["max_tokens", "Max tokens", "Length of an answer, at most", 1, 1e7, 1],
  ["seed", "Seed", "The same seed gives the same answer", 0, 2 ** 53 - 1, 1],
  ["presence_penalty", "Presence penalty", "Lowers tokens that have occurred", -2, 2, "any"],
  ["frequency_penalty", "Frequency penalty", "Lowers tokens by how often they occurred", -2, 2, "any"],
  ["repetition_penalty", "Repetition penalty", "Divides the logits of earlier tokens; 1: off", 0.01, 10, "any"],
];

let held = {};
let shownDefaults = {};

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** What is wrong with the text of a number's field; "": nothing. */
function numberFault(field, [, , , lowest, highest, step]) {
  if (field.validity.badInput) return "Expected a number.";
  if (field.value === "") return "";
  const value = Number(field.value);
  if (step === 1 && !Number.isInteger(value)) return "Expected a whole number.";
  if (!(value >= lowest && value <= highest)) return `Expected ${lowest} to ${highest.toLocaleString("en")}.`;
  return "";
}

function toolsFault(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    if (Array.isArray(tools) && tools.every(isObject)) return "";
  } catch (error) {
    return `Expected JSON: ${error.message}`;
  }
  return "Expected a list of tools: [{ \"type\": \"function\", … }].";
}

function say(field, fault, hint) {
  const note = find(`${field.id}-note`);
  field.setAttribute("aria-invalid", String(Boolean(fault)));
  note.textContent = fault || hint;
  note.classList.toggle("fault", Boolean(fault));
}

/** Fills the form; settings are kept as they are typed, faulty ones are not. */
export function build() {
  const saved = store.settings();
  held = isObject(saved) ? saved : {};
  const keep = (name, value) => {
    if (value === "" || value === null) delete held[name];
    else held[name] = value;
    store.saveSettings(held);
  };

  const system = h("textarea", { id: "system", rows: "3", placeholder: "None", oninput: () => {
    fit(system);
    keep("system", system.value);
  } });
  system.value = held.system ?? "";

  const numbers = NUMBERS.map((spec) => {
    const [name, label, hint, lowest, highest, step] = spec;
    const id = `set-${name}`;
    const field = h("input", {
      id, type: "number", inputmode: step === 1 && lowest >= 0 ? "numeric" : "decimal",
      min: String(lowest), max: String(highest), step: "any", placeholder: "default", "aria-describedby": `${id}-note`,
      oninput: () => {
        const fault = numberFault(field, spec);
        say(field, fault, hint);
        if (!fault) keep(name, field.value === "" ? null : Number(field.value));
      },
    });
    if (typeof held[name] === "number") field.value = String(held[name]);
    return h("div", { class: "setting" }, h("label", { for: id }, label), field, h("p", { class: "note", id: `${id}-note` }, hint));
  });

  const toolsHint = "Functions the model may call, as JSON. You answer its calls yourself.";
  const tools = h("textarea", { id: "tools", rows: "4", spellcheck: "false", class: "mono", "aria-describedby": "tools-note",
    placeholder: "[{ \"type\": \"function\", \"function\": … }]", oninput: () => {
      fit(tools);
      const fault = toolsFault(tools.value);
      say(tools, fault, toolsHint);
      if (!fault) keep("tools", tools.value);
    } });
  tools.value = held.tools ?? "";

  find("settings-form").replaceChildren(
    h("label", { for: "system" }, "System prompt"), system,
    h("fieldset", {}, h("legend", {}, "Sampling"), ...numbers),
    h("details", { open: Boolean(held.tools) }, h("summary", {}, "Tools"), h("label", { for: "tools", class: "unseen" }, "Tools"),
      tools, h("p", { class: "note", id: "tools-note" }, toolsHint)),
    h("button", { type: "button", class: "quiet", id: "defaults", onclick: () => {
      held = {};
      store.saveSettings(held);
      build();
      showDefaults(shownDefaults);
      find("defaults").focus();
    } }, "Back to defaults"),
  );
}

/** What holds where a field is empty, as far as the server says it. */
export function showDefaults(defaults) {
  for (const [name] of NUMBERS) {
    const value = defaults[name];
    find(`set-${name}`).placeholder = typeof value === "number" ? String(Number(value.toPrecision(4))) : "default";
  }
  shownDefaults = defaults;
}

export const systemPrompt = () => (typeof held.system === "string" ? held.system.trim() : "");

/** The settings' part of a request's body. */
export function requestFields() {
  const fields = {};
  for (const [name] of NUMBERS) if (typeof held[name] === "number") fields[name] = held[name];
  if (typeof held.tools === "string" && held.tools.trim() && !toolsFault(held.tools)) fields.tools = JSON.parse(held.tools);
  return fields;
}
