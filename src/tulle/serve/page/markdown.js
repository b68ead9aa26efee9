// Markdown as language models write it, as DOM nodes. Text only ever becomes text nodes, so nothing in it can act.
//
// Blocks: paragraphs, headings, fenced code, lists, quotes, tables, rules. Inline: code, bold, italic, struck, links.
// A picture becomes a link, since showing it would be a request to elsewhere. HTML stays as it is written. Formulas
// (\( \), \[ \], $$ $$) are shown as written. Every step is linear in the text's length, whatever the text.

import { copyButton, h } from "./dom.js";

const DEPTH = 8; // of quotes and lists within each other; what is deeper is a paragraph
const OPEN = 60; // marks that wait for their other half; more are plain text
const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: (.*))?$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const QUOTE = /^ {0,3}> ?/;
const LINK_SCHEMES = new Set(["http:", "https:", "mailto:"]);

/** Shows a text that grows: blocks that did not change keep their nodes, so selections and focus in them last. */
export class Markdown {
  constructor(target) {
    this.target = target;
    this.shown = [];
  }

  show(text) {
    const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
    const found = blocks(lines, 0);
    const keys = found.map((block) => `${block.kind} ${lines.slice(block.start, block.end).join("\n")}`);
    let same = 0;
    while (same < keys.length && keys[same] === this.shown[same]) same++;
    while (this.target.childNodes.length > same) this.target.lastChild.remove();
    for (const block of found.slice(same)) this.target.append(build(block, 0));
    this.shown = keys;
  }
}

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;
const isRule = (line) => /^([-*_])\1\1+$/.test(line.replaceAll(" ", ""));

function cells(line) {
  const row = [""];
  const text = line.trim();
  for (let i = text.startsWith("|") ? 1 : 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") row[row.length - 1] += text[++i];
    else if (text[i] !== "|") row[row.length - 1] += text[i];
    else if (i < text.length - 1) row.push("");
  }
  return row.map((cell) => cell.trim());
}

function isTable(lines, i) {
  if (i + 1 >= lines.length || !lines[i].includes("|") || !lines[i + 1].includes("-")) return false;
  const rule = cells(lines[i + 1]);
  return rule.every((cell) => /^:?-+:?$/.test(cell)) && rule.length === cells(lines[i]).length;
}

/** Whether a paragraph ends before this line. */
function interrupts(line) {
  const item = ITEM.exec(line);
  // A number that happens to begin a line ("in\n1984. Then") begins no list.
  const list = item && item[3] && (item[2].length === 1 || /^1[.)]$/.test(item[2]));
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line) || list;
}

