// Chat: the conversation that is open, and the answer under way.

import { Answer } from "./answer.js";
import { stream } from "./api.js";
import { announce, byId, el } from "./dom.js";
import * as history from "./history.js";
import { showLimits } from "./limits.js";
import { branches, resultTurn, saidTurn } from "./said.js";
import * as settings from "./settings.js";
import { showShelf, start as startShelf, tellDeleted } from "./shelf.js";
import { keepTyped, load, save, saveTyped } from "./store.js";
import { add, freshChat, leafOf, pathTo, placed, versions } from "./tree.js";
import { trouble } from "./trouble.js";

let chat;
let running = null; // {control, chat, message, view}

const log = () => byId("log");
const systemOf = () => (chat.system ?? settings.system()).trim();

// ---- asking ----------------------------------------------------------------------------------------------------

function toSend(path) {
  const plain = path.map(({ role, content, tool_calls, tool_call_id }) => ({
    role,
    content: content || (tool_calls ? null : content),
    ...(tool_calls ? { tool_calls: tool_calls.map((call) => ({ id: call.id, type: "function", function: call.function })) } : {}),
    ...(tool_call_id ? { tool_call_id } : {}),
  })).filter((message) => message.role !== "assistant" || message.content || message.tool_calls);
  return systemOf() ? [{ role: "system", content: systemOf() }, ...plain] : plain;
}

/** Ask for an answer to the path that ends in `parent`, a message's id. */
async function answer(parent) {
  if (running) return;
  const mine = chat;
  const before = mine.leaf;
  mine.leaf = parent;
  const message = { role: "assistant", content: "", thought: "" };
  const view = new Answer(message, actsOf(message));
  const control = new AbortController();
  const run = { control, chat: mine, message, view, parent, before };
  running = run;
  show();
  log().append(view.root);
  view.begin();
  announce("The model is writing.");
  let failure = null;
  try {
    const tools = settings.tools();
    const body = { ...settings.request(), messages: toSend(pathTo(mine)), stream_options: { include_usage: true }, ...(tools ? { tools } : {}) };
    for await (const chunk of stream("v1/chat/completions", body, control.signal)) {
      if (chunk.draft) view.draft(chunk.draft);
      const choice = chunk.choices?.[0];
      if (choice?.delta) view.commit(choice.delta);
      if (choice?.finish_reason === "length") message.note = "Cut off at the token limit.";
      if (chunk.usage) message.usage = chunk.usage;
    }
  } catch (error) {
    if (error.name === "AbortError") view.stop("Stopped.");
    else {
      failure = error;
      view.stop("Broke off here.");
    }
  }
  if (run.isLeft && failure) return; // onHide has kept it
  if (running === run) running = null;
  document.dispatchEvent(new Event("sfumato:look"));
  finish(run, failure);
}

const isEmpty = (message) => !message.content && !message.thought && !message.tool_calls && !message.draft;

function finish({ chat: mine, message, view, parent, before }, failure) {
  const isNothing = isEmpty(message);
  if (isNothing && !failure) message.note ??= "The answer is empty.";
  if (!isNothing || !failure) {
    mine.messages.set(placed(message, parent).id, message);
    if (mine.leaf === parent) mine.leaf = message.id;
    history.keep(mine, message);
  } else if (mine.leaf === parent) mine.leaf = before;
  if (mine === chat) {
    view.end();
    if (isNothing && failure) show();
    else mark(view.root, message);
    if (failure) {
      log().querySelector(".unanswered")?.remove();
      log().append(trouble(failure, retry));
    }
    else {
      const { completion_tokens: tokens, steps } = message.usage ?? {};
      announce(message.note || (steps ? `The answer is complete: ${tokens} tokens in ${steps} steps.` : "The answer is complete."));
    }
    if (failure) toEnd();
    else follow();
  }
  showRunning();
  showShelf();
}

/** Answer the last message of the user (or the last results) anew. */
function retry() {
  const last = pathTo(chat).at(-1);
  answer(last.role === "assistant" ? last.parent : last.id);
  enter();
}

function say(parent, ...messages) {
  if (running) return;
  history.restore([chat.id]); // it may have been deleted in another tab
  chat.leaf = parent;
  for (const message of messages) history.keep(chat, add(chat, message));
  save("chat", chat.id, "sessionStorage");
  save("chat", chat.id);
  showShelf();
  answer(chat.leaf);
  toEnd();
  enter();
}

// ---- showing ---------------------------------------------------------------------------------------------------

const actsOf = (message) => ({
  regenerate: () => !running && answer(message.parent),
  keep: () => history.keep(chat, message),
  send: (results) => say(message.id, ...results),
  isLast: () => chat.leaf === message.id,
  follow,
});

function turnOf(message) {
  if (message.role === "tool") return resultTurn(message);
  if (message.role === "assistant") return Answer.of(message, actsOf(message)).root;
  const turn = saidTurn(message, (text) => say(message.parent, { role: "user", content: text }));
  const hint = settings.hintFor(message.content);
  if (hint) turn.append(el("p", { class: "note" }, hint));
  return turn;
}

