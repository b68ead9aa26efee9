// The server's routes. Every address is relative: the page also works below a path of a reverse proxy.

import { apiKey } from "./store.js";

/** What went wrong, in one line: what happened, what to try. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const sentence = (text) => {
  const said = String(text).trim().replace(/\s+/g, " ");
  const line = said.charAt(0).toUpperCase() + said.slice(1);
  return /[.!?…]$/.test(line) ? line : `${line}.`;
};

/** Of an answer that is not 2xx. OpenAI's shape is { error: { message } }. */
async function failure(response) {
  const text = await response.text().catch(() => "");
  let said = "";
  try {
    const body = JSON.parse(text);
    said = body?.error?.message ?? body?.detail ?? body?.message ?? "";
    if (typeof said !== "string") said = JSON.stringify(said);
  } catch {
    said = text.trimStart().startsWith("<") ? "" : text.slice(0, 300);
  }
  const { status } = response;
  const after = Number(response.headers.get("retry-after"));
  if (status === 401)
    return new Failure(apiKey() ? "The server does not know this API key. Enter another one below." : "The server wants an API key. Enter it below.", status);
  const what = said ? sentence(said) : `The server answered ${status} ${response.statusText}`.trim() + ".";
  const wait = after > 0 ? `in ${after} s` : "in a moment";
  const hints = {
    400: "Change the settings or the message, then try again.",
    404: "Choose another model above, or reload the page.",
    413: "Shorten the message or start a new chat.",
    422: "Change the settings or the message, then try again.",
    429: `Try again ${wait}.`,
    503: `Try again ${wait}.`,
  };
  return new Failure(`${what} ${hints[status] ?? "Try again; if it happens again, look at the server's log."}`, status);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("No answer from the server. See that “tulle serve” runs, then try again.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function json(path) {
  const response = await request(path);
  try {
    return await response.json();
  } catch {
    throw new Failure("The server's answer is not JSON. See that this address is Tulle's, then reload.");
  }
}

/** The names of the models. */
export async function models() {
  const { data } = await json("v1/models");
  return Array.isArray(data) ? data.map((model) => String(model.id)) : [];
}

/** Facts about a model, which is loaded for it, or null where the server has none. */
export async function info(model) {
  try {
    return await json(`v1/tulle/info?model=${encodeURIComponent(model)}`);
  } catch {
    return null; // the facts are a courtesy; chatting tells what is wrong
  }
}

/** The data of server-sent events, as they arrive. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // comments keep the connection open; other fields say nothing here
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * A streamed completion, of a chat (`messages`) or of a text (`prompt`): yields its chunks, then returns how many parts could not be read.
 * Throws Failure, or AbortError when `signal` stops it.
 */
export async function* complete(body, signal) {
  const response = await request(body.messages ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream"))
    throw new Failure("The server's answer is not a stream. See that this address is Tulle's, then try again.");
  let unread = 0;
  let ended = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return unread;
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch {
        unread++;
        continue;
      }
      if (chunk?.error) throw new Failure(`${sentence(chunk.error.message ?? chunk.error)} Try again.`);
      ended ||= Boolean(chunk?.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("The connection broke off. See that “tulle serve” runs, then try again.");
  }
  if (!ended) throw new Failure("The answer broke off before its end. Try again.");
  return unread;
}