/** The blocks of lines: { kind, start, end, … }, with what `build` needs. */
function blocks(lines, depth) {
  const found = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const start = i;
    let match;
    if (blank(line)) {
      i++;
      continue;
    }
    if ((match = FENCE.exec(line))) {
      const [, margin, fence, language] = match;
      const content = [];
      for (i++; i < lines.length; i++) {
        const end = lines[i].trim();
        if (end.length >= fence.length && end[0] === fence[0] && end === fence[0].repeat(end.length)) break;
        content.push(lines[i].slice(Math.min(margin.length, indent(lines[i]))));
      }
      i++; // the closing fence
      found.push({ kind: "code", language: language.trim().split(" ")[0], content });
    } else if ((match = HEADING.exec(line))) {
      i++;
      found.push({ kind: "heading", level: match[1].length, text: (match[2] ?? "").replace(/ #+ *$/, "") });
    } else if (isRule(line)) {
      i++;
      found.push({ kind: "rule" });
    } else if (depth < DEPTH && QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i++;
      found.push({ kind: "quote", lines: lines.slice(start, i).map((quoted) => quoted.replace(QUOTE, "")) });
    } else if (depth < DEPTH && (match = ITEM.exec(line))) {
      const list = readList(lines, i, match);
      i = list.end;
      found.push(list);
    } else if (isTable(lines, i)) {
      i += 2;
      while (i < lines.length && lines[i].includes("|")) i++;
      found.push({ kind: "table", rows: [start, ...range(start + 2, i)].map((r) => cells(lines[r])), rule: cells(lines[start + 1]) });
    } else {
      i++;
      while (i < lines.length && !blank(lines[i]) && !(interrupts(lines[i]) && depth < DEPTH) && !isTable(lines, i)) i++;
      found.push({ kind: "paragraph", text: lines.slice(start, i).map((part) => part.trim()).join("\n") });
    }
    Object.assign(found[found.length - 1], { start, end: Math.min(i, lines.length) });
  }
  return found;
}

const range = (start, end) => Array.from({ length: Math.max(0, end - start) }, (_, i) => start + i);

/** The list that begins with line `i`. Models indent by two, three or four columns; all mean the same. */
function readList(lines, i, first) {
  let base = first[1].length;
  const ordered = first[2].length > 1;
  const items = [];
  let loose = false;
  let offset = 0;
  for (; i < lines.length; i++) {
    const line = lines[i];
    const item = ITEM.exec(line);
    if (blank(line)) {
      // Blank lines belong to the list only if it goes on behind them.
      let next = i + 1;
      while (next < lines.length && blank(lines[next])) next++;
      if (next === lines.length) break;
      const follows = ITEM.exec(lines[next]);
      if (indent(lines[next]) >= offset) items[items.length - 1].push("");
      else if (!follows || isRule(lines[next]) || (follows[1].length < base + 2 && follows[2].length > 1 !== ordered)) break;
      loose = true;
      i = next - 1;
    } else if (items.length && indent(line) >= offset) {
      items[items.length - 1].push(line.slice(offset));
    } else if (items.length && item && item[1].length >= base + 2) {
      items[items.length - 1].push(line.slice(item[1].length));
    } else if (item && !isRule(line) && item[2].length > 1 === ordered) {
      base = item[1].length;
      offset = item[1].length + item[2].length + (item[3].length > 4 ? 1 : item[3].length || 1);
      items.push([line.slice(offset)]);
    } else if (interrupts(line) || item || (items.length && blank(lines[i - 1]))) {
      break;
    } else {
      items[items.length - 1].push(line.trim());
    }
  }
  return { kind: "list", ordered, from: parseInt(first[2], 10), items, loose, end: i };
}

function build(block, depth) {
  switch (block.kind) {
    case "code": {
      const text = block.content.join("\n");
      return h("div", { class: "code" },
        h("div", { class: "code-head" }, h("span", {}, block.language || "code"), copyButton(() => text, "Copy this code")),
        h("pre", { tabindex: "0" }, h("code", {}, text)));
    }
    case "heading": // the page's own headings are h1 and h2
      return h(`h${Math.min(6, block.level + 2)}`, { class: `level-${block.level}` }, inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, blocks(block.lines, depth + 1).map((part) => build(part, depth + 1)));
    case "list":
      return h(block.ordered ? "ol" : "ul",
        { class: block.loose ? "loose" : "tight", start: block.ordered && block.from !== 1 ? String(block.from) : false },
        block.items.map((item) => h("li", {}, blocks(item, depth + 1).map((part) => build(part, depth + 1)))));
    case "table": {
      const side = (column) => {
        const rule = block.rule[column] ?? "";
        if (!rule.endsWith(":")) return false;
        return rule.startsWith(":") ? "center" : "right";
      };
      const row = (tag, texts) => h("tr", {}, block.rule.map((_, column) => h(tag, { class: side(column) }, inline(texts[column] ?? ""))));
      return h("div", { class: "table", tabindex: "0" },
        h("table", {}, h("thead", {}, row("th", block.rows[0])), h("tbody", {}, block.rows.slice(1).map((texts) => row("td", texts)))));
    }
    default:
      return h("p", {}, inline(block.text));
  }
}

function move(from, to) {
  for (const node of from) to.push(node);
}

const SPACE = /\s/;
const WORD = /[\p{L}\p{N}]/u;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const FORMULAS = [["\\(", "\\)"], ["\\[", "\\]"], ["$$", "$$"]];

/** The address, if a link may lead there; null: it stays text, as what is not absolute and has no meaning here. */
function address(text) {
  if (!/^(https?|mailto):/i.test(text)) return null;
  try {
    const url = new URL(text);
    return LINK_SCHEMES.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const link = (href, ...children) => h("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);

/** Nodes and strings of a text without blocks. */
export function inline(text) {
  const stack = [{ mark: "", children: [] }]; // what is open, outermost first
  const unclosed = new Set(); // runs of backticks and formulas whose end was sought in vain
  let plain = "";
  let paren = 0; // the next ")"; it is sought again only when it is passed
  let i = 0;

  const top = () => stack[stack.length - 1];
  const flush = () => {
    if (plain) top().children.push(plain);
    plain = "";
  };
  const add = (node) => {
    flush();
    top().children.push(node);
  };
  const unwind = (level) => { // what is open above this level never closed: plain text
    flush();
    while (stack.length - 1 > level) {
      const frame = stack.pop();
      top().children.push(frame.mark);
      move(frame.children, top().children);
    }
  };
  const open = (mark) => {
    flush();
    stack.push({ mark, children: [], dead: false });
  };
  const lastOpen = (test) => {
    let level = stack.length - 1;
    while (level > 0 && !test(stack[level])) level--;
    return level;
  };

  const emphasis = () => {
    const char = text[i];
    let end = i;
    while (text[end] === char) end++;
    let left = end - i;
    const before = text[i - 1] ?? " ";
    const after = text[end] ?? " ";
    const opens = !SPACE.test(after) && !(char === "_" && WORD.test(before));
    const closes = !SPACE.test(before) && !(char === "_" && WORD.test(after));
    i = end;
    while (closes && left > 0) {
      const level = lastOpen((frame) => frame.mark[0] === char && frame.mark.length <= left);
      if (level === 0) break;
      unwind(level);
      const frame = stack.pop();
      left -= frame.mark.length;
      add(h(char === "~" ? "s" : frame.mark.length === 2 ? "strong" : "em", {}, frame.children));
    }
    while (opens && left > 0 && stack.length < OPEN && !(char === "~" && left === 1)) {
      const size = Math.min(2, left);
      open(char.repeat(size));
      left -= size;
    }
    plain += char.repeat(left);
  };

  const target = () => {
    if (text[i] !== "(") return null;
    if (paren >= 0 && paren <= i) paren = text.indexOf(")", i);
    const limit = Math.min(text.length, i + 2000);
    return paren > i && paren < limit ? destination(text, i + 1, limit) : null;
  };

  const closeBracket = () => {
    i++;
    const level = lastOpen((frame) => frame.mark === "[" || frame.mark === "![");
    if (level === 0) {
      plain += "]";
      return;
    }
    unwind(level);
    const frame = stack.pop();
    const found = frame.dead ? null : target();
    const href = found && address(found.url);
    if (!href) {
      // Without a target, or with one that a link may not have, it stays as it is written.
      add(frame.mark);
      move(frame.children, top().children);
      top().children.push("]");
      return;
    }
    i = found.end;
    add(frame.mark === "![" ? link(href, "Picture: ", frame.children) : link(href, frame.children));
    for (const outer of stack) if (outer.mark === "[") outer.dead = true; // no links within links
  };

  const between = (begin, end) => { // the position behind `end`, or 0
    if (unclosed.has(begin)) return 0;
    const found = text.indexOf(end, i + begin.length);
    if (found < 0) unclosed.add(begin);
    return found < 0 ? 0 : found + end.length;
  };

  const codeSpan = () => {
    let end = i;
    while (text[end] === "`") end++;
    const ticks = text.slice(i, end);
    let close = unclosed.has(ticks) ? -1 : text.indexOf(ticks, end);
    while (close >= 0 && text[close + ticks.length] === "`") {
      let next = close;
      while (text[next] === "`") next++;
      close = text.indexOf(ticks, next);
    }
    if (close < 0) {
      unclosed.add(ticks);
      plain += ticks;
      i = end;
      return;
    }
    let content = text.slice(end, close).replaceAll("\n", " ");
    if (content.startsWith(" ") && content.endsWith(" ") && content.trim()) content = content.slice(1, -1);
    add(h("code", {}, content));
    i = close + ticks.length;
  };

  const angleLink = () => {
    const found = /<(https?:\/\/[^\s<>]{1,2000})>/y;
    found.lastIndex = i;
    const url = found.exec(text)?.[1];
    const href = url && address(url);
    if (!href) return false;
    add(link(href, url));
    i = found.lastIndex;
    return true;
  };

  const bareLink = () => {
    const found = /https?:\/\/[^\s<>"'`|]{1,2000}/y;
    found.lastIndex = i;
    let url = found.exec(text)?.[0];
    if (!url || WORD.test(text[i - 1] ?? " ")) return false;
    while (/[.,;:!?*_~\])}]$/.test(url) && !(url.endsWith(")") && url.includes("("))) url = url.slice(0, -1);
    const href = address(url);
    if (!href) return false;
    add(link(href, url));
    i += url.length;
    return true;
  };

  while (i < text.length) {
    const char = text[i];
    const formula = (char === "\\" || char === "$") && FORMULAS.find(([begin]) => text.startsWith(begin, i));
    const formulaEnd = formula ? between(...formula) : 0;
    if (formulaEnd) {
      add(h("span", { class: "formula" }, text.slice(i, formulaEnd)));
      i = formulaEnd;
    } else if (char === "\\" && PUNCTUATION.test(text[i + 1] ?? " ")) {
      plain += text[i + 1];
      i += 2;
    } else if (char === "`") {
      codeSpan();
    } else if (char === "*" || char === "_" || char === "~") {
      emphasis();
    } else if (char === "[" || (char === "!" && text[i + 1] === "[")) {
      const mark = char === "[" ? "[" : "![";
      if (stack.length < OPEN) open(mark);
      else plain += mark;
      i += mark.length;
    } else if (char === "]") {
      closeBracket();
    } else if (char === "\n") {
      add(h("br"));
      i++;
    } else if (char === "<" && /^<br ?\/?>/i.test(text.slice(i, i + 6))) {
      add(h("br"));
      i = text.indexOf(">", i) + 1;
    } else if (!(char === "h" && bareLink()) && !(char === "<" && angleLink())) {
      plain += char;
      i++;
    }
  }
  unwind(0);
  return stack[0].children;
}

/** `url)` or `url "title")` from position `i`: { url, end }, or null; it ends before `limit`. */
function destination(text, i, limit) {
  let depth = 0;
  let end = i;
  for (; end < limit; end++) {
    if (SPACE.test(text[end])) break;
    if (text[end] === "(") depth++;
    else if (text[end] === ")" && depth-- === 0) break;
  }
  const url = text.slice(i, end).replace(/^<|>$/g, "");
  if (end < limit && text[end] !== ")") {
    // A title is read over.
    const close = text.indexOf(")", end);
    if (close < 0 || close > limit || !/^["']/.test(text.slice(end, close).trim())) return null;
    end = close;
  }
  return end < limit && url ? { url, end: end + 1 } : null;
}
