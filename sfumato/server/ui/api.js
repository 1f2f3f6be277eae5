// The server: JSON requests, and server-sent events over fetch (an EventSource cannot post, nor send a key).

import { forget, load, save } from "./store.js";

/** What went wrong, in words that can be shown. `kind`: offline, key, busy, worker, broken, refused or failed. */
export class ApiError extends Error {
  constructor(kind, message, { param = null, wait = null, details = [] } = {}) {
    super(message);
    this.name = "ApiError";
    this.kind = kind;
    this.param = param;
    this.wait = wait;
    this.details = details; // [{loc, msg}] of System One's route: where in the request it is wrong
  }
}

/** The key that is kept; no other could stand in a header. */
export function key() {
  return [load("key", "", "sessionStorage"), load("key", "")].find((found) => /^[!-~]+$/.test(found)) ?? "";
}

export function setKey(value, isRemembered) {
  forget("key", "sessionStorage");
  forget("key");
  if (value) save("key", value, isRemembered ? "localStorage" : "sessionStorage");
}

export const isKeyRemembered = () => Boolean(load("key", ""));

function headers(hasBody) {
  const found = {};
  if (hasBody) found["Content-Type"] = "application/json";
  if (key()) found.Authorization = `Bearer ${key()}`;
  return found;
}

function kindOf(status, error) {
  if (status === 401) return "key";
  if (error.type === "worker_error") return "worker";
  if (status === 503 || status === 429 || error.type === "overloaded_error") return "busy";
  return status >= 500 ? "failed" : "refused";
}

async function send(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: headers(body !== undefined),
      body: body === undefined || typeof body === "string" ? body : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", `Nothing answers at ${location.host}.`);
  }
  if (response.ok) return response;
  const error = await response.json().then(errorOf).catch(() => ({}));
  const message = error.message || `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  throw new ApiError(kindOf(response.status, error), message, {
    param: error.param ?? null,
    wait: response.headers.get("Retry-After"),
    details: error.details,
  });
}

/** An error's message, type and details: OpenAI's form, or one of System One's two. */
function errorOf({ error, detail }) {
  if (!detail) return error ?? {};
  if (!Array.isArray(detail)) return { message: detail.message, type: detail.error_type };
  const details = detail.filter((one) => Array.isArray(one?.loc) && typeof one.msg === "string");
  return { message: details.map(({ loc, msg }) => (msg.includes(loc.at(-1)) ? msg : `${loc.slice(1).join(".")}: ${msg}`)).join(" "), details };
}

export async function get(path) {
  return (await send(path)).json();
}

/** The answer to a body that is JSON already. */
export async function post(path, body, signal) {
  const response = await send(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("broken", "The connection broke off before the answer ended.");
  }
}

/** The data objects of a stream, up to its [DONE]. An error in the stream, or an end before [DONE], is thrown. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("broken", "The connection ended before the answer did.");
      held += value;
      const events = held.split(/\r?\n\r?\n/);
      held = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const found = JSON.parse(data);
        if (found.error) {
          const kind = kindOf(0, found.error);
          throw new ApiError(kind === "refused" ? "broken" : kind, found.error.message, { param: found.error.param ?? null });
        }
        yield found;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("broken", "The connection broke off before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
