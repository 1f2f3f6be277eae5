// Chat: the conversation, the answer under way, and the shelf of chats.

import { stream } from "./api.js";
import { Gauge, drawPieces } from "./canvas.js";
import { announce, byId, el, showText } from "./dom.js";
import * as history from "./history.js";
import * as settings from "./settings.js";
import { keepTyped, load, save } from "./store.js";
import { trouble } from "./trouble.js";

let chat;
let running = null;
const gauges = new WeakMap(); // message -> Gauge: replays last as long as the page

// ---- what is sent ----------------------------------------------------------------------------------------------

function toSend(messages) {
  const plain = messages.map(({ role, content, tool_calls, tool_call_id }) => ({
    role,
    content: content || (tool_calls ? null : content),
    ...(tool_calls ? { tool_calls: tool_calls.map((call) => ({ id: call.id, type: "function", function: call.function })) } : {}),
    ...(tool_call_id ? { tool_call_id } : {}),
  })).filter((message) => message.role !== "assistant" || message.content || message.tool_calls);
  return settings.system() ? [{ role: "system", content: settings.system() }, ...plain] : plain;
}

async function answer() {
  if (running) return;
  const mine = chat;
  const message = { role: "assistant", content: "", thought: "" };
  const view = new Answer(message);
  const control = new AbortController();
  running = control;
  log().querySelector(":scope > .trouble")?.remove();
  log().append(view.root);
  view.begin();
  showRunning();
  announce("The model is writing.");
  let failure = null;
  try {
    const tools = settings.tools();
    const body = { ...settings.request(), messages: toSend(mine.messages), stream_options: { include_usage: true }, ...(tools ? { tools } : {}) };
    for await (const chunk of stream("v1/chat/completions", body, control.signal)) {
      if (chunk.draft) view.draft(chunk.draft);
      const choice = chunk.choices?.[0];
      if (choice?.delta) view.commit(choice.delta);
      if (choice?.finish_reason === "length") message.note = "Cut off at the token limit.";
      if (chunk.usage) message.usage = chunk.usage;
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "Stopped.";
    else failure = error;
  }
  if (running === control) running = null;
  document.dispatchEvent(new Event("sfumato:look"));
  const isEmpty = !message.content && !message.thought && !message.tool_calls;
  if (failure && !isEmpty) message.note = "Broke off here.";
  if (isEmpty && !failure) message.note ??= "The answer is empty.";
  if (!isEmpty || !failure) mine.messages.push(message);
  if (history.find(mine.id)) history.keep(mine); // else it was deleted meanwhile
  view.end();
  if (mine === chat) {
    if (isEmpty && failure) view.root.remove();
    if (failure) log().append(trouble(failure, retry));
    else {
      const { completion_tokens: tokens, steps } = message.usage ?? {};
      announce(message.note || (steps ? `The answer is complete: ${tokens} tokens in ${steps} steps.` : "The answer is complete."));
    }
    if (failure) toEnd();
    else follow();
  }
  showRunning();
  showShelf();
  markLast();
}

/** Answer the last message of the user (or the last results) anew. */
function retry() {
  while (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  show();
  answer();
  enter();
}

// ---- one answer ------------------------------------------------------------------------------------------------

class Answer {
  constructor(message) {
    this.message = message;
    this.shown = "";
    this.thought = el("div", { class: "plain" });
    this.fold = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thought"), this.thought);
    this.text = el("div", { class: "committed" });
    this.canvas = el("div", { class: "canvas", "aria-hidden": "true", hidden: true });
    this.calls = el("div", { class: "calls" });
    this.note = el("p", { class: "note", hidden: true });
    this.copy = el("button", { class: "quiet", type: "button", onclick: () => this.#copy() }, "Copy");
    this.again = el("button", { class: "quiet regenerate", type: "button", onclick: retry }, "Regenerate");
    this.actions = el("div", { class: "row actions", hidden: true }, this.copy, this.again);
    this.root = el("article", { class: "turn answer", "aria-label": "Answer" },
      el("div", { class: "words" }, this.fold, this.text, this.canvas, this.calls, this.note, this.actions));
    this.waiting = el("p", { class: "waiting" }, "…");
  }

  /** An answer that was there before. */
  static of(message) {
    const view = new Answer(message);
    const gauge = gauges.get(message);
    if (gauge) {
      view.#hang(gauge);
      gauge.show = (frame) => view.#show(frame);
    } else if (message.usage) {
      view.#hang(new Gauge(() => {}));
      view.gauge.figures(message.usage);
    }
    view.#show(null);
    view.#ended();
    return view;
  }

  begin() {
    this.root.classList.add("live");
    this.text.append(this.waiting);
  }

  draft(draft) {
    if (draft.index) return;
    this.waiting.remove();
    if (!this.gauge) this.#hang(new Gauge((frame) => this.#show(frame)));
    this.gauge.add(draft, this.message.content.length);
    follow();
  }

  commit(delta) {
    this.waiting.remove();
    if (delta.content) this.message.content += delta.content;
    if (delta.reasoning_content) this.message.thought += delta.reasoning_content;
    for (const call of delta.tool_calls ?? []) (this.message.tool_calls ??= []).push({ id: call.id, function: call.function });
    if ((delta.content || delta.reasoning_content || delta.tool_calls) && (!this.gauge || this.gauge.isAtEnd())) {
      this.#show(null);
      follow();
    }
  }

  end() {
    this.waiting.remove();
    this.root.classList.remove("live");
    if (this.gauge) this.gauge.finish(this.message.usage);
    else if (this.message.usage) {
      this.#hang(new Gauge(() => {}));
      this.gauge.figures(this.message.usage);
    }
    this.#show(null);
    this.#ended();
  }

  #hang(gauge) {
    this.gauge = gauge;
    gauges.set(this.message, gauge);
    this.root.append(gauge.root);
  }

  #ended() {
    this.actions.hidden = false;
    this.note.textContent = this.message.note ?? "";
    this.note.hidden = !this.message.note;
    const calls = this.message.tool_calls ?? [];
    if (calls.length) this.calls.replaceChildren(...calls.map(showCall), ...(this.message === chat.messages.at(-1) ? [resultsForm(calls)] : []));
  }

  /** Committed text, and below it the canvas of that step; null: all that is committed, and no canvas. */
  #show(frame) {
    const { content, thought } = this.message;
    const committed = frame ? content.slice(0, frame.before) : content;
    if (committed !== this.shown) showText(this.text, committed);
    this.shown = committed;
    this.canvas.hidden = !frame;
    if (frame) drawPieces(this.canvas, frame);
    this.fold.hidden = !thought;
    this.thought.textContent = thought ?? "";
    if (!this.calls.querySelector("form")) this.calls.replaceChildren(...(frame ? [] : (this.message.tool_calls ?? []).map(showCall)));
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.message.content);
      this.copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.text);
      this.copy.textContent = "Selected; press Ctrl C";
    }
    setTimeout(() => (this.copy.textContent = "Copy"), 2500);
  }
}