/** A turn with the arrows to its message's other versions. */
function mark(turn, message) {
  const go = (version, step) => {
    if (running) return;
    chat.leaf = leafOf(chat, version.id);
    history.keep(chat);
    show();
    const arrows = log().querySelectorAll(`[data-id="${version.id}"] .branches button`);
    (arrows[step < 0 ? 0 : 1]?.disabled ? arrows[step < 0 ? 1 : 0] : arrows[step < 0 ? 0 : 1])?.focus();
  };
  turn.dataset.id = message.id;
  const arrows = branches(versions(chat, message), message, go);
  if (arrows) turn.querySelector(".actions")?.prepend(arrows);
  return turn;
}

const EMPTY = "Ask something. The answer does not come word by word: a whole canvas of it clears at once, from what is certain to what is not.";

function show() {
  const path = pathTo(chat);
  const turns = path.map((message) => mark(turnOf(message), message));
  const empty = el("div", { class: "empty" }, el("h1", {}, "Out of the smoke"), el("p", {}, EMPTY));
  log().replaceChildren(...(turns.length ? turns : [empty]));
  const last = path.at(-1);
  if (last && last.role !== "assistant" && !running) {
    const button = el("button", { type: "button", onclick: retry }, "Answer it");
    log().append(el("div", { class: "trouble unanswered" }, el("p", {}, "This message has no answer yet."), button));
  }
  showRunning();
}

function showSystem() {
  const field = byId("chat-system");
  if (field !== document.activeElement) field.value = chat.system ?? settings.system();
  byId("system-name").textContent = chat.system !== null ? "System prompt of this chat" : settings.system() ? "System prompt, from the settings" : "System prompt";
  byId("system-back").hidden = chat.system === null;
}

/** Keep the end in view, unless the reader has scrolled away from it. */
function follow() {
  const page = document.scrollingElement;
  if (page.scrollHeight - page.scrollTop - innerHeight < 240) toEnd();
}

const toEnd = () => (document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight);

function showRunning() {
  byId("chat").classList.toggle("busy", Boolean(running));
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
}

/** Open a chat at its leaf, or at a message; null: a fresh one. */
function open(id, message = null) {
  const { control } = running ?? {};
  running = null;
  control?.abort();
  chat = (id && history.find(id)) || freshChat();
  if (message && chat.messages.has(message)) chat.leaf = leafOf(chat, message);
  save("chat", chat.id, "sessionStorage");
  save("chat", chat.id);
  show();
  showShelf();
  showSystem();
  if (message) log().querySelector(`[data-id="${message}"]`)?.scrollIntoView({ block: "center" });
}

// ---- other tabs, and the end of this one -----------------------------------------------------------------------

/** Another tab has written: its messages are taken over, its answers shown. */
function onStorage(event) {
  if (event.key === "sfumato.options" || event.key?.startsWith("sfumato.settings.")) {
    settings.reload();
    showLimits();
    showSystem();
  }
  const entry = history.entryOf(event.key);
  if (!entry) return;
  showShelf();
  if (entry.id !== chat.id) return;
  if (entry.head?.deleted) tellDeleted(chat.id);
  else if (entry.head) {
    chat.system = entry.head.system;
    showSystem();
  }
  const { message } = entry;
  if (!message) return;
  const here = chat.messages.get(message.id);
  if (here) Object.assign(here, message);
  else chat.messages.set(message.id, message);
  if (running) return;
  if (message.parent === chat.leaf) chat.leaf = message.id;
  show();
  follow();
}

/** What an answer under way has come to is kept when the page goes. */
function onHide() {
  if (!running || isEmpty({ ...running.message, draft: running.view.pending })) return;
  const { chat: mine, message, view, parent } = running;
  running.isLeft = true;
  view.stop("Stopped: the page was closed.");
  placed(message, parent);
  history.keep({ ...mine, leaf: message.id, messages: new Map(mine.messages).set(message.id, message) }, message);
}

// ---- start -----------------------------------------------------------------------------------------------------

/** Where typing goes on; a phone's keyboard comes up when asked for, not before. */
export function enter() {
  showLimits();
  if (chat) showSystem();
  if (matchMedia("(hover: hover)").matches) byId("message").focus({ preventScroll: true });
}

function submit() {
  const text = byId("message").value;
  if (!text.trim() || running) return;
  byId("message").value = "";
  saveTyped("typed", "");
  grow();
  say(chat.leaf, { role: "user", content: text });
}

function grow() {
  const field = byId("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function startSystem() {
  const field = byId("chat-system");
  const keep = (system) => {
    chat.system = system;
    if (chat.messages.size) history.keep(chat);
    showSystem();
  };
  field.addEventListener("input", () => keep(field.value));
  byId("system-back").addEventListener("click", () => {
    field.focus();
    keep(null);
    field.value = settings.system();
  });
}

export function start() {
  history.tidy();
  chat = history.find(load("chat", "", "sessionStorage") || load("chat", "")) ?? freshChat();
  startShelf({ current: () => chat, open: (id, message) => (open(id, message), enter()) });
  startSystem();
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
  const stop = () => running?.control.abort();
  byId("stop").addEventListener("click", () => {
    stop();
    field.focus();
  });
  byId("chat").addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  byId("new-chat").addEventListener("click", () => {
    open(null);
    field.focus();
  });
  addEventListener("storage", onStorage);
  addEventListener("pagehide", onHide);
  show();
  showShelf();
  showSystem();
}
