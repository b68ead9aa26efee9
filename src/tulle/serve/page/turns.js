// What a chat's turns look like.

import { copyButton, fit, h } from "./dom.js";
import { Markdown } from "./markdown.js";

const LABELS = { stopped: "stopped", left: "broke off when the page was left", length: "reached the limit of tokens; raise Max tokens in the settings for more" };

const seconds = (value) => `${value < 9.95 ? value.toFixed(value < 0.995 ? 2 : 1) : Math.round(value)} s`;
const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

/** "31 tokens/s · first token 0.12 s · …", from what is known. */
function statsText({ stats = {}, finish, model }, several) {
  const parts = [];
  if (stats.rate) parts.push(`${rate(stats.rate)} tokens/s`);
  if (stats.first !== undefined) parts.push(`first token ${seconds(stats.first)}`);
  if (stats.tokens) parts.push(`${stats.tokens.toLocaleString("en")} ${stats.tokens === 1 ? "token" : "tokens"}`);
  if (stats.prompt) {
    const cached = stats.cached ? `, ${stats.cached.toLocaleString("en")} from the cache` : "";
    parts.push(`prompt ${stats.prompt.toLocaleString("en")}${cached}`);
  }
  if (several && model) parts.push(model);
  if (stats.unread) parts.push(`${stats.unread} unreadable ${stats.unread === 1 ? "part" : "parts"} left out`);
  if (LABELS[finish]) parts.push(LABELS[finish]);
  return parts.join(" · ");
}

/** The arguments of a call, set out if they are JSON. */
function argumentsText(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still arriving, or not JSON: as the model wrote it
  }
}

export class UserView {
  /** `act.edit(turn, text)`, `act.cancelled()`. */
  constructor(turn, act) {
    this.turn = turn;
    this.act = act;
    this.text = h("div", { class: "bubble" }, turn.text);
    this.actions = h("div", { class: "actions" },
      copyButton(() => turn.text, "Copy this message"),
      h("button", { type: "button", class: "quiet", "aria-label": "Edit this message", onclick: () => this.edit() }, "Edit"));
    this.element = h("article", { class: "turn user", "aria-label": "You" }, this.text, this.actions);
  }

  update() {}

  edit() {
    if (this.form) {
      this.form.querySelector("textarea").focus();
      return;
    }
    const field = h("textarea", { rows: "1", "aria-label": "Edit your message", oninput: () => fit(field), onkeydown: (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        event.preventDefault();
        this.endEdit();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    } });
    field.value = this.turn.text;
    this.form = h("form", { class: "edit", onsubmit: (event) => {
      event.preventDefault();
      if (field.value.trim()) this.act.edit(this.turn, field.value);
    } }, field, h("div", { class: "row" },
      h("p", { class: "note" }, "What follows is replaced."),
      h("button", { type: "button", class: "quiet", onclick: () => this.endEdit() }, "Cancel"),
      h("button", { type: "submit", class: "primary" }, "Send")));
    this.element.classList.add("editing");
    this.element.append(this.form);
    fit(field);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
    this.form.scrollIntoView({ block: "nearest" });
  }

  endEdit() {
    this.form?.remove();
    this.form = null;
    this.element.classList.remove("editing");
    this.act.cancelled();
  }
}

export class AnswerView {
  /** `act.regenerate(turn)`, `act.results(turn, texts)`. */
  constructor(turn, act) {
    this.turn = turn;
    this.act = act;
    this.thoughts = h("div", { class: "prose" });
    this.thoughtsLine = h("summary", {}, "Thinking");
    this.reasoning = h("details", { class: "reasoning", hidden: true }, this.thoughtsLine, this.thoughts);
    this.prose = h("div", { class: "prose" });
    this.calls = h("div", { class: "calls" });
    this.error = h("p", { class: "error", hidden: true });
    this.stats = h("p", { class: "stats" });
    this.again = h("button", { type: "button", class: "quiet", onclick: () => act.regenerate(turn) }, "Regenerate");
    this.actions = h("div", { class: "actions" }, copyButton(() => turn.text, "Copy this answer"), this.again);
    this.element = h("article", { class: "turn answer", "aria-label": "Answer" },
      this.reasoning, this.prose, this.calls, this.error, h("div", { class: "below" }, this.stats, this.actions));
    this.markdown = new Markdown(this.prose);
    this.thoughtsMarkdown = new Markdown(this.thoughts);
    this.reasoning.addEventListener("toggle", () => this.showThoughts());
  }

  /** `running`: the answer is arriving; `last`: nothing follows it; `several`: there are several models. */
  update({ running, last, several }) {
    const { turn } = this;
    const { text, reasoning, error, stats } = turn;
    this.element.classList.toggle("running", running);
    this.element.classList.toggle("waiting", running && !text && !reasoning && !turn.calls?.length);
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      const done = !running || text;
      const thought = stats?.thought >= 0.05 ? ` for ${seconds(stats.thought)}` : "";
      this.thoughtsLine.textContent = done ? `Thought${thought}` : "Thinking…";
      this.showThoughts();
    }
    this.markdown.show(text);
    this.showCalls(!running && last);
    this.error.hidden = !error;
    this.error.textContent = error ?? "";
    this.again.textContent = error ? "Try again" : "Regenerate";
    this.again.setAttribute("aria-label", error ? "Try again" : "Regenerate this answer");
    this.actions.hidden = running;
    this.actions.firstChild.hidden = !text;
    this.stats.textContent = statsText(turn, several);
  }

  showThoughts() {
    // Closed, it costs nothing.
    if (this.reasoning.open) this.thoughtsMarkdown.show(this.turn.reasoning ?? "");
  }

  showCalls(answerable) {
    const { turn } = this;
    const calls = turn.calls ?? [];
    const key = JSON.stringify([calls, answerable]);
    if (key === this.shownCalls) return; // a result that is being written stays
    this.shownCalls = key;
    const fields = calls.map((call) => h("textarea", { rows: "1", class: "mono", "aria-label": `Result of ${call.name}`, placeholder: "Result", oninput: (event) => fit(event.target) }));
    const parts = calls.map((call, i) => h("div", { class: "call" },
      h("p", { class: "call-name" }, "Calls ", h("code", {}, call.name || "…")),
      h("pre", { tabindex: "0" }, argumentsText(call.arguments)),
      answerable && fields[i]));
    if (answerable && calls.length)
      parts.push(h("button", { type: "submit", class: "primary" }, calls.length > 1 ? "Send the results" : "Send the result"));
    this.calls.replaceChildren(h("form", { hidden: !calls.length, onsubmit: (event) => {
      event.preventDefault();
      this.act.results(turn, fields.map((field) => field.value));
    } }, ...parts));
  }
}

export class ToolView {
  constructor(turn) {
    this.element = h("article", { class: "turn tool", "aria-label": `Result of ${turn.name}` },
      h("p", { class: "call-name" }, "Result of ", h("code", {}, turn.name)), h("pre", { tabindex: "0" }, turn.text || "(empty)"));
  }

  update() {}
}