function showCall(call) {
  let shown = call.function.arguments;
  try {
    shown = JSON.stringify(JSON.parse(shown), null, 2);
  } catch {
    // As it was written.
  }
  return el("div", { class: "call" }, el("p", {}, "Calls ", el("code", {}, call.function.name)), el("pre", { tabindex: "0" }, shown));
}

/** Fields for what the called functions gave. */
function resultsForm(calls) {
  const fields = calls.map((call) => {
    const name = `Result of ${call.function.name}`;
    return el("textarea", { rows: 2, "aria-label": name, placeholder: name });
  });
  const submit = (event) => {
    event.preventDefault();
    if (running) return;
    calls.forEach((call, at) => chat.messages.push({ role: "tool", tool_call_id: call.id, name: call.function.name, content: fields[at].value }));
    history.keep(chat);
    show();
    answer();
  };
  const send = el("button", { type: "submit" }, calls.length > 1 ? "Send the results" : "Send the result");
  return el("form", { class: "results", onsubmit: submit }, ...fields, send);
}

// ---- the conversation ------------------------------------------------------------------------------------------

const log = () => byId("log");

function userTurn(message) {
  if (message.role === "tool") {
    return el("article", { class: "turn result", "aria-label": `Result of ${message.name}` },
      el("p", {}, "Result of ", el("code", {}, message.name)), el("pre", { tabindex: "0" }, message.content));
  }
  return el("article", { class: "turn said", "aria-label": "You" }, el("p", { class: "plain" }, message.content));
}

const EMPTY = "Ask something. The answer does not come word by word: a whole canvas of it clears at once, from what is certain to what is not.";

