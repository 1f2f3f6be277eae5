// One answer: what is committed, the canvas of a step or the draft it was stopped at, calls, and the gauge beside it.

import { Gauge, drawPieces } from "./canvas.js";
import { el } from "./dom.js";
import { copy, showMarkdown } from "./prose.js";

const gauges = new WeakMap(); // message -> Gauge: replays last as long as the page

const DRAFT = " Above stands the draft it had come to. It is not sent along, unless you use it.";

export class Answer {
  /** `acts`: what can be done with it: regenerate(), keep(), send(results), follow(), and isLast() to ask. */
  constructor(message, acts) {
    Object.assign(this, { message, acts, pending: null });
    this.thought = el("div", { class: "plain", dir: "auto" });
    this.fold = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thought"), this.thought);
    this.text = el("div", { class: "committed" });
    this.canvas = el("div", { class: "canvas", "aria-hidden": "true", dir: "auto", hidden: true });
    this.calls = el("div", { class: "calls" });
    this.note = el("p", { class: "note", hidden: true });
    this.copy = el("button", { class: "quiet", type: "button", onclick: () => copy(this.message.content, this.copy, this.text) }, "Copy");
    this.again = el("button", { class: "quiet regenerate", type: "button", onclick: () => acts.regenerate() }, "Regenerate");
    this.take = el("button", { class: "quiet", type: "button", hidden: true, onclick: () => this.#takeDraft() }, "Use the draft");
    this.actions = el("div", { class: "row actions", hidden: true }, this.copy, this.take, this.again);
    this.root = el("article", { class: "turn answer", "aria-label": "Answer" },
      el("div", { class: "words" }, this.fold, this.text, this.canvas, this.note, this.calls, this.actions));
    this.waiting = el("p", { class: "waiting" }, "…");
  }

  /** An answer that was there before. */
  static of(message, acts) {
    const view = new Answer(message, acts);
    const gauge = gauges.get(message);
    if (gauge) {
      view.#hang(gauge);
      gauge.show = (frame) => view.#show(frame);
    } else view.#figures();
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
    this.pending = { ...draft, before: this.message.content.length };
    this.gauge.add(draft, this.message.content.length);
    this.acts.follow();
  }

  commit(delta) {
    this.waiting.remove();
    const { message } = this;
    if (delta.content) message.content += delta.content;
    if (delta.reasoning_content) message.thought += delta.reasoning_content;
    for (const call of delta.tool_calls ?? []) (message.tool_calls ??= []).push({ id: call.id, function: call.function });
    if (!delta.content && !delta.reasoning_content && !delta.tool_calls) return;
    this.pending = null;
    if (this.gauge && !this.gauge.isAtEnd()) return;
    this.#show(null);
    this.acts.follow();
  }

  /** The answer is not to come any further: what its canvas last held is kept as a draft. */
  stop(note) {
    this.message.note = note;
    if (!this.pending) return;
    const { pieces, entropies, accepted, end, canvas, step, before } = this.pending;
    this.message.draft = { pieces, entropies: entropies.map((entropy) => Math.round(entropy * 1000) / 1000), accepted, end, canvas, step, before };
  }

  end() {
    this.waiting.remove();
    this.root.classList.remove("live");
    if (this.gauge) this.gauge.finish(this.message.usage);
    else this.#figures();
    this.#show(null);
    this.#ended();
  }

  #figures() {
    if (!this.message.usage) return;
    this.#hang(new Gauge(() => {}));
    this.gauge.figures(this.message.usage);
  }

  #hang(gauge) {
    this.gauge = gauge;
    gauges.set(this.message, gauge);
    this.root.append(gauge.root);
  }

  #ended() {
    const { message } = this;
    this.actions.hidden = false;
    this.take.hidden = !message.draft;
    this.note.textContent = `${message.note ?? ""}${message.draft ? DRAFT : ""}`;
    this.note.hidden = !message.note;
    const calls = message.tool_calls ?? [];
    if (calls.length) this.calls.replaceChildren(...calls.map(showCall), ...(this.acts.isLast() ? [resultsForm(calls, this.acts.send)] : []));
  }

  /** Committed text, and below it the canvas of that step; null: all that is committed, and the draft it stopped at. */
  #show(frame) {
    const { content, thought, draft, tool_calls: calls } = this.message;
    showMarkdown(this.text, frame ? content.slice(0, frame.before) : content);
    const shown = frame ?? draft;
    this.canvas.hidden = !shown;
    this.canvas.classList.toggle("stopped", !frame && Boolean(draft));
    this.canvas.setAttribute("aria-hidden", String(Boolean(frame))); // drafts pass too fast to be read out
    if (shown) drawPieces(this.canvas, shown);
    this.fold.hidden = !thought;
    this.thought.textContent = thought ?? "";
    if (!this.calls.querySelector("form")) this.calls.replaceChildren(...(frame ? [] : (calls ?? []).map(showCall)));
  }

  #takeDraft() {
    const { draft } = this.message;
    this.message.content += draft.pieces.slice(0, draft.end).join("");
    this.message.note = "Stopped; the draft was taken as it stood.";
    delete this.message.draft;
    this.#show(null);
    this.#ended();
    this.acts.keep();
    this.again.focus();
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
function resultsForm(calls, send) {
  const fields = calls.map((call) => {
    const name = `Result of ${call.function.name}`;
    return el("textarea", { rows: 2, "aria-label": name, placeholder: name });
  });
  const submit = (event) => {
    event.preventDefault();
    send(calls.map((call, at) => ({ role: "tool", tool_call_id: call.id, name: call.function.name, content: fields[at].value })));
  };
  const button = el("button", { type: "submit" }, calls.length > 1 ? "Send the results" : "Send the result");
  return el("form", { class: "results", onsubmit: submit }, ...fields, button);
}