function show() {
  const turns = chat.messages.map((message) => (message.role === "assistant" ? Answer.of(message).root : userTurn(message)));
  const empty = el("div", { class: "empty" }, el("h1", {}, "Out of the smoke"), el("p", {}, EMPTY));
  log().replaceChildren(...(turns.length ? turns : [empty]));
  const last = chat.messages.at(-1);
  if (last && last.role !== "assistant" && !running) {
    const button = el("button", { type: "button", onclick: retry }, "Answer it");
    log().append(el("div", { class: "trouble unanswered" }, el("p", {}, "This message has no answer yet."), button));
  }
  markLast();
}

/** Only the last answer can be made anew. */
function markLast() {
  const buttons = [...log().querySelectorAll(".regenerate")];
  buttons.forEach((button, at) => (button.hidden = at < buttons.length - 1 || Boolean(running)));
}

/** Keep the end in view, unless the reader has scrolled away from it. */
function follow() {
  const page = document.scrollingElement;
  if (page.scrollHeight - page.scrollTop - innerHeight < 240) toEnd();
}

const toEnd = () => (document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight);

function showRunning() {
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
}

function open(found) {
  running?.abort();
  running = null;
  chat = found;
  save("chat", chat.id);
  show();
  showShelf();
  showRunning();
}

// ---- the shelf -------------------------------------------------------------------------------------------------

function showShelf() {
  const chats = history.list();
  byId("chats").replaceChildren(...chats.map(shelfItem));
  byId("delete-all").hidden = chats.length === 0;
}

function shelfItem(one) {
  const title = history.titleOf(one);
  const item = el("li", { class: one.id === chat.id ? "current" : null });
  const show = () => {
    open(history.find(one.id) ?? history.fresh());
    enter();
  };
  const rename = () => {
    const field = el("input", { value: title, "aria-label": "New name", maxlength: 120 });
    let isOver = false;
    const close = (isKept) => {
      if (isOver) return;
      isOver = true;
      if (isKept && field.value.trim()) {
        history.rename(one.id, field.value.trim());
        if (one.id === chat.id) chat.title = field.value.trim();
      }
      showShelf();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") close(event.key === "Enter");
    });
    field.addEventListener("blur", () => close(true));
    item.replaceChildren(field);
    field.select();
  };
  const remove = () => {
    history.remove(one.id);
    if (one.id === chat.id) open(history.fresh());
    else showShelf();
    byId("new-chat").focus();
  };
  item.append(
    el("button", { class: "title", type: "button", "aria-current": one.id === chat.id ? "true" : null, onclick: show }, title),
    el("button", { class: "quiet small", type: "button", "aria-label": `Rename ${title}`, title: "Rename", onclick: rename }, "✎"),
    el("button", { class: "quiet small", type: "button", "aria-label": `Delete ${title}`, title: "Delete", onclick: remove }, "×"),
  );
  return item;
}

// ---- start -----------------------------------------------------------------------------------------------------

/** Where typing goes on; a phone's keyboard comes up when asked for, not before. */
export function enter() {
  if (matchMedia("(hover: hover)").matches) byId("message").focus({ preventScroll: true });
}

function submit() {
  const text = byId("message").value;
  if (!text.trim() || running) return;
  chat.messages.push({ role: "user", content: text });
  history.keep(chat);
  save("chat", chat.id);
  byId("message").value = "";
  save("typed", "");
  grow();
  show();
  showShelf();
  answer();
  toEnd();
  enter();
}

function grow() {
  const field = byId("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

export function start() {
  chat = history.find(load("chat", "")) ?? history.fresh();
  const field = byId("message");
  keepTyped(field, "typed");
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("stop").addEventListener("click", () => {
    running?.abort();
    field.focus();
  });
  byId("chat").addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  byId("new-chat").addEventListener("click", () => {
    open(history.fresh());
    field.focus();
  });
  let isSure = false;
  byId("delete-all").addEventListener("click", () => {
    if (isSure) {
      history.removeAll();
      open(history.fresh());
    }
    isSure = !isSure;
    byId("delete-all").textContent = isSure ? "Really delete all?" : "Delete all chats";
  });
  byId("delete-all").addEventListener("blur", () => {
    isSure = false;
    byId("delete-all").textContent = "Delete all chats";
  });
  const handle = byId("shelf-handle");
  handle.addEventListener("click", () => {
    const isOpen = byId("chat").classList.toggle("shelf-open");
    handle.setAttribute("aria-expanded", String(isOpen));
  });
  show();
  showShelf();
  showRunning();
}
